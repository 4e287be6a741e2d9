"""Tables and figures made of run folders; reads records only, never touches a model.

Runs are put in one table only when they differ in nothing but the defense (and its seed): same
images, base, sigma, n0, n, alpha, procedure. Others get a table of their own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench import metrics
from bench.anytime import procedure_of
from bench.cache import digest
from bench.errors import BenchError
from bench.store import Record, find_runs, read_run

DASH = "—"


def load_records(root: Path) -> tuple[list[Record], list[str]]:
    """The readable complete runs below ``root``, and a line for each that was left out."""
    records, left_out = [], []
    for path in find_runs(root):
        try:
            record = read_run(path)
        except BenchError as e:
            left_out.append(str(e))
            continue
        if record.complete:
            records.append(record)
        else:
            done, all_ = len(record.certificates), len(record.identity["indices"])
            left_out.append(f"{path}: unfinished ({done} of {all_} images); run the same command again to finish it")
    return records, left_out


def comparable(record: Record) -> dict[str, Any]:
    """The part of an identity that must agree for two runs to stand in one table."""
    return {k: v for k, v in record.identity.items() if k not in ("defense", "train_sigma", "seed")}


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """Runs that may stand in one table together, best certified accuracy summed over the grid last settled by name."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_key[digest(comparable(record))].append(record)
    tables = [sorted(g, key=lambda r: (_name(r), r.identity["seed"])) for g in by_key.values()]
    return sorted(tables, key=lambda g: (g[0].identity["dataset"], g[0].identity["sigma"], digest(comparable(g[0]))))


def table(group: Sequence[Record]) -> pd.DataFrame:
    """One row a run, ordered by certified accuracy at the grid's radii; every number from the record."""
    frame = pd.DataFrame([_row(r) for r in group])
    order = [f"certified_{r:g}" for r in group[0].info["radii"]]
    return frame.sort_values([*order, "defense"], ascending=[*[False] * len(order), True], ignore_index=True)


def pooled(group: Sequence[Record]) -> pd.DataFrame:
    """One row a method, ordered as ``table``: seeds of one method pooled, every other number their mean."""
    rows = []
    for records in methods(group):
        row = pd.DataFrame([_row(r) for r in records])
        first = row.iloc[0].to_dict()
        for column in row.select_dtypes("number").columns:
            first[column] = row[column].mean()
        for r in group[0].info["radii"]:
            key = f"certified_{r:g}"
            points = [{"value": x[key], "low": x[f"{key}_low"], "high": x[f"{key}_high"]} for _, x in row.iterrows()]
            found = metrics.pool(points, int(first["images"]))
            first |= {key: found["value"], f"{key}_low": found["low"], f"{key}_high": found["high"]}
        first["seeds"] = len(records)
        rows.append(first)
    frame = pd.DataFrame(rows)
    order = [f"certified_{r:g}" for r in group[0].info["radii"]]
    return frame.sort_values([*order, "defense"], ascending=[*[False] * len(order), True], ignore_index=True)


def methods(group: Sequence[Record]) -> list[list[Record]]:
    """The runs of each method of a table: those that differ in nothing but their seed and what it brings about."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in group:
        defense = record.identity["defense"]
        config = {k: v for k, v in defense["config"].items() if k not in _searched(record)}
        given = record.info["defense"]["weights_file"] and defense["weights"]
        key = [defense["name"], defense["source"], config, defense["objective"], given, record.identity["train_sigma"]]
        found[digest({"method": key})].append(record)
    apart: list[list[Record]] = []
    for records in found.values():
        same = len({r.identity["seed"] for r in records}) == len(records)
        apart += [records] if same else [[r] for r in records]
    return apart


def _searched(record: Record) -> set[str]:
    return {key for tried in record.info["defense"]["search"] for key in tried["values"]}


def _row(record: Record) -> dict[str, Any]:
    info, cost = record.info, record.info["cost"]
    result = metrics.summarise(record.certificates, info["radii"])
    row: dict[str, Any] = {"run": record.path.name, "defense": _name(record), "seed": record.identity["seed"]}
    for point in result["certified_accuracy"]:
        key = f"certified_{point['radius']:g}"
        row |= {key: point["value"], f"{key}_low": point["low"], f"{key}_high": point["high"]}
    row |= {
        "family": info["defense"]["family"],
        "extra_data": ", ".join(info["defense"]["trained_elsewhere"]),
        "images": result["images"],
        "base_clean_accuracy": info["base"]["clean_correct"] / info["base"]["images"],
        "abstained": result["abstained"]["value"] if _selects(record) else None,
        "train_seconds": cost["train_seconds"],
        "certify_seconds": cost["certify_seconds"],
        "votes": cost["votes"],
        "flops_per_vote": cost["flops_per_vote"],
        "trainable_nominal": cost["trainable_nominal"],
        "trainable_updated": cost["trainable_updated"],
        "trained_here": cost["trained_here"],
        "trained_elsewhere": cost["trained_elsewhere"],
        "parameters": cost["parameters"],
        "peak_memory": cost["peak_memory"],
        "acr": result["acr"],
    }
    return row


def _selects(record: Record) -> bool:
    """Whether the run predicts at all: one that tests the known label neither predicts nor abstains."""
    return bool(record.identity["procedure"].get("target", "selected") == "selected")


def heading(record: Record) -> str:
    """What all runs of a table have in common, in one line."""
    identity = record.identity
    p = identity["procedure"]
    selection = f"n0 {p['n0']}, " if p.get("target", "selected") == "selected" else "known label, "
    votes = f"n {p['n']:,}" if p["kind"] == "fixed" else f"anytime up to {p['n']:,} votes"
    return (
        f"{identity['dataset']}, sigma {identity['sigma']:g}: {len(identity['indices'])} {identity['split']} images, "
        f"{selection}{votes}, alpha {p['alpha']:g}, base {identity['base']['name']} "
        f"({identity['base']['sha256'][:8]}), noise {identity['noise']['kind']}"
    )


def markdown(group: Sequence[Record]) -> str:
    """The table of one group in GitHub markdown: percent with 95% intervals, a dash where no radius can reach."""
    frame, radii = pooled(group), group[0].info["radii"]
    reach = _reach(group[0])
    columns: dict[str, list[str]] = {"defense": [_label(row, frame) for _, row in frame.iterrows()]}
    for r in radii:
        key = f"certified_{r:g}"
        title = "smoothed accuracy (r = 0)" if r == 0 else f"certified at r = {r:g}"
        columns[title] = [
            f"{row[key]:.1%} [{row[f'{key}_low']:.1%}, {row[f'{key}_high']:.1%}]" if r <= reach else DASH
            for _, row in frame.iterrows()
        ]
    columns |= {
        "kind": list(frame["family"]),
        "base, clean": [f"{v:.1%}" for v in frame["base_clean_accuracy"]],
        "abstained": [DASH if pd.isna(v) else f"{v:.1%}" for v in frame["abstained"]],
        "train (s)": [f"{v:.1f}" for v in frame["train_seconds"]],
        "certify (s)": [f"{v:.1f}" for v in frame["certify_seconds"]],
        "votes": [f"{v:,.0f}" for v in frame["votes"]],
        "GFLOPs / vote": [DASH if pd.isna(v) else f"{v / 1e9:.4g}" for v in frame["flops_per_vote"]],
        "trained here": [f"{v:,.0f}" for v in frame["trained_here"]],
        "trained elsewhere": [f"{v:,.0f}" for v in frame["trained_elsewhere"]],
        "parameters": [DASH if pd.isna(v) else f"{v:,.0f}" for v in frame["parameters"]],
        "extra data": [v or "no" for v in frame["extra_data"]],
        "peak memory (MB)": [f"{v / 1e6:,.0f}" for v in frame["peak_memory"]],
        "ACR": [f"{v:.3f}" for v in frame["acr"]],
    }
    body = pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True)
    return f"### {heading(group[0])}\n\n{body}\n\n{_limits(group[0], frame)}\n"


def _limits(record: Record, frame: pd.DataFrame) -> str:
    """What the table cannot show, in a sentence or two."""
    within = [r for r in record.info["radii"] if r <= _reach(record)]
    widths = [frame[f"certified_{r:g}_high"] - frame[f"certified_{r:g}_low"] for r in within]
    wide = max((float(w.max()) for w in widths), default=0.0) / 2
    text = (
        f"With {frame['images'].iloc[0]} images an accuracy is known to within {100 * wide:.0f} points at worst "
        f"(brackets: 95% Clopper-Pearson intervals); rows that differ by less are not told apart. "
        f"With these votes no image can be certified beyond r = {_reach(record):.3f} (a dash)."
    )
    if record.identity["noise"]["kind"] == "grid":
        text += " Grid noise: a certificate covers every image of integer pixel values within its radius."
    if record.info["preset"] == "quick":
        text += " Preset quick trains briefly on a small budget: it ranks methods at that budget, not at their papers'."
    return text


def _label(row: pd.Series, frame: pd.DataFrame) -> str:
    """The method's name, with its number of seeds, or its run's hash where the name alone says too little."""
    name = str(row["defense"]).replace("|", "\\|")
    if (frame["defense"] == row["defense"]).sum() == 1:
        return name + (f" ({row['seeds']:.0f} seeds)" if row["seeds"] > 1 else "")
    return f"{name} seed {row['seed']:.0f} ({str(row['run']).rpartition('-')[2]})"


def _name(record: Record) -> str:
    """The defense, the settings and objective that are not its defaults, and what was searched."""
    defense, objective = record.info["defense"], record.identity["defense"]["objective"]
    words = [record.identity["defense"]["name"]]
    words += [k if v is True else f"{k}={v}" for k, v in defense["settings"].items()]
    words += [] if objective in (None, "gaussian") else [f"+ {objective}"]
    searched = sorted(_searched(record))
    return " ".join(words) + (f", {', '.join(searched)} searched" if searched else "")


def _reach(record: Record) -> float:
    """The largest radius that any image of the record could be certified at."""
    identity = record.identity
    return procedure_of(identity).largest_radius(identity["sigma"], identity["noise"].get("tau", 0.0))


def render(records: Sequence[Record], format: str) -> str:
    """All groups as md, csv or json text."""
    tables = groups(records)
    if format == "csv":
        frames = [table(g).assign(table=i) for i, g in enumerate(tables)]
        return str(pd.concat(frames, ignore_index=True).to_csv(index=False)) if frames else ""
    if format == "json":
        out = [{"heading": heading(g[0]), "rows": json.loads(table(g).to_json(orient="records"))} for g in tables]
        return json.dumps({"tables": out}, indent=1) + "\n"
    parts = [markdown(g) for g in tables]
    if len(parts) > 1:
        parts.insert(0, "Each table holds only runs on the same images, base, sigma, n0, n and alpha.\n")
    return "\n".join(parts)


def figure(group: Sequence[Record], out: Path, name: str) -> list[Path]:
    """Certified accuracy against radius with 95% interval bands, as SVG and PNG; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reach = _reach(group[0])
    anytime = group[0].identity["procedure"]["kind"] == "anytime"
    # An anytime radius says nothing between the radii of the grid.
    grid = [r for r in group[0].info["radii"] if r <= reach] if anytime else [reach * i / 200 for i in range(201)]
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    styles = ["-", "--", "-.", ":"]
    order = list(pooled(group)["run"])
    curves = sorted(methods(group), key=lambda m: order.index(m[0].path.name))
    for i, records in enumerate(curves):
        shares = [metrics.summarise(r.certificates, grid)["certified_accuracy"] for r in records]
        points = [metrics.pool(p, len(records[0].certificates)) for p in zip(*shares, strict=True)]
        alone = sum(_name(m[0]) == _name(records[0]) for m in curves) == 1
        label = _name(records[0]) if alone else records[0].path.name
        values, style = [100 * p["value"] for p in points], styles[i % 4]
        (line,) = ax.plot(grid, values, style, color=_colour(i), label=label, marker="o" if anytime else "")
        low, high = [100 * p["low"] for p in points], [100 * p["high"] for p in points]
        ax.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set(xlabel="l2 radius (pixels in [0, 1])", ylabel="certified accuracy (%)", ylim=(0, 100), xlim=(0, None))
    ax.set_title(heading(group[0]), fontsize=7)
    ax.legend(frameon=False, title="bands: 95% interval", title_fontsize=7)
    files = [out / f"{name}{suffix}" for suffix in (".svg", ".png")]
    for file in files:
        fig.savefig(file, dpi=150)
    plt.close(fig)
    return files


def _colour(i: int) -> str:
    # Okabe and Ito's palette: told apart by colour-blind readers; line styles tell apart without colour.
    return ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")[i % 7]


def write(records: Sequence[Record], format: str, out: Path) -> list[Path]:
    """The report and, for markdown, its figures: into the folder ``out``, or to the file where it ends in the format.

    Returns the files written. Raises BenchError where they cannot be.
    """
    report = out if out.suffix == f".{format}" else out / f"report.{format}"
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        text = render(records, format)
        files = [report]
        if format == "md":
            for number, group in enumerate(groups(records), 1):
                identity = group[0].identity
                name = f"{identity['dataset']}-s{identity['sigma']:g}" + (f"-{number}" if number > 1 else "")
                name = f"{out.stem}-{name}" if report == out else name
                files += figure(group, report.parent, name)
                text += f"\n![{heading(group[0])}]({name}.svg)\n"
        report.write_text(text)
    except OSError as e:
        raise BenchError(f"cannot write the report to {out}: {e.strerror}; choose another place with --out") from None
    return files
