"""Annotations and a summary of a check for GitHub Actions."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def annotation(level: str, title: str, message: str) -> str:
    """Write a workflow command, with ``title`` and ``message`` escaped so that they cannot start another."""
    data = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    name = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{data}"


def publish(summary: str, annotations: Sequence[tuple[str, str, str]]) -> None:
    """Print annotations and add to the step's summary; outside GitHub Actions, a no-op.

    Annotations go to stderr, so that stdout stays JSON with --json; the runner reads commands from both.
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    for level, title, message in annotations:
        print(annotation(level, title, message), file=sys.stderr)
    if file := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(file).open("a") as f:
            f.write(summary)
