"""Write docs/reference/ from the code: commands, settings of defenses, and keys of cards.

    python scripts/docs_reference.py

A test compares the pages with what this would write.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import typer.main
from pydantic.dataclasses import is_pydantic_dataclass

import bench.cli
from bench import plugins
from bench.cli.app import app
from bench.data import sources
from bench.data.card import Card, Preset, Recipe
from bench.data.datasets import card_files, load_card
from bench.runs import describe

PAGES = Path(__file__).parent.parent / "docs" / "reference"
SETTINGS_OF = "cifar10"  # the card whose presets the page of settings shows
MADE = "<!-- Made by make reference (scripts/docs_reference.py) from the code: change the code, not this page. -->"


def cell(value: object) -> str:
    """Return a text for a cell of a table."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").strip()


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


# ---- commands


def commands() -> str:
    """Return the page of commands."""
    group = typer.main.get_command(app)
    parts = [
        "# Commands",
        MADE,
        "`bench COMMAND --help` prints the same. Exit codes: 0 done; 1 a check failed or regressed; 2 wrong usage,\n"
        "a missing prerequisite or a fault; 3 not comparable; 130 interrupted.",
    ]
    for name in sorted(group.commands):  # type: ignore[attr-defined]  # a group
        command = group.commands[name]  # type: ignore[attr-defined]
        if not command.hidden:
            parts.append(_command(name, command))
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(["bench", name, *(_usage(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"## bench {name}", inspect.cleandoc(command.help or ""), f"    {usage}"]
    if arguments:
        rows = [(f"`{p.name.rstrip('_').upper()}`", cell(p.help or ""), _default(p)) for p in arguments]
        parts.append(table(("argument", "meaning", "default"), rows))
    if options:
        rows = [(_flags(p), cell(p.help or ""), _default(p)) for p in options]
        parts.append(table(("option", "meaning", "default"), rows))
    return "\n\n".join(part for part in parts if part)


def _usage(argument: Any) -> str:
    word = argument.name.rstrip("_").upper() + ("..." if argument.nargs == -1 else "")
    return word if argument.required else f"[{word}]"


def _flags(option: Any) -> str:
    value = "" if option.is_flag else " VALUE"  # versions of typer name types differently
    return ", ".join(f"`{flag}{value}`" for flag in [*option.opts, *option.secondary_opts])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default in (None, False, ()) or getattr(parameter, "secondary_opts", []):
        return ""
    return f"`{cell(parameter.default)}`"


# ---- settings of defenses


def settings() -> str:
    """Return the page of settings."""
    card = load_card(SETTINGS_OF)
    parts = [
        "# Settings of defenses",
        MADE,
        f"`--set key=value` sets one, for one defense `--set lora.rank=4`. Defaults are those of the presets of\n"
        f"`{card.name}`: {', '.join(card.presets)}; one value stands for all. For another card, and what a vote costs\n"
        f"there: `bench show DEFENSE --dataset NAME`. [Fidelity](../fidelity.md) compares `paper` with the papers.",
    ]
    return "\n\n".join([*parts, *(_defense(name, card) for name in plugins.names())]) + "\n"


def _defense(name: str, card: Card) -> str:
    cls, _ = plugins.load(name)
    config = cls.Config()
    facts = [f"needs of the base: {cls.needs(config).name.lower()}", f"trains: {cls.kind(config)}"]
    if cls.paper:
        facts.append(f"[arXiv {cls.paper}](https://arxiv.org/abs/{cls.paper})")
    about = re.sub(r"\s+", " ", (inspect.getdoc(cls) or "").partition("\n\n")[0])
    rows = [
        (f"`{s.name}`", cell(s.takes), _by_preset(s.defaults), cell(s.meaning))
        for s in describe.settings(name, cls, card)
    ]
    body = table(("setting", "takes", "default", "meaning"), rows) if rows else "It has no settings."
    return "\n\n".join([f"## {name}", about, "; ".join(facts) + ".", body])


def _by_preset(defaults: dict[str, Any]) -> str:
    presets: dict[str, list[str]] = {}  # by value
    for preset, value in defaults.items():
        presets.setdefault(_value(value), []).append(preset)
    if len(presets) == 1:
        return next(iter(presets))
    return "; ".join(f"{', '.join(names)} {value}" for value, names in presets.items())


def _value(value: object) -> str:
    return '`""`' if value == "" else f"`{value:g}`" if isinstance(value, float) else f"`{cell(value)}`"


# ---- cards


def cards() -> str:
    """Return the page of a card's keys and of the cards that certbench ships."""
    parts = [
        "# Keys of cards",
        MADE,
        "A card is a TOML file that describes a data set. [Data formats](../data.md) says how pictures are read, and\n"
        "[Add a data set](../add-a-defense.md#a-data-set-in-twelve-lines) has an example. `bench show ./card.toml`\n"
        "prints what a card means.",
        "## The card",
        _keys(Card, {"home"}),
        "## `[source]`",
        "`reader` says which keys there are.",
    ]
    stored = {f.name for f in fields(sources.Stored)}
    parts += ["All readers but `sklearn:digits` have", _keys(sources.Stored)]
    for cls in (sources.Folder, sources.Parquet, sources.Csv):
        keys = _keys(cls, {"reader", *stored})
        parts += [f'### reader = "{cls.__name__.lower()}"', inspect.getdoc(cls) or "", keys]
    parts += ["## `[corruptions]`", inspect.getdoc(sources.Corruptions) or "", _keys(sources.Corruptions)]
    parts += ["## `[presets.NAME]`", _keys(Preset), "## `[bases.NAME]`", _keys(Recipe)]
    parts += ["The keys of a `schedule` are in [Bases](../bases.md#recipes).", "## Cards that certbench ships"]
    for name in card_files():
        shown = json.loads(_printed("show", name, "--json"))
        facts = [(cell(k.replace("_", " ")), cell(v)) for k, v in shown.items() if isinstance(v, str) and v]
        presets = [{k: v for k, v in row.items() if v != ""} for row in shown["presets"]]
        columns = [k for k in shown["presets"][0] if any(k in row for row in presets)]
        parts += [
            f"### {name}",
            table(("", ""), facts),
            table(columns, ([cell(row.get(k, "")) for k in columns] for row in shown["presets"])),
            table(("base", "model", "summary"), ([cell(v) for v in row.values()] for row in shown["bases"])),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _keys(cls: type, without: Iterable[str] = ()) -> str:
    assert is_pydantic_dataclass(cls)
    meanings = describe.meanings(cls)
    rows = [
        (f"`{f.name}`", _key_default(f), cell(meanings.get(f.name, ""))) for f in fields(cls) if f.name not in without
    ]
    return table(("key", "default", "meaning"), rows)


def _key_default(one: Any) -> str:
    if one.default is not MISSING:
        return "" if one.default in ("", (), None) else f"`{cell(json.dumps(one.default))}`"
    return "required" if one.default_factory is MISSING else ""


def _printed(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        bench.cli.main(list(words))
    return out.getvalue()


WRITERS = {"cli.md": commands, "settings.md": settings, "cards.md": cards}

if __name__ == "__main__":
    for file, write in WRITERS.items():
        (PAGES / file).write_text(write(), encoding="utf-8")
        print(f"wrote {PAGES / file}", file=sys.stderr)
