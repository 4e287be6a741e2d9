"""Time the hot paths of this working tree and of another commit in turn on this machine.

    python scripts/ratio.py BASE [--rounds N]        (make perf-ratio BASE=origin/main)

BASE is checked out into a temporary worktree; its code runs with this environment's packages. Both sides run this
tree's tests/perf/test_hot.py, one process per round, in alternating order, so that other load on the machine affects
both. A path is slower if a one-sided Mann-Whitney test of the rounds' medians is significant at LEVEL, after Holm's
correction over the paths, *and* the median ratio is above FACTOR. Exit code 1 if a path is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from bench.records.paired import holm

ROOT = Path(__file__).parent.parent
HOT = ROOT / "tests" / "perf" / "test_hot.py"
LEVEL, FACTOR, ROUNDS = 0.01, 1.1, 7  # 7 against 7 rounds: the smallest p is 1/3432, below LEVEL also for six paths
OPTIONS = ("--benchmark-only", "--benchmark-max-time=0.5", "--benchmark-min-rounds=5", "--benchmark-warmup=on")


@dataclass(frozen=True)
class HotPath:
    """One hot path: ratios of head to base by round; no ratios where base lacks the path."""

    name: str
    seconds: float  # head's median
    ratios: list[float]
    p: float = 1.0

    @property
    def slower(self) -> bool:
        return bool(self.ratios) and self.p <= LEVEL and statistics.median(self.ratios) > FACTOR

    def __str__(self) -> str:
        if not self.ratios:
            return f"{self.name}: new, {1000 * self.seconds:.3g} ms"
        low, high = min(self.ratios), max(self.ratios)
        return (
            f"{self.name}: {1000 * self.seconds:.3g} ms, {statistics.median(self.ratios):.3f} of base's "
            f"(rounds from {low:.3f} to {high:.3f}), p {self.p:.2g}{': SLOWER' if self.slower else ''}"
        )


def compare(base: Sequence[Mapping[str, float]], head: Sequence[Mapping[str, float]]) -> list[HotPath]:
    """Compare the medians of both sides, round by round. Raises ValueError where a path ran in only some rounds."""
    names = list(dict.fromkeys(name for one in head for name in one))
    for side in (base, head):
        if odd := [n for n in names if 0 < sum(n in one for one in side) < len(side)]:
            raise ValueError(f"{odd[0]} failed in some rounds")
    old = [n for n in names if n in base[0]]
    tests = [
        float(stats.mannwhitneyu([h[n] for h in head], [b[n] for b in base], alternative="greater").pvalue) for n in old
    ]
    p = dict(zip(old, holm(tests), strict=True))
    found = []
    for n in names:
        ratios = [h[n] / b[n] for h, b in zip(head, base, strict=True)] if n in p else []
        found.append(HotPath(n, statistics.median(h[n] for h in head), ratios, p.get(n, 1.0)))
    return found


def medians(report: Mapping[str, Any], root: Path) -> dict[str, float]:
    """Read seconds by name from pytest-benchmark's report. Raises ValueError if it timed other code than ``root``'s."""
    for one in report["benchmarks"]:
        if not Path(one["extra_info"]["bench"]).resolve().is_relative_to(root.resolve() / "bench"):
            raise ValueError(f"{one['name']} timed {one['extra_info']['bench']}, not the code in {root}")
    return {one["name"]: float(one["stats"]["median"]) for one in report["benchmarks"]}


def timed(root: Path, must_pass: bool) -> dict[str, float]:
    """Time one round of the code in ``root`` in its own process."""
    # Without site (-S) no .pth file is read, so an editable install of this tree cannot replace base's code; -P keeps
    # the current folder out of the path. A benchmark that base cannot run fails there and is reported as new.
    packages = dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *packages])}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-S", "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HOT), *OPTIONS]
        ran = subprocess.run(
            [*command, f"--benchmark-json={file}"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        if ran.returncode > 1 or (must_pass and ran.returncode) or not file.exists() or not file.stat().st_size:
            if must_pass or ran.returncode > 1:
                raise ValueError(f"the benchmarks of {root} did not run:\n{ran.stdout[-4000:]}{ran.stderr[-2000:]}")
            return {}
        return medians(json.loads(file.read_text()), root)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Check the commit out into a temporary worktree."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", base, commit], check=True)
        try:
            yield base
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", base], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the hot paths of this tree and of another commit.")
    parser.add_argument("base")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    head: list[dict[str, float]] = []
    base: list[dict[str, float]] = []
    with checked_out(args.base) as other:
        for number in range(args.rounds):
            sides = [(head, ROOT), (base, other)]
            for found, root in sides if number % 2 else reversed(sides):
                found.append(timed(root, must_pass=root == ROOT))
    paths = compare(base, head)
    print(f"head against {args.base}, {args.rounds} rounds in turn; slower: p at most {LEVEL}, ratio above {FACTOR}")
    print("\n".join(map(str, paths)))
    return int(any(path.slower for path in paths))


if __name__ == "__main__":
    sys.exit(main())
