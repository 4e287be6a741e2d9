"""Progress bars on stderr; stdout is reserved for results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ConsoleReporter:
    """Shows progress bars on a terminal, else a line every 30 s. Satisfies ``runlog.Reporter``."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)

    @contextmanager
    def training(self, what: str) -> Iterator[Callable[[int, int, float], None]]:
        """Show a training; call the value with (steps done, all steps, loss)."""
        with self._bar(f"train {what}", 0) as update:
            # NaN: there is no loss while a probe's features are computed.
            yield lambda done, total, loss: update(done, total, "" if math.isnan(loss) else f"loss {loss:.3f}")

    @contextmanager
    def certifying(self, what: str, total: int, done: int) -> Iterator[Callable[[int, int], None]]:
        """Show a certification; call the value with (images done, correct so far)."""
        with self._bar(f"certify {what}", total) as update:
            yield lambda images, correct: update(
                images, total, f"accuracy so far {correct / images:.0%}" if images else ""
            )

    @contextmanager
    def predicting(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """Show a prediction of pictures; call the value with (pictures done, predictions that are certified)."""
        with self._bar(f"predict {what}", total) as update:
            yield lambda pictures, certified: update(pictures, total, f"{certified} certified")

    @contextmanager
    def attacking(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """Show an attack; call the value with (images done, images whose class was changed)."""
        with self._bar(f"attack {what}", total) as update:
            yield lambda images, changed: update(images, total, f"class changed for {changed}" if images else "")

    @contextmanager
    def measuring(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show any other work; call the value with (steps done, all steps)."""
        began = time.monotonic()
        with self._bar(what, 0) as update:

            def count(done: int, total: int) -> None:
                left = (time.monotonic() - began) * (total - done) / max(done, 1)
                update(done, total, "" if self.console.is_terminal else f"about {duration(left)} left")

            yield count

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
            # Shown from the first update on: cached weights need no bar.
            task = progress.add_task(what, total=total, note="", visible=False)
            began = last = time.monotonic()

            def update(done: int, all_: int, note: str) -> None:
                nonlocal last
                progress.update(task, completed=done, total=all_, note=note, visible=True)
                now = time.monotonic()
                if not self.console.is_terminal and now - last > 30:
                    last = now
                    self.say(f"{what}: {done}/{all_}, {now - began:.0f} s, {note}")

            yield update


def duration(seconds: float) -> str:
    """Format seconds: 8 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
