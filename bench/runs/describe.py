"""The settings of a defense in words: type, default for each preset, meaning; and what a vote costs."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import dataclass, fields
from typing import Any

import torch
from pydantic import TypeAdapter

from bench.data.card import Card
from bench.data.datasets import load_splits
from bench.interface import Defense
from bench.models.arithmetic import deterministic
from bench.models.load import untrained_base
from bench.runs import fitting
from bench.runs.costs import cost_per_vote
from bench.runs.identity import examples, make_task
from bench.runs.plan import Plan
from bench.runs.settings import configured


@dataclass(frozen=True)
class Setting:
    """One field of a defense's Config."""

    name: str
    takes: str  # type and range, in words
    defaults: dict[str, Any]  # by preset
    meaning: str


def settings(name: str, cls: type[Defense], card: Card) -> list[Setting]:
    """Describe every setting, with its default for each preset of the card. Raises BenchError as ``configured``."""
    schema = TypeAdapter(cls.Config).json_schema()
    found = meanings(cls.Config)
    if len(fields(cls.Config)) == 1:  # described by the class
        found = {fields(cls.Config)[0].name: inspect.getdoc(cls.Config) or ""} | found
    made = {preset: configured(name, cls, preset, card, {}) for preset in card.presets}
    return [
        Setting(
            f.name,
            _takes(schema["properties"][f.name]),
            {preset: getattr(config, f.name) for preset, config in made.items()},
            found.get(f.name, ""),
        )
        for f in fields(cls.Config)
    ]


def cost(plan: Plan, device: torch.device) -> tuple[int, float | None]:
    """Return the parameters that training changes, and floating point operations of a vote (None: not countable).

    Of the untrained defense; nothing is trained or timed.
    """
    split, train = load_splits(plan.card, plan.split, "train")
    base = untrained_base(plan.card, plan.base, device, not plan.cls.adapts)
    defense = fitting.construct(plan, base, device)
    trained = fitting.count_parameters(defense)[1]
    with deterministic(), torch.inference_mode(), fitting.attribute_errors(plan.defense, "in the estimate"):
        fitting.merge(defense, train, plan, device)  # as it certifies
        flops = cost_per_vote(defense, make_task(plan, split, device), examples(plan, split)[0]).flops
    return trained, flops


def _takes(schema: dict[str, Any]) -> str:
    """Describe a field's JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_takes(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = {"integer": "whole number", "string": "text", "boolean": "true or false", "null": "none"}
    words = kind.get(schema.get("type", ""), schema.get("type", "any"))
    bounds = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    limits = [form.format(f"{schema[key]:g}") for key, form in bounds.items() if key in schema]
    return " ".join([words, *limits])


def meanings(config: type) -> dict[str, str]:
    """Return the comment on each field's line, or else those on the lines just above it, from the sources."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):  # made without a file
            continue
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (body,) = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        code = {line for node in body.body for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = [comments[at] for at in range(node.lineno, (node.end_lineno or 0) + 1) if at in comments]
                at = node.lineno - 1
                while not lines and at in comments and at not in code:
                    at -= 1
                meaning = " ".join(lines or [comments[n] for n in range(at + 1, node.lineno)])
                if meaning:
                    found[node.target.id] = meaning
    return found
