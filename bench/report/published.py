"""Published certified accuracies (reports/published.csv, each with its source), shown beside ours, never among them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import pandas as pd

from bench.records.record import Record

CHECKOUT = Path(__file__).parents[2] / "reports" / "published.csv"


def rows() -> pd.DataFrame:
    """All published facts, as text; the columns are the file's."""
    if CHECKOUT.exists():
        return pd.read_csv(CHECKOUT, dtype=str, keep_default_na=False)
    with resources.as_file(resources.files("certbench_cards") / "published.csv") as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def beside(record: Record) -> pd.DataFrame:
    """What was published for a table's data set at its sigma, or as an envelope over sigma: a row a method and setting.

    Columns are text: method, a percentage for each of the table's radii, and what differs from our runs. Empty
    where nothing was published, which of validation images is never.
    """
    identity, radii = record.identity, [f"{r:g}" for r in record.info.radii]
    if identity.split != "test":
        return pd.DataFrame()
    found = rows()
    found = found[(found["dataset"] == identity.dataset) & (found["metric"] == "certified_accuracy")]
    sigma = pd.to_numeric(found["sigma"], errors="coerce")
    found = found[(sigma == identity.sigma) | (found["sigma"] == "envelope")]
    out = []
    keys = ["paper", "arxiv", "method", "sigma", "inputs", "n", "alpha", "source"]
    for key, part in found.groupby(keys, sort=False):
        paper, arxiv, method, at, inputs, n, alpha, source = key
        values = {f"{float(r):g}": v for r, v in zip(part["radius"], part["value"], strict=True)}
        if not set(values) & set(radii):
            continue
        noise = "best sigma for each radius" if at == "envelope" else f"sigma {at}"
        out.append(
            {
                "published": f"{method} ({paper}, arXiv {arxiv})",
                **{r: f"{values[r]}%" if r in values else "" for r in radii},
                "differs from ours": f"its own base; {inputs} images; n {n}, alpha {alpha}; {noise}; {source}",
            }
        )
    return pd.DataFrame(out)


def heading(records: Sequence[Record]) -> str:
    """The line above published rows."""
    identity = records[0].identity
    base = identity.base.name if identity.base else "not stated"
    return (
        "Published for the same data set, by others: not comparable with the rows above "
        f"(ours: {len(identity.indices)} images, n {identity.sampling.n:,}, "
        f"alpha {identity.sampling.alpha:g}, base {base})."
    )
