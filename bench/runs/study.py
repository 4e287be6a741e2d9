"""Study files: a list of runs with shared defaults, in TOML (docs/studies.md).

Keys are the options of ``bench run`` that decide what is certified, without dashes in front: shared ones at the top,
those of one run in its table ``[[run]]``.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench.errors import BenchError, note, unknown
from bench.io import limits
from bench.io.files import write_text, writing
from bench.options import RunOptions, flag
from bench.records.study import LARGEST
from bench.runs.plan import Plan, make_plans
from bench.runs.remarks import remarks

_KEYS = {flag(one).removeprefix("--"): one for one in fields(RunOptions)}
_OF_A_RUN = ("defenses", "settings", "search")  # in a saved file: in the table of the run
_KINDS = {"int": "a whole number", "float": "a number"}


@dataclass(frozen=True)
class StudyFile:
    """A study file: its text, and the options of each ``[[run]]``."""

    path: Path
    text: str
    runs: list[RunOptions]

    def plans(self) -> list[Plan]:
        """Make the plans of all runs, each once. Raises BenchError naming the file and the table."""
        plans: list[Plan] = []
        keys: list[Plan] = []
        said: list[str] = []
        for number, options in enumerate(self.runs, 1):
            where = f"{self.path}: [[run]] {number}"
            try:
                made = make_plans(options)
                said += remarks(made)
            except BenchError as e:
                raise BenchError(f"{where}: {e}") from None
            new = [plan for plan in made if _key(plan) not in keys]
            if len(new) < len(made):
                note(f"{where}: {len(made) - len(new)} of its {len(made)} runs are in the study already; done once")
            plans += new
            keys += [_key(plan) for plan in new]
        for text in dict.fromkeys(said):
            note(text)
        return plans


def _key(plan: Plan) -> Plan:
    """Return what two plans of the same run have in common, however their options were written."""
    given = plan.options
    examples = given.examples if plan.split != "test" else None  # see identity.examples
    kept = RunOptions(defenses="", dataset="", base=given.base, train_sigma=given.train_sigma, examples=examples)
    return replace(plan, options=kept)


def read(path: Path) -> StudyFile:
    """Read a study file. Raises BenchError naming the file, the table and the key that is wrong."""
    try:
        text = limits.contents(path, LARGEST).decode()
        found = tomllib.loads(text)
    except OSError as e:
        raise BenchError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # of tomllib, and of int and datetime on impossible values
        raise BenchError(f"{path}: not TOML: {e}") from None
    tables = found.pop("run", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise BenchError(f"{path}: run: write [[run]], a table for each run")
    if not tables:
        raise BenchError(f"{path}: no runs; write a table [[run]] for each, with defense = ...")
    defaults = _options(f"{path}: defaults", found)
    runs = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[run]] {number}"
        values = defaults | _options(where, table)
        for one in fields(RunOptions):
            if one.default is MISSING and one.name not in values:
                raise BenchError(
                    f"{where}: no {flag(one).removeprefix('--')}; give it there or above the first [[run]]"
                )
        runs.append(RunOptions(**values))
    return StudyFile(path, text, runs)


def _options(where: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the keys of a table into fields of RunOptions. Raises BenchError naming the key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        known = _KEYS.get(key.replace("_", "-"))
        if known is None:
            raise BenchError(
                f"{where}: {unknown('key', key, _KEYS)}; keys are the options that decide what is certified"
            )
        if known.name in found:
            raise BenchError(f"{where}: {key}: given twice")
        found[known.name] = _value(f"{where}: {key}", known, value)
    return found


def _value(where: str, one: Field[Any], value: Any) -> Any:
    """Return a value of TOML as the field of an option has it."""
    type_ = str(one.type).removesuffix(" | None")
    if type_ in _KINDS:
        if isinstance(value, bool) or not isinstance(value, int if type_ == "int" else (int, float)):
            raise BenchError(f"{where}: must be {_KINDS[type_]}, not {_shown(value)}")
        return value if type_ == "int" else float(value)
    words = value if isinstance(value, list) else [value]
    takes: tuple[type, ...] = (str, int, float) if one.metadata["numbers"] else (str,)
    several = one.metadata["several"] or type_ != "str"
    if (isinstance(value, list) and not several) or any(isinstance(w, bool) or not isinstance(w, takes) for w in words):
        kind = "text or a number" if one.metadata["numbers"] else "text"
        raise BenchError(f"{where}: must be {kind}{', or a list of them' if several else ''}, not {_shown(value)}")
    return ",".join(map(str, words)) if type_ == "str" else tuple(words)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def save(options: RunOptions, path: Path) -> None:
    """Write options as a study file. Raises BenchError where another file would be overwritten."""
    text = _toml(options)
    with writing(path, "choose another file with --save-study"):
        if path.exists():
            if path.is_file() and limits.contents(path, LARGEST) == text.encode():
                return
            raise BenchError(f"--save-study {path}: another file is there; choose another name, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _toml(options: RunOptions) -> str:
    """Write options that differ from their defaults; what is of one run alone comes in its table."""
    shared: list[str] = []
    own: list[str] = []
    for one in fields(RunOptions):
        value = getattr(options, one.name)
        if value is None or value == one.default:
            continue
        line = f"{flag(one).removeprefix('--')} = {_literal(one, value)}"
        (own if one.name in _OF_A_RUN else shared).append(line)
    text = "\n".join([*shared, "", "[[run]]", *own]) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BenchError(
            "--save-study: an option is not UTF-8, as a study file must be; rename what it names"
        ) from None
    return text


def _literal(one: Field[Any], value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_text(word) for word in value)}]"
    if not isinstance(value, str):
        return repr(value)  # inf and nan are written alike in Python and TOML
    words = [word.strip() for word in value.split(",") if word.strip()] if one.metadata["several"] else [value]
    written = [_number(word) if one.metadata["numbers"] else _text(word) for word in words]
    return written[0] if len(written) == 1 else f"[{', '.join(written)}]"


def _number(word: str) -> str:
    """Write a number as such where reading it gives the same one, anything else as text."""
    if word.isascii() and word.isdecimal() and word == (word.lstrip("0") or "0"):
        return word
    try:
        return repr(float(word)) if re.search("[.eE]", word) else _text(word)
    except ValueError:
        return _text(word)


def _text(word: str) -> str:
    # A string of JSON is one of TOML, but for the control character that JSON leaves as it is.
    return json.dumps(word, ensure_ascii=False).replace("\x7f", "\\u007f")
