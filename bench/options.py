"""Options of ``bench run`` that decide what is certified."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from bench.errors import BenchError


def option(help: str, default: Any = MISSING, flag: str | None = None, **details: Any) -> Any:
    """Make a dataclass field that is an option of the command line.

    ``help`` is its text for ``--help``; ``flag`` its name, by default the field's. Details: ``metavar`` stands for its
    value, ``minimum`` is the least one, and ``positional`` makes it an argument without a flag. Of a text: ``several``
    values may stand in it, with commas between, and ``numbers`` says that they are numbers.
    """
    metadata: dict[str, Any] = {"help": help, "flag": flag, "metavar": None, "minimum": None, "positional": False}
    metadata |= {"several": False, "numbers": False, **details}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def flag(one: Field[Any]) -> str:
    """Return the name of an option on the command line."""
    return one.metadata["flag"] or f"--{one.name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options as given, unchecked: ``runs.plan.make_plans`` turns them into runs.

    A record keeps the options of its run under ``arguments``, so that the run can be repeated.
    """

    defenses: str = option(
        "Names or ./file.py, with commas between, or all that the card has a base for.", flag="--defense", several=True
    )
    dataset: str = option("A card's name or ./card.toml.")
    sigma: str = option(
        "Noise of the certificate, in pixels of [0, 1]; several with commas.", ".25", several=True, numbers=True
    )
    train_sigma: float | None = option("Noise while training; default: sigma.", None)
    base: str | None = option(
        "The card's recipe, timm:MODEL, hf-hub:OWNER/NAME, a .safetensors file, a folder or "
        "http://HOST/v2/models/NAME; default: the card's for the preset.",
        None,
    )
    mean: str | None = option(
        "Mean of each channel, with commas, that --base FILE was trained with; for a file that states none.",
        None,
        several=True,
        numbers=True,
    )
    std: str | None = option(
        "Standard deviation of each channel, with commas; see --mean.", None, several=True, numbers=True
    )
    weights: str | None = option(
        "Certify these weights of the defense (of the base, for none), or for lora a folder of peft; train nothing.",
        None,
        metavar="<path>",
    )
    preset: str | None = option("A preset of the card: quick, standard, paper, ...; default: the card's.", None)
    split: str = option(
        "test, or a named test part of the card (test-ood); validation, to choose sigma by; train, to measure "
        "overfitting. Splits never share a table.",
        "test",
    )
    examples: str | None = option("N images, class-balanced, or every:K.", None, numbers=True)
    n0: int | None = option("Votes that select the class, per image.", None)
    n: int | None = option("Votes that bound the probability, per image.", None)
    alpha: float = option("Failure probability of each certificate.", 0.001)
    procedure: str = option(
        "fixed: n votes an image (Cohen et al.); anytime: stop as soon as the answer is known.", "fixed"
    )
    target: str = option(
        "selected: the class chosen on n0 votes; label: test the known label directly; correct: chosen, and stop "
        "where it is not the label.",
        "selected",
    )
    radii: str | None = option(
        "Radii of the table, l2 in pixels of [0, 1], with commas; 0 is always one. Anytime certifies at these alone. "
        "Default: the card's.",
        None,
        several=True,
        numbers=True,
    )
    noise: str = option(
        "grid: rounded to the pixel grid, sound in floating point; float: as published numbers.", "grid"
    )
    arithmetic: str = option(
        "How logits are computed when certifying: float32, bfloat16 or tf32; channels-last; compile; several "
        "with commas. Each makes another classifier, named in tables.",
        "float32",
        several=True,
    )
    seed: str = option("Seed of training and noise; several with commas.", "0", several=True, numbers=True)
    objective: str = option(
        "Training objective: gaussian, stability, consistency, dign, smoothadv, smoothadv-ddn, macer, smoothmix or "
        "catrs.",
        "gaussian",
    )
    settings: tuple[str, ...] = option(
        "[defense.]key=value; several values: a run for each. Repeatable.", (), flag="--set"
    )
    search: tuple[str, ...] = option(
        "[defense.]key=value,value: train with each, keep the most accurate under noise on the "
        "validation split. Repeatable.",
        (),
    )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> RunOptions:
        """Read the arguments of a record. Raises BenchError naming the first that ``bench run`` does not take."""
        if unknown := sorted(arguments.keys() - {one.name for one in fields(cls)}):
            raise BenchError(f"arguments: {unknown[0]}: bench run has no such option")
        from pydantic import TypeAdapter, ValidationError  # here, so that bench --help need not load it

        try:
            return TypeAdapter(cls).validate_json(json.dumps(arguments), strict=True)
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            raise BenchError(f"arguments: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def record(self) -> dict[str, Any]:
        """Return the options as a record keeps them, JSON-able."""
        return asdict(self) | {"settings": list(self.settings), "search": list(self.search)}

    def command(self, *more: str) -> str:
        """Return the command line of these options, with more words at its end."""
        return command(self.record(), *more)


def command(arguments: Mapping[str, Any], *more: str) -> str:
    """Return the command line of a record's arguments, without defaults and without what the record lacks."""
    words = ["bench", "run"]
    for one in fields(RunOptions):
        value = arguments.get(one.name)
        if value is None or value == one.default or value == []:
            continue
        for single in value if isinstance(value, list) else [value]:
            words += [flag(one), str(single)]
    return shlex.join([*words, *more])
