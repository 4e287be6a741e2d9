"""Measure memory over millions of votes, and resume ten thousand records again and again. Linux; ``make soak``.

    python scripts/soak.py [--out reports/soak] [--votes N] [--images N] [--interruptions N] [--only PART]

Both parts call ``bench run`` in this process. The first samples resident memory while votes are drawn. The second
interrupts a run by Ctrl-C again and again and times each resumption up to the first new record; its certificates must
equal those of an uninterrupted run. Writes the samples and a figure. Exit code 1 if memory or resumption time grows.
"""

from __future__ import annotations

import _thread
import argparse
import csv
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
MIB = 2**20
N0, N = 20, 25_000  # votes per image in the first part
SLACK = 16.0  # MiB of growth allowed from the first to the last quarter, and of drift in all
SECONDS = 1.0  # processor seconds by which the last resumptions may exceed the first


def bench(*args: object) -> int:
    """Call ``bench`` in this process and return its exit code; its output goes to stderr."""
    from bench.cli import main

    kept, sys.stdout = sys.stdout, sys.stderr
    try:
        main([str(a) for a in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.stdout = kept
    raise AssertionError("bench always exits")


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


@contextmanager
def watched(out: Path, every: float, seen: Callable[[int], None]) -> Iterator[None]:
    """Call ``seen`` with the number of records in ``out`` every ``every`` seconds."""
    done = threading.Event()

    def watch() -> None:
        position = count = 0
        while not done.wait(every):
            for file in out.glob("*/certificates.jsonl"):
                with file.open("rb") as f:
                    f.seek(position)
                    new = f.read()
                position, count = position + len(new), count + new.count(b"\n")
            seen(count)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def votes(out: Path, most: int) -> list[tuple[float, int, float]]:
    """Draw at least ``most`` votes on the tiny card; return samples of (seconds, votes so far, MiB)."""
    images = -(-most // (N0 + N))
    rows: list[tuple[float, int, float]] = []
    began = time.monotonic()

    def seen(records: int) -> None:
        rows.append((time.monotonic() - began, records * (N0 + N), resident()))

    run = ["run", "--defense", "none", "--dataset", TESTS / "tiny.toml", "--examples", images, "--n0", N0, "--n", N]
    with watched(out, 0.25, seen):
        code = bench(*run, "--device", "cpu", "--out", out)
    if code:
        raise SystemExit(f"bench run: exit {code}")
    (info,) = (json.loads(f.read_text()) for f in out.glob("*/run.json"))
    assert info["cost"]["votes"] >= most
    # Before the first record, data are loaded and a base is trained.
    return [row for row in rows if row[1]]


def grown(values: list[float]) -> tuple[float, float]:
    """Return the last quarter's maximum less the first's, and the drift of a straight line through all values."""
    quarter = max(1, len(values) // 4)
    slope = float(np.polyfit(np.arange(len(values)), values, 1)[0]) * (len(values) - 1) if len(values) > 1 else 0.0
    return max(values[-quarter:]) - max(values[:quarter]), slope


def made_up_card(folder: Path, images: int) -> Path:
    """Write a card of ``images`` made-up grey 8x8 test images in three classes."""
    import pyarrow as pa
    from pyarrow import parquet

    sys.path.insert(0, str(ROOT))
    from tests.helpers.madeup import png

    folder.mkdir()
    for part, count in (("train", 300), ("test", images)):
        rows = {"image": [png("L", (8, 8)) for _ in range(count)], "label": [i % 3 for i in range(count)]}
        parquet.write_table(pa.table(rows), folder / f"{part}.parquet")
    card = folder / "madeup.toml"
    card.write_text(
        f"""
name = "madeup"
source = {{ reader = "parquet", folder = ".", train = "train.parquet", test = "test.parquet" }}
shape = [1, 8, 8]
classes = ["0", "1", "2"]
mean = [0.5]
std = [0.3]
radii = [0.0, 0.25]
splits = {{ validation = 100 }}

[presets.quick]
examples = {images}
n0 = 16
n = 200

[bases.vit]
model = "vit_tiny_patch16_224"
args = {{ img_size = 8, patch_size = 4, embed_dim = 32, depth = 1, num_heads = 2, in_chans = 1 }}
schedule = {{ epochs = 1 }}
"""
    )
    return card


def certificates(out: Path) -> list[dict[str, Any]]:
    """Return the records of the run in ``out`` by image, with seconds set to 0."""
    (file,) = out.glob("*/certificates.jsonl")
    rows = [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])


def attempt(command: list[object], out: Path, found: int, stop_at: float) -> tuple[int, tuple[int, float, float]]:
    """Resume a run that has ``found`` records and interrupt it by Ctrl-C at ``stop_at`` records.

    Returns its exit code, and (records found, processor seconds up to the first new record, MiB then).
    """
    began = time.process_time()
    first: list[tuple[int, float, float]] = []
    stopped = threading.Event()

    def seen(records: int) -> None:
        if records > found and not first:
            first.append((found, time.process_time() - began, resident()))
        if records > found and records >= stop_at and not stopped.is_set():
            stopped.set()
            _thread.interrupt_main()

    try:
        with watched(out, 0.002, seen):
            code = bench(*command, "--out", out)
    except KeyboardInterrupt:  # as the command ended
        code = 130
    return code, first[0]


def resumptions(out: Path, images: int, interruptions: int) -> list[tuple[int, float, float]]:
    """Interrupt a run ``interruptions`` times; return a row of ``attempt`` for each start.

    Raises AssertionError where its records differ from those of an uninterrupted run.
    """
    card = made_up_card(out / "data", images)
    half_space = TESTS / "helpers" / "defenses" / "half_space.py"  # costs little, so that the records are timed
    command = ["run", "--defense", half_space, "--set", "threshold=0.5", "--dataset", card, "--device", "cpu"]
    assert bench(*command, "--out", out / "whole") == 0
    rows: list[tuple[int, float, float]] = []
    code, found, parts = 130, 0, out / "parts"
    while code == 130:
        stop = images * (len(rows) + 1) / (interruptions + 1) if len(rows) < interruptions else math.inf
        code, row = attempt(command, parts, found, stop)
        rows.append(row)
        found = len(certificates(parts))
    assert code == 0
    assert certificates(parts) == certificates(out / "whole"), (
        "resumed records differ from those of an uninterrupted run"
    )
    assert len(rows) == interruptions + 1
    return rows


def draw(drawn: list[list[float]], resumed: list[list[float]], path: Path) -> None:
    """Draw memory over votes, and seconds and memory of each resumption over the records found."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot([v / 1e6 for v in drawn[1]], drawn[2])
    left.set(xlabel="votes (millions)", ylabel="resident memory (MiB)", ylim=(0, 1.1 * max(drawn[2])))
    for axes, column, what in (
        (middle, 1, "processor seconds to a new record"),
        (right, 2, "resident memory (MiB)"),
    ):
        axes.plot(resumed[0][1:], resumed[column][1:], "o", ms=3)
        axes.set(xlabel="records found when resumed", ylabel=what, ylim=(0, 1.1 * max(resumed[column])))
    figure.savefig(path, dpi=120)


def write(path: Path, header: tuple[str, ...], rows: list[Any]) -> None:
    """Write a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{v:.3f}" if isinstance(v, float) else v for v in row] for row in rows)


def read(path: Path) -> list[list[float]]:
    """Read the columns of a CSV file of numbers."""
    return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).T.tolist()  # type: ignore[no-any-return]


def main(args: list[str] | None = None) -> int:
    """Run both parts or one, draw the figure, and return 1 if memory or time grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/soak"))
    parser.add_argument("--votes", type=int, default=5_000_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--interruptions", type=int, default=15)
    parser.add_argument("--only", choices=("votes", "resumptions", "figure"))
    given = parser.parse_args(args)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        if given.only in (None, "votes"):
            drawn = votes(Path(work) / "votes", given.votes)
            write(given.out / "votes.csv", ("seconds", "votes", "resident_mib"), drawn)
        if given.only in (None, "resumptions"):
            starts = resumptions(Path(work), given.images, given.interruptions)
            write(given.out / "resumptions.csv", ("records", "seconds", "resident_mib"), starts)
    grew = False
    if (file := given.out / "votes.csv").exists():
        seconds, count, memory = read(file)
        more, drift = grown(memory)
        grew |= more > SLACK or drift > SLACK
        print(
            f"{count[-1]:,.0f} votes in {seconds[-1]:.0f} s: resident memory from {min(memory):.0f} to "
            f"{max(memory):.0f} MiB, last quarter's maximum {more:+.1f} MiB over the first's, drift {drift:+.1f} MiB"
        )
    if (file := given.out / "resumptions.csv").exists():
        records, seconds, memory = (column[1:] for column in read(file))  # the first start finds nothing to resume
        (slower, _), (heavier, _) = grown(seconds), grown(memory)
        grew |= slower > SECONDS or heavier > SLACK
        print(
            f"resumed {len(records)} times, with {records[0]:,.0f} to {records[-1]:,.0f} records: the first new one "
            f"after {seconds[0]:.2f} s of the processor at first, {seconds[-1]:.2f} s at last; last quarter's maximum "
            f"{slower:+.2f} s and {heavier:+.1f} MiB over the first's; the records equal those of an uninterrupted run"
        )
    if all((given.out / name).exists() for name in ("votes.csv", "resumptions.csv")):
        draw(read(given.out / "votes.csv"), read(given.out / "resumptions.csv"), given.out / "memory.png")
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())
