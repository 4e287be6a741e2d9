"""Make everything in reports/ again that is made from records: ``make reports``.

    python scripts/remake_reports.py [--out DIR]

Each folder reports/<study>/runs holds records (``bench export RUNS --record reports/<study>/runs``); ``bench report``
writes the study's report.md and figures beside it, as SVG alone. The page reports/published/ is made from
published.csv with the rows of all studies, and so is reports/leaderboard/, which also says which records are verified
(reports/<study>/verified.json). ``--out`` writes elsewhere, as the test that compares does; without it the
README's table and figure are made again too, from the report of ``FRONT``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.io.files import write_text

REPORTS = Path(__file__).parents[1] / "reports"
FRONT, HEADING = "cifar10", "### cifar10, sigma 0.25: "  # the study on the front page, and the start of its table
# Variants that the README leaves out of the table, so that it has a dozen rows; it says so.
VARIANTS = ("none clip", "denoiser objective=mse")
BLOCK = re.compile(r"(<!-- table: [^>]*-->\n).*(<!-- end -->)", re.DOTALL)


def studies(reports: Path) -> list[Path]:
    """Return the folders of ``reports`` that hold records, by name."""
    return sorted(runs.parent for runs in reports.glob("*/runs") if runs.is_dir())


def remake(reports: Path, out: Path) -> list[Path]:
    """Write the reports of all studies, the page of published rows and the leaderboard into ``out``; return the files.

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
    _call(Path(__file__).with_name("leaderboard.py"), "--reports", reports, "--out", out / "leaderboard")
    return sorted(f for name in (*made, "published", "leaderboard") for f in (out / name).iterdir() if f.is_file())


def front_page(readme: str, report: str) -> str:
    """Return the README with the table and the figure of ``HEADING`` in a report; raises ValueError without them."""
    heading, _, rest = report[report.index(HEADING) :].partition("\n")
    body = re.split(r"\n###? |\n!\[", rest)[0]  # up to the next table or the figures, which follow all tables
    table = [line for line in body.splitlines() if line.startswith("|")]
    kept = [line for line in table if not any(re.match(rf"\| {re.escape(v)}( |<)", line) for v in VARIANTS)]
    heading = heading.removeprefix("### ")
    figure = re.search(rf"!\[{re.escape(heading)}\]\(([^)]*)\)", rest)
    assert figure
    image = f"![certified accuracy against radius](reports/{FRONT}/{figure[1]})"
    trained = re.search(r"Trained with .*?; all else by the preset\.", body)
    text = "\n\n".join([heading, "\n".join(kept), *([trained[0]] if trained else []), image])
    if not BLOCK.search(readme):
        raise ValueError("the README has no block for the table")
    return BLOCK.sub(lambda found: f"{found[1]}{text}\n{found[2]}", readme)


def _call(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the reports again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPORTS)
    out = parser.parse_args(argv).out
    for file in remake(REPORTS, out):
        print(file)
    if out == REPORTS:
        readme = REPORTS.with_name("README.md")
        write_text(readme, front_page(readme.read_text(), (REPORTS / FRONT / "report.md").read_text()))


if __name__ == "__main__":
    main()
