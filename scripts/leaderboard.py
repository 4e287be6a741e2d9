"""Write reports/leaderboard/report.md: the records of reports/*/runs, and published rows, by data set and sigma.

    python scripts/leaderboard.py [--reports DIR] [--out DIR]

A record is *verified* where reports/<study>/verified.json says so, which ``bench verify reports/<study>/runs --json``
writes, of exactly this record: its identity and certificates have the hashes in that file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import published_page
from published_page import DATASETS, PROBABILISTIC

from bench.errors import BenchError
from bench.io.files import write_text
from bench.records.findings import FAILED, VERIFIED
from bench.records.record import Record
from bench.report import published, tables
from bench.report.tables import Table
from bench.text import DASH, escape

REPORTS = Path(__file__).parents[1] / "reports"
INTRO = """\
# Leaderboard

Made by `make reports` from the records in `reports/*/runs` and from [published.csv](../published.csv). Numbers are
percentages of test images that are predicted right with a certified l2 radius of at least r (pixels in [0, 1]).

- **Certified here**: records of certbench. Rows of one table are on the same images, base, sigma, n and alpha, and are
  ranked by certified accuracy at its radii, from the first on; below each is its 95% interval. Rows of different tables
  are not comparable. The study's page tests which differences are significant.
- **As published**: what others state, in alphabetical order and not ranked: every row has its own base, training data,
  images, n and alpha. *checked* says how the number was checked here; [published](../published/report.md) has the
  sources and figures.
- *verified*: the record passed all checks of `bench verify`, and images were certified again, from the seed, by the
  version named (`+`: with files that were not committed, such as reports): with equal counts on the same kind of
  machine, else compared by a two-sample test. *audited*: every radius follows from the recorded counts, but no image
  was certified again, for the reason named.
- *guarantee*: *probabilistic at alpha*: each certificate is wrong with probability at most alpha. *deterministic*: it
  holds with certainty.
"""


def verdicts(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read what ``bench verify --json`` said of the runs of a study, by the hashes of identity and certificates."""
    if not file.exists():
        return {}
    return {(one["identity"], one["certificates"]): one for one in json.loads(file.read_text())}


def checked(record: Record, said: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Say whether a record is verified, by what and how. Raises BenchError where a check has failed."""
    one = said.get((record.identity.sha256, str(record.info.certificates_sha256)))
    if one is None:
        return "audited: bench verify was not run on it"
    if one["verdict"] == FAILED:
        raise BenchError(f"{record.path}: bench verify says: {one['why']}; a record that fails a check is not shown")
    commit = str(one["commit"] or "")
    by = f"certbench {one['certbench']}" + (f" ({commit[:12]}{'+' * commit.endswith('+')})" if commit else "")
    if one["verdict"] != VERIFIED:
        return f"audited by {by}: {one['why']}"
    images, how = len(record.identity.indices), "equal counts" if one["equal_counts"] else "two-sample test"
    source = f", of {one['source']}@{one['revision']}" if one["source"] else ""
    return f"verified: {one['images_certified_again']} of {images} images certified again, {how}, by {by}{source}"


def ours(table: Table, studies: Mapping[Path, str], said: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Return a table of our rows, the best first."""
    setting = table.setting
    head = ["defense", *(f"r = {r:g}" for r in setting.within), "guarantee", "images", "n", "alpha", "base"]
    votes = f"{'up to ' if setting.grid_only else ''}{setting.n:,}"
    same = [PROBABILISTIC, str(setting.images), votes, f"{setting.alpha:g}", setting.base]
    lines = [[*head, "study", "checked"], ["---"] * (len(head) + 2)]
    for method in table.methods:
        shares = [method.row.certified[r] for r in setting.within]
        cells = [f"{100 * s.value:.1f}<br><sub>{100 * s.low:.1f}-{100 * s.high:.1f}</sub>" for s in shares]
        where = dict.fromkeys(studies[record.path] for record in method.records)
        links = ", ".join(f"[{study}](../{study}/report.md)" for study in where)
        how = "; ".join(dict.fromkeys(checked(record, said) for record in method.records))
        lines.append([escape(method.label), *cells, *map(escape, same), links, escape(how)])
    return f"#### Certified here: {escape(setting.heading)}\n\n" + grid(lines)


def theirs(facts: Sequence[dict[Any, Any]], dataset: str, sigma: str) -> str:
    """Return a table of published rows, by name; empty where there are none."""
    found = sorted(published_page.curves(facts, dataset, sigma), key=lambda curve: curve.name)
    if not found:
        return ""
    radii = sorted({r for curve in found for r in curve.values})
    head = ["method", *(f"r = {r:.3g}" for r in radii), "guarantee", "images", "n", "alpha", "base", "checked"]
    lines = [head, ["---"] * len(head)]
    for curve in found:
        images, n, alpha, guarantee, how, _ = curve.about
        values = [f"{curve.values[r]:.1f}" if r in curve.values else DASH for r in radii]
        lines.append([escape(curve.name), *values, *map(escape, (guarantee, images, n, alpha, "its own", how))])
    return "#### As published\n\n" + grid(lines)


def grid(lines: Iterable[Sequence[str]]) -> str:
    """Return lines of escaped cells as a table of markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sigma_of(table: Table, stated: Iterable[str]) -> str:
    """Return a table's sigma as published rows write it."""
    same = (s for s in stated if s.replace(".", "").isdigit() and float(s) == table.setting.sigma)
    return next(same, f"{table.setting.sigma:g}")


def page(reports: Path) -> str:
    """Return the page. Raises BenchError where a record cannot be shown."""
    records, studies, said = [], dict[Path, str](), dict[tuple[str, str], dict[str, Any]]()
    for folder in sorted(runs.parent for runs in reports.glob("*/runs") if runs.is_dir()):
        found, left_out = tables.load_records(folder / "runs")
        if left_out:
            raise BenchError(left_out[0])
        records += found
        studies |= {record.path: folder.name for record in found}
        said |= verdicts(folder / "verified.json")
    # Images of validation serve to choose, and are no result.
    shown = [t for t in tables.build(records).tables if t.setting.split.partition("-")[0] == "test"]
    facts = published.facts().to_dict("records")
    stated = list(dict.fromkeys(str(f["sigma"]) for f in facts))
    parts = [INTRO]
    for dataset in sorted({t.setting.dataset for t in shown} | {str(f["dataset"]) for f in facts}):
        parts.append(f"## {escape(DATASETS.get(dataset, dataset))}\n")
        mine = [t for t in shown if t.setting.dataset == dataset]
        sigmas = {sigma_of(t, stated) for t in mine} | {str(f["sigma"]) for f in facts if f["dataset"] == dataset}
        for sigma in sorted(sigmas, key=lambda s: (s in published_page.SIGMAS and not s[0].isdigit(), s)):
            title = published_page.SIGMAS.get(sigma, f"sigma {sigma}")
            blocks = [ours(t, studies, said) for t in mine if sigma_of(t, stated) == sigma]
            blocks += filter(None, [theirs(facts, dataset, sigma)])
            if blocks:
                parts.append(f"### {escape(DATASETS.get(dataset, dataset))}, {title}\n\n" + "\n".join(blocks))
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, default=REPORTS)
    parser.add_argument("--out", type=Path, default=REPORTS / "leaderboard")
    args = parser.parse_args(argv)
    try:
        text = page(args.reports)
    except BenchError as e:
        raise SystemExit(f"leaderboard: {e}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "report.md", text)
    print(f"wrote {args.out / 'report.md'}")


if __name__ == "__main__":
    main()
