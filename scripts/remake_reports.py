"""Make everything in reports/ again that is made from records: ``make reports``.

    python scripts/remake_reports.py [--out DIR]

Each folder reports/<study>/runs holds records (``bench export RUNS --record reports/<study>/runs``); ``bench report``
writes the study's report.md and figures beside it, as SVG alone. The page reports/published/ is made from
published.csv with the rows of all studies. ``--out`` writes elsewhere, as the test that compares does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPORTS = Path(__file__).parents[1] / "reports"


def studies(reports: Path) -> list[Path]:
    """Return the folders of ``reports`` that hold records, by name."""
    return sorted(runs.parent for runs in reports.glob("*/runs") if runs.is_dir())


def remake(reports: Path, out: Path) -> list[Path]:
    """Write the reports of all studies and the page of published rows into ``out``; return the files.

    Raises CalledProcessError where a command fails, as for a record that does not pass its audit.
    """
    made = [study.name for study in studies(reports)]
    for name in made:
        for old in [f for f in (out / name).glob("*") if f.suffix in (".svg", ".png")]:
            old.unlink()  # a figure's name changes with the setting of its runs
        _call("-m", "bench", "report", reports / name / "runs", "--out", out / name)
        for other in [*(out / name).glob("*.png"), *(out / name).glob("*.pdf")]:
            other.unlink()
    runs = [reports / name / "runs" for name in made]
    _call(Path(__file__).with_name("published.py"), "page", *runs, "--out", out / "published")
    return sorted(f for name in (*made, "published") for f in (out / name).iterdir() if f.is_file())


def _call(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the reports again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPORTS)
    for file in remake(REPORTS, parser.parse_args(argv).out):
        print(file)


if __name__ == "__main__":
    main()
