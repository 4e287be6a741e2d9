"""Published certified accuracies (reports/published.csv, each with its source), shown below our tables."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pandas as pd

from bench.report.rows import Setting

CHECKOUT = Path(__file__).parents[2] / "reports" / "published.csv"
ADDED = ("guarantee", "checked")  # columns that files written for certbench 0.3 and before do not have


def facts(file: Path | None = None) -> pd.DataFrame:
    """Read all published facts of a file, by default certbench's, as text; the columns are the file's and ``ADDED``."""
    if file is None and not CHECKOUT.exists():
        with resources.as_file(resources.files("certbench_cards") / "published.csv") as packaged:
            return facts(packaged)
    found = pd.read_csv(file or CHECKOUT, dtype=str, keep_default_na=False)
    return found.assign(**{name: "not stated" for name in ADDED if name not in found})


def rows_for(setting: Setting) -> pd.DataFrame:
    """Select what was published for a table's data set, at its sigma or the best for each radius, or without noise.

    Columns are text: method, a percentage for each of the table's radii, and what differs from our runs; a row a
    method and setting. Empty where nothing was published, as for validation images.
    """
    if setting.split != "test":
        return pd.DataFrame()
    radii, found = [f"{r:g}" for r in setting.radii], facts()
    found = found[(found["dataset"] == setting.dataset) & (found["metric"] == "certified_accuracy")]
    sigma = pd.to_numeric(found["sigma"], errors="coerce")
    found = found[(sigma == setting.sigma) | found["sigma"].isin(["envelope", "none"])]
    out = []
    keys = ["paper", "arxiv", "method", "sigma", "inputs", "n", "alpha", "guarantee", "checked", "source"]
    for key, part in found.groupby(keys, sort=False):
        paper, arxiv, method, at, inputs, n, alpha, guarantee, checked, source = key
        values = {f"{float(r):g}": _percent(v) for r, v in zip(part["radius"], part["value"], strict=True)}
        if not set(values) & set(radii):
            continue
        noise = {"envelope": "best sigma for each radius", "none": "no noise"}.get(str(at), f"sigma {at}")
        votes = "no votes" if n == "none" else f"n {n}, alpha {alpha}"
        out.append(
            {
                "published": f"{method} ({paper}, arXiv {arxiv})",
                **{r: values.get(r, "") for r in radii},
                "differs from ours": "; ".join(
                    ["its own base", f"{inputs} images", votes, noise, str(guarantee), str(checked), str(source)]
                ),
            }
        )
    return pd.DataFrame(out)


def _percent(value: str) -> str:
    """Return a percentage as published, and with one decimal where the file has more."""
    return f"{value if len(value.partition('.')[2]) < 2 else f'{float(value):.1f}'}%"


def heading(setting: Setting) -> str:
    """Introduce the published rows and name our setting."""
    return (
        "Published by others for the same data set; not comparable with the rows above "
        f"(ours: {setting.images} images, n {setting.n:,}, alpha {setting.alpha:g}, base {setting.base})."
    )
