"""Draw reports/published/: certified accuracy against radius per sigma, published rows with ours beside them.

Called by ``scripts/published.py page``. Every number is of published.csv or of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.io.files import replacing, write_text
from bench.records import metrics
from bench.report import published
from bench.report.figures import drawn_radii
from bench.report.looks import COLOURS, MARKERS, STYLES
from bench.report.tables import Report
from bench.text import escape

DATASETS = {"cifar10": "CIFAR-10", "imagenet": "ImageNet"}
SIGMAS = {"0.25": "sigma 0.25", "0.5": "sigma 0.5", "1.0": "sigma 1.0"}
SIGMAS |= {"envelope": "best sigma for each radius", "none": "deterministic, no noise"}
PROBABILISTIC = "probabilistic at alpha"
DRAWN = 3  # rows of ours in a panel
INTRO = """\
# Published certified accuracies, and ours

Made by `python scripts/published.py page [RUNS ...]` from [published.csv](../published.csv){ours}. The tables give
percentages of test images that are predicted right with a certified l2 radius of at least r (pixels in [0, 1]). Rows
differ in base network, training data, images, n and alpha, so no row says that its method is better than another's.

- *probabilistic at alpha*: each image's certificate is wrong with probability at most alpha. *deterministic*: it holds
  with certainty; the accuracy at r = 0 is then the clean accuracy.
- *checked*: how the numbers were checked here. Logs print radii to two or three digits, rounded up or down, which moves
  an accuracy recomputed from them by some images at most.
- *best sigma for each radius*: chosen on test images where the source does not say otherwise.
- n and alpha *inferred*: no log states them; they give the largest radius in it.
- In the figures a line has the value of the next larger radius at hand, where at most as much is certified.{bands}
"""


@dataclass(frozen=True)
class Curve:
    """One method at one sigma: values are percentages by radius; bounds are those of a 95% interval, ours only."""

    name: str
    values: dict[float, float]
    about: tuple[str, ...]  # images, n, alpha, guarantee, checked, source
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def write(ours: Report | None, out: Path) -> list[Path]:
    """Write report.md and a figure for each data set into ``out``; return the files."""
    out.mkdir(parents=True, exist_ok=True)
    facts = published.facts().to_dict("records")
    drawn = {
        dataset: {s: [*curves(facts, dataset, s), *(our_curves(ours, dataset, s) if ours else [])] for s in SIGMAS}
        for dataset in DATASETS
    }
    with_ours = any(c.low for panels in drawn.values() for found in panels.values() for c in found)
    bands = f" Bands: 95% intervals of ours, of\n  which a panel shows the {DRAWN} best at its smallest radius above 0."
    added = {"ours": " and the records of our runs", "bands": bands}
    text, files = INTRO.format(**(added if with_ours else dict.fromkeys(added, ""))), []
    for dataset, title in DATASETS.items():
        panels = {s: found for s, found in drawn[dataset].items() if found}
        files.append(draw(panels, title, out / f"{dataset}.svg"))
        text += f"\n## {title}\n\n![{title}: certified accuracy against radius]({dataset}.svg)\n"
        for sigma, found in panels.items():
            text += f"\n### {title}, {SIGMAS[sigma]}\n\n{grid(found)}"
    text += "\n## Average certified radius\n\n" + acr(facts)
    write_text(out / "report.md", text)
    return [out / "report.md", *files]


def curves(facts: Sequence[dict[Any, Any]], dataset: str, sigma: str) -> list[Curve]:
    """Return what was published for a data set at a sigma, a curve a method and paper."""

    def key(fact: dict[Any, Any]) -> tuple[str, ...]:
        name = f"{fact['method']} ({fact['paper']}, arXiv {fact['arxiv']})"
        return (name, *(fact[k] for k in ("inputs", "n", "alpha", "guarantee", "checked")))

    # The clean accuracy of a deterministic method is what it certifies at r = 0: it never abstains.
    wanted = [
        f
        for f in facts
        if (f["dataset"], f["sigma"]) == (dataset, sigma)
        and (
            f["metric"] == "certified_accuracy" or (f["metric"], f["guarantee"]) == ("clean_accuracy", "deterministic")
        )
    ]
    found = []
    for (name, *about), part in groupby(sorted(wanted, key=key), key):
        rows = list(part)
        values = dict(sorted((float(f["radius"]), float(f["value"])) for f in rows))
        sources = "; ".join(dict.fromkeys(f["source"] for f in rows))
        found.append(Curve(name, values, (*about, sources)))
    return found


def our_curves(report: Report, dataset: str, sigma: str) -> list[Curve]:
    """Return our methods on the test images of a data set at a sigma, or their best-sigma curves: none here."""
    found = []
    for table in report.tables:
        setting = table.setting
        if (setting.dataset, setting.split) != (dataset, "test") or sigma not in (
            f"{setting.sigma:g}",
            f"{setting.sigma}",
        ):
            continue
        radii = sorted({*drawn_radii(setting), *setting.within})
        votes = f"{setting.n} at most" if setting.grid_only else str(setting.n)
        for method in table.methods:
            rates = metrics.pooled([r.certificates for r in method.records], radii)
            checked = "a record" if len(method.records) == 1 else f"{len(method.records)} records"
            source = ", ".join(r.path.name for r in method.records)
            found.append(
                Curve(
                    f"ours: {method.label} ({setting.base})",
                    {r: 100 * rate.value for r, rate in zip(radii, rates, strict=True)},
                    (str(setting.images), votes, f"{setting.alpha:g}", PROBABILISTIC, checked, source),
                    tuple(100 * rate.low for rate in rates),
                    tuple(100 * rate.high for rate in rates),
                )
            )
    return found


def grid(found: Sequence[Curve]) -> str:
    """Return curves as a table of markdown, at the radii that a published row or a multiple of .25 has."""
    stated = {r for c in found if not c.low for r in c.values}
    radii = sorted(stated or {r for c in found for r in c.values if (4 * r).is_integer()})
    head = ["method", *(f"r = {r:.3g}" for r in radii), "images", "n", "alpha", "guarantee", "checked", "source"]
    cells = [[c.name, *(f"{c.values[r]:.1f}" if r in c.values else "" for r in radii), *c.about] for c in found]
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(map(escape, line))} |\n" for line in lines)


def shown(found: Sequence[Curve]) -> list[Curve]:
    """Return what a panel draws: all published curves, and the ``DRAWN`` of ours that certify most."""
    ours = [c for c in found if c.low]
    best = sorted(ours, key=lambda c: -next((v for r, v in c.values.items() if r > 0), 0.0))[:DRAWN]
    return [*(c for c in found if not c.low), *best]


def draw(panels: dict[str, list[Curve]], title: str, file: Path) -> Path:
    """Draw a panel for each sigma."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings: Any = {"svg.hashsalt": "certbench", "font.size": 7, "lines.linewidth": 1, "lines.markersize": 3}
    with matplotlib.rc_context(settings):
        drawn_in = {sigma: shown(found) for sigma, found in panels.items()}
        rows = 1 + max(map(len, drawn_in.values()))
        size = (3.4 * len(panels), 2.7 + 0.14 * rows)
        fig, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for ax, (sigma, found) in zip(axes[0], drawn_in.items(), strict=True):
            for i, c in enumerate(found):
                radii, values = list(c.values), list(c.values.values())
                mark = "" if c.low else MARKERS[i % len(MARKERS)]
                colour = "black" if c.low else COLOURS[i % 6]  # of the first seven, black is for rows made here
                drawn = {"color": colour, "marker": mark, "label": c.name, "drawstyle": "steps-pre"}
                ax.plot(radii, values, STYLES[i % len(STYLES)], linewidth=1.6 if c.low else 0.8, **drawn)
                if c.low:
                    ax.fill_between(radii, c.low, c.high, color=colour, alpha=0.12, linewidth=0, step="pre")
            ax.set(title=f"{title}, {SIGMAS[sigma]}", xlabel="l2 radius (pixels in [0, 1])", ylim=(0, 100))
            ax.set_xlim(0, None)
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=5.5)
        axes[0][0].set_ylabel("certified accuracy (%)")
        with replacing(file) as partial:
            fig.savefig(partial, metadata={"Date": None})
        plt.close(fig)
    return file


def acr(facts: Sequence[dict[Any, Any]]) -> str:
    """Say where the highest average certified radius of logs stands in accuracy at r = 0, from the rows."""
    lines, places = [], []
    for sigma in SIGMAS:
        rows = [f for f in facts if (f["dataset"], f["sigma"]) == ("cifar10", sigma)]
        radius = {f["method"]: (float(f["value"]), f["arxiv"]) for f in rows if f["metric"] == "acr"}
        if not radius:
            continue
        logs = {arxiv for _, arxiv in radius.values()}
        zero = {f["method"]: float(f["value"]) for f in rows if f["arxiv"] in logs and f["radius"] == "0"}
        best = max(radius, key=lambda m: radius[m][0])
        order = sorted(zero, key=lambda m: zero[m])
        place = order.index(best) + 1
        places.append(-1 if best == order[-1] else place)
        rank = "the lowest" if place == 1 else f"number {place} of {len(order)} from the lowest"
        lines.append(
            f"- {SIGMAS[sigma]}: {best} has the highest ACR, {radius[best][0]:.3f}, and {zero[best]:.1f}% at r = 0, "
            f"{rank} ({order[0]} has {zero[order[0]]:.1f}%); {order[-1]} has the highest, {zero[order[-1]]:.1f}%, at "
            f"an ACR of {radius[order[-1]][0]:.3f}.\n"
        )
    most, least = places.count(-1), places.count(1)
    intro = (
        "The logs in the repository of CAT-RS (CIFAR-10): the method with the highest average certified radius (ACR) "
        f"has the highest accuracy at r = 0 at {most} of {len(places)} noise levels, and the lowest at {least}. ACR is "
        "a mean of radii, so images that are certified far outweigh images that are not certified.\n\n"
    )
    return intro + "".join(lines)
