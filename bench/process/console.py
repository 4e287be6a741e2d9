"""What a person sees: progress bars with ETA on stderr, so that stdout stays for results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ConsoleReporter:
    """Progress on the terminal; off a terminal, a line every half a minute. Satisfies ``runlog.Reporter``."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def training(self, what: str) -> Iterator[Callable[[int, int, float], None]]:
        with self._bar(f"train {what}", 0) as update:
            # Features that a probe is trained on are computed without a loss.
            yield lambda done, total, loss: update(done, total, "" if math.isnan(loss) else f"loss {loss:.3f}")

    @contextmanager
    def certifying(self, what: str, total: int, done: int) -> Iterator[Callable[[int, int], None]]:
        with self._bar(f"certify {what}", total) as update:
            yield lambda images, correct: update(
                images, total, f"accuracy so far {correct / images:.0%}" if images else ""
            )

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Callable[[int, int, str], None]]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            # Shown at the first update, so that what comes from the cache draws no bar.
            task = progress.add_task(what, total=total, note="", visible=False)
            began = spoken = time.monotonic()

            def update(done: int, all_: int, note: str) -> None:
                nonlocal spoken
                progress.update(task, completed=done, total=all_, note=note, visible=True)
                now = time.monotonic()
                if not self.console.is_terminal and now - spoken > 30:
                    spoken = now
                    self.say(f"{what}: {done}/{all_}, {now - began:.0f} s, {note}")

            yield update


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
