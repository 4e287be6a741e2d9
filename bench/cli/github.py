"""What GitHub Actions shows of a check: annotations on the run's page, and a summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def annotation(level: str, title: str, message: str) -> str:
    """A workflow command; nothing in ``title`` or ``message`` can end it and begin another."""
    data = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    name = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{data}"


def publish(summary: str, annotations: Sequence[tuple[str, str, str]]) -> None:
    """Inside GitHub Actions, annotate and add to the step's summary; nothing elsewhere.

    On stderr, so that stdout stays JSON where that was asked for; the runner reads commands from both.
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    for level, title, message in annotations:
        print(annotation(level, title, message), file=sys.stderr)
    if file := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(file).open("a") as f:
            f.write(summary)
