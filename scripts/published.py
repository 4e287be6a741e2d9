"""Recompute rows of reports/published.csv from released logs, and write the page reports/published/.

    python scripts/published.py logs LOGS            # the rows of LOGS/<dataset>-<method>-sigma<sigma>.tsv
    python scripts/published.py page [RUNS ...]      # report.md and figures, with our rows from folders of runs

``logs`` imports each log as ``bench import`` does and replaces the rows of the same paper that were recomputed from
logs; no number is typed. The logs are those of CAT-RS (Jeong et al. 2023, arXiv 2212.09000): seven training methods.
They state neither n nor alpha. A radius is at most sigma Phi^-1(alpha^(1/n)), so a log is refused whose largest radius
is not that of n and alpha below, to the digits printed.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import published_page
from scipy import special

from bench.errors import BenchError
from bench.records import importing, metrics
from bench.records.flaws import LogParameters
from bench.records.record import Record
from bench.report import tables

FILE = Path(__file__).parents[1] / "reports" / "published.csv"
NAME = re.compile(r"(?P<dataset>[a-z0-9]+)-(?P<method>[a-z-]+)-sigma(?P<sigma>[0-9.]+)")
N, ALPHA, STEP = 100_000, 0.001, 0.25
PAPER, ARXIV, CHECKED = "Jeong 2023", "2212.09000", "recomputed from logs"
METHODS = {  # the folder's name in the logs' repository, and the method with the paper that proposed it
    "cohen": ("retrain-rs", "Cohen 2019"),
    "stab": ("stability", "Li 2019"),
    "salman": ("smoothadv", "Salman 2019"),
    "macer": ("macer", "Zhai 2020"),
    "consistency": ("consistency", "Jeong 2020"),
    "smoothmix": ("smoothmix", "Jeong 2021"),
    "cat-rs": ("cat-rs", "Jeong 2023"),
}
Fact = dict[str, str]


def recomputed(log: Path) -> list[Fact]:
    """Return the rows of a log: certified accuracy at 0, .25, ... below its largest possible radius, and ACR.

    Raises BenchError where its name or its radii are not as the module states.
    """
    named = NAME.fullmatch(log.stem)
    if named is None or named["method"] not in METHODS:
        raise BenchError(f"{log}: logs are named <dataset>-<method>-sigma<sigma>.tsv, methods {', '.join(METHODS)}")
    sigma, (method, proposed) = float(named["sigma"]), METHODS[named["method"]]
    record = imported(log, named["dataset"], sigma)
    reach = sigma * float(special.ndtri(ALPHA ** (1 / N)))
    largest = max(c.radius for c in record.certificates)
    if f"{largest:.3g}" != f"{reach:.3g}":
        raise BenchError(f"{log}: its largest radius is {largest}, and {reach:.3g} that of n {N} and alpha {ALPHA}")
    where = "" if proposed == PAPER else f" of {method} ({proposed}) in the repository of {PAPER}"
    about = {
        **{"paper": PAPER, "arxiv": ARXIV, "dataset": named["dataset"], "method": method},
        **{"guarantee": "probabilistic at alpha", "sigma": named["sigma"], "inputs": str(len(record.certificates))},
        **{"n": f"{N} inferred", "alpha": f"{ALPHA} inferred", "checked": CHECKED},
        "source": f"released per-input log{where}; n and alpha are inferred: they give the largest radius {largest}",
    }
    radii = [STEP * i for i in range(int(reach / STEP) + 1)]
    found = metrics.summarise(record.certificates, radii)
    facts = [
        {**about, "metric": "certified_accuracy", "radius": f"{r:g}", "value": f"{100 * rate.value:g}"}
        for r, rate in zip(radii, found.certified_accuracy, strict=True)
    ]
    return [*facts, {**about, "metric": "acr", "radius": "none", "value": f"{found.acr:.4f}"}]


def imported(log: Path, dataset: str, sigma: float) -> Record:
    """Import a log as ``bench import`` does, into a folder that is deleted again."""
    with tempfile.TemporaryDirectory() as out:
        parameters = LogParameters(format="cohen", dataset=dataset, sigma=sigma, alpha=ALPHA, n=N)
        return importing.import_log(log, parameters, Path(out))


def read(file: Path) -> tuple[list[str], list[Fact]]:
    """Return the columns and rows of a file of published facts."""
    with file.open(newline="") as f:
        reader = csv.DictReader(f)
        return list(reader.fieldnames or ()), list(reader)


def update(logs: Path, file: Path) -> Iterator[str]:
    """Replace the recomputed rows of a file by those of the logs in a folder; yield a line for each log."""
    columns, facts = read(file)
    paths = sorted(logs.glob("*-sigma*.tsv"))
    if not paths:
        raise BenchError(f"{logs} has no log named <dataset>-<method>-sigma<sigma>.tsv")
    made = []
    for path in paths:
        made += (rows := recomputed(path))
        yield f"{path.name}: {len(rows)} rows of {rows[0]['inputs']} images"
    kept = [f for f in facts if (f["arxiv"], f["checked"]) != (ARXIV, CHECKED)]
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *made])


def drawn(runs: Sequence[Path], out: Path) -> Iterator[str]:
    """Write the page with the runs of these folders; yield a line for each file. Raises BenchError for a bad run."""
    found = [tables.load_records(folder) for folder in runs]
    if left_out := [line for _, lines in found for line in lines]:
        raise BenchError(left_out[0])
    records = [record for folder, _ in found for record in folder]
    for file in published_page.write(tables.build(records) if records else None, out):
        yield f"wrote {file}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    logs = commands.add_parser("logs", help="recompute rows from released logs")
    logs.add_argument("logs", type=Path)
    logs.add_argument("--file", type=Path, default=FILE)
    page = commands.add_parser("page", help="write report.md and figures")
    page.add_argument("runs", type=Path, nargs="*", help="folders of our runs")
    page.add_argument("--out", type=Path, default=FILE.parent / "published")
    args = parser.parse_args(argv)
    try:
        for line in update(args.logs, args.file) if args.command == "logs" else drawn(args.runs, args.out):
            print(line)
    except BenchError as e:
        raise SystemExit(f"published: {e}") from None


if __name__ == "__main__":
    main()
