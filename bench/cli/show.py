"""The command ``bench show``: a defense, a data set or a run in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.options import AsJson, print_table
from bench.errors import BenchError, shown, unknown

if TYPE_CHECKING:  # these import torch
    from torch import Tensor

    from bench.records.schema import RunInfo

app = typer.Typer(rich_markup_mode=None)


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A defense or ./file.py, a data set or ./card.toml, or a run folder.")],
    dataset: Annotated[str, typer.Option(help="Of a defense: the card whose presets and base are used.")] = "digits",
    as_json: AsJson = False,
) -> None:
    """Show a defense's settings and cost, a data set's card, or what a run is and where its files are."""
    from bench import plugins
    from bench.data.datasets import card_files

    if (Path(what) / "run.json").is_file():
        facts, tables = _run(Path(what))
    elif what.endswith(".toml") or what in card_files():
        facts, tables = _card(what)
    elif what.endswith(".py") or what in plugins.names():
        facts, tables = _defense(what, dataset)
    else:
        raise unknown("defense, data set or run", what, [*plugins.names(), *card_files()])
    if as_json:
        print(json.dumps({**facts, **tables}, indent=1, default=str))
        return
    for key, value in facts.items():
        if value not in (None, "", []):
            print(shown(f"{key.replace('_', ' ')}: {value}"))
    for name, rows in tables.items():
        if rows:
            print(f"\n{name}:")
            print_table(rows, "")


Shown = tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]  # facts, and tables by name


def _defense(name: str, dataset: str) -> Shown:
    import inspect

    from bench.data.card import first_split
    from bench.data.datasets import load_card
    from bench.options import RunOptions
    from bench.process.environment import pick_device
    from bench.runs import describe
    from bench.runs.plan import make_plans

    (plan,) = make_plans(RunOptions(defenses=name, dataset=dataset, split=first_split(load_card(dataset))))
    cls, card = plan.cls, plan.card
    trained, flops = describe.cost(plan, pick_device("auto"))
    count = "operations that cannot be counted" if flops is None else f"{flops / 1e9:.4g} GFLOPs"
    facts = {
        "defense": name,
        "what_it_is": (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " "),
        "kind": f"{cls.family}, {cls.kind(plan.config)}",
        "paper": f"https://arxiv.org/abs/{cls.paper}" if cls.paper else "",
        "needs_of_the_base": cls.needs(plan.config).name.lower(),
        "cost": f"on {card.name} at preset {plan.preset}: {trained:,} parameters trained here, {count} a vote",
    }
    rows = [
        {"setting": s.name, "takes": s.takes, **{k: _value(v) for k, v in s.defaults.items()}, "meaning": s.meaning}
        for s in describe.settings(name, cls, card)
    ]
    return facts, {"settings": rows}


def _value(value: object) -> object:
    return '""' if value == "" else f"{value:g}" if isinstance(value, float) else value


def _card(name: str) -> Shown:
    from dataclasses import asdict

    from bench.cli import listing
    from bench.data.datasets import load_card

    card = load_card(name)
    facts: dict[str, Any] = {
        "data_set": card.name,
        "shape": "x".join(map(str, card.shape)) + f" (channels, height, width), {card.levels} levels",
        "classes": f"{len(card.classes)}: {', '.join(card.classes[:20])}{', ...' if len(card.classes) > 20 else ''}",
        "source": ", ".join(f"{k} {_source(v)}" for k, v in asdict(card.source).items() if v),
        "splits": ", ".join(listing.splits(card)),
        "cut_from_train": ", ".join(f"{size:,} for {part}" for part, size in card.splits.items()),
        "radii": ", ".join(f"{r:g}" for r in card.radii),
        "augment": ", ".join(card.augment),
        "mean_and_std": f"{_numbers(card.mean)}; {_numbers(card.std)}",
        "preset_without_option": card.preset,
    }
    presets = [
        {"preset": name, **{k: v for k, v in asdict(p).items() if k != "better_base"}}
        for name, p in card.presets.items()
    ]
    bases = [{"base": name, "model": b.model, "summary": b.summary} for name, b in card.bases.items()]
    return facts, {"presets": presets, "bases": bases}


def _source(value: object) -> str:
    if isinstance(value, dict):  # parts, or the rows of one by column
        return "(" + "; ".join(f"{key} {_source(inner)}" for key, inner in value.items()) + ")"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:.4g}" for v in values)


def _run(folder: Path) -> Shown:
    from bench.options import command
    from bench.records.grouping import common, method_name
    from bench.records.record import read_run
    from bench.training import weights

    record = read_run(folder)
    if record.imported:
        raise BenchError(f"{folder} is an imported log; bench report shows what it states")
    info, identity = record.info, record.identity
    trained = identity.defense.weights
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    facts = {
        "run": folder.name,
        "status": info.status if record.complete else f"{info.status}, {len(record.certificates)} images certified",
        "method": method_name(record),
        "setting": f"{identity.dataset}, sigma {identity.sigma:g}, {common(record)}",
        "seed": identity.seed,
        "made_by": f"certbench {info.environment.certbench} on {info.environment.device}",
        "weights": _place(trained, weights.stored(trained)) if trained else "none of its own",
        "base_weights": _base_weights(info),
        "again": command(info.arguments),
    }
    return facts, {"files": [{"file": str(f), "bytes": f"{f.stat().st_size:,}"} for f in files]}


def _base_weights(info: RunInfo) -> str:
    """Say where the weights of a run's base are: in the cache if they were trained here, or where they came from."""
    from bench.models.base import local_sha256
    from bench.training import weights

    sha256, base = info.base_sha256, info.identity.base
    if sha256 is None or base is None or info.base is None:
        return "not known"
    source = info.base.source
    if source.get("kind") != "trained here":
        said = [str(source[key]) for key in ("kind", "id", "server", "file", "revision") if source.get(key)]
        return f"{sha256[:16]}..., {' '.join(said)}"
    architecture = {key: value for key, value in base.as_json().items() if key not in ("name", "sha256")}

    def wanted(tensors: Mapping[str, Tensor]) -> bool:
        return local_sha256(tensors, architecture) == sha256

    return _place(sha256, weights.stored_where(f"{info.identity.dataset}-base-{base.name}", wanted))


def _place(sha256: str, found: Path | None) -> str:
    return f"{sha256[:16]}... in {found}" if found else f"{sha256[:16]}..., not in this cache"
