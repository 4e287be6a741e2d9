"""Fuzz cards and released logs."""

from __future__ import annotations

import json
import math
import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bench.data.datasets import card_files, load_card
from bench.models.names import blueprint
from bench.options import RunOptions
from bench.records.flaws import LogParameters
from bench.records.importing import import_log
from bench.records.verify import check_record
from bench.runs.plan import make_plans
from tests.fuzz.judging import changed, cut, cuts, edits, judge, scratch

# Cards -----------------------------------------------------------------------------------------------

CARDS = [tomllib.loads(file.read_text()) for file in card_files().values()]
CARDS.append(
    {
        "name": "mine",
        "shape": [3, 8, 8],
        "classes": 3,
        "source": {"reader": "folder", "folder": "data", "train": "a", "test": "b", "resize": 9},
        "presets": {"quick": {"examples": "every:3", "n0": 10, "n": 100, "base": "vit", "transfer_base": "vit"}},
        "bases": {"vit": {"model": "vit_tiny_patch16_224", "schedule": {"epochs": 1}, "args": {"img_size": [8, 8]}}},
    }
)


def toml(value: Any) -> str:
    """Write a JSON value as one line of TOML; None, which TOML lacks, as an empty string."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return '""' if value is None else json.dumps(value)


def _use_card(data: bytes) -> None:
    with scratch() as folder:
        (folder / "card.toml").write_bytes(data)
        (folder / "data" / "a").mkdir(parents=True)

        def read() -> None:
            card = load_card(str(folder / "card.toml"))
            assert len(card.classes) >= 2 and card.radii and math.prod(card.shape) > 0
            assert all(map(math.isfinite, (*card.mean, *card.std, *card.radii)))
            card.sha256()
            for name in card.bases:
                blueprint(card, name)
            (plan,) = make_plans(
                RunOptions(defenses="none", dataset=str(folder / "card.toml"), base=next(iter(card.bases)))
            )
            assert plan.procedure.max_votes > 0

        judge("card", read)


@given(st.sampled_from(CARDS), edits, cuts)
def cards(card: dict[str, Any], changes: list[Any], torn: list[Any]) -> None:
    """Read a card with changed keys and damaged text."""
    text = "\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in changed(card, changes).items())
    _use_card(cut(text.encode(errors="surrogatepass"), torn))


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode(errors="surrogatepass")))
def random_cards(data: bytes) -> None:
    """Read random bytes as a card."""
    _use_card(data)


# Released logs ---------------------------------------------------------------------------------------

COHEN = [["idx", "label", "predict", "radius", "correct", "time"]]
COHEN += [[str(10 * i), str(i % 10), str(i % 10), f"0.{i}17", "1", "0:00:15.42"] for i in range(12)]
_ADAPTIVE = [["idx", "label", "predict", "radius proved", "correct", "levels_needed", "samples_needed", "time"]]
_ADAPTIVE += [[str(i), "3", "3", "-1" if i % 3 else "1", "1", "0", "1100", "0.4"] for i in range(12)]
_CHEN = [["idx", "label", "predict", "pA", "samplesize", "radius", "correct", "time_forward"]]
_CHEN += [[str(i), "3", "3", "0.9", "1000", "0.21", "1", "1.5"] for i in range(12)]
FIELDS = [
    "1e999",
    "-1e-999999999",
    "nan",
    "sNaN",
    "Infinity",
    "9" * 5000,
    "1_0",
    "٣",
    "0x1",
    "-1",
    "1 day, 0:00:61",
    "\x00",
]
LOGS = [(COHEN, "cohen", None), (_ADAPTIVE, "adaptive", 0.25), (_CHEN, "adaptive", None)]
fields = edits | st.lists(
    st.tuples(st.integers(0, 2**16), st.just("replace"), st.sampled_from(FIELDS)), min_size=1, max_size=4
)


def _use_log(data: bytes, stated: LogParameters) -> None:
    with scratch() as folder:
        (folder / "log.tsv").write_bytes(data)

        def read() -> None:
            record = import_log(folder / "log.tsv", stated, folder / "runs")
            assert 0 < len(record.certificates) <= data.count(b"\n") + data.count(b"\r") + 1
            assert all(c.index >= 0 and 0 <= c.radius < math.inf for c in record.certificates)
            for _ in check_record(record.path):
                continue

        judge("log", read)


def _text(cell: Any) -> str:
    return cell if isinstance(cell, str) else json.dumps(cell)


@given(st.sampled_from(LOGS), fields, cuts, st.sampled_from([0.25, 1e-300, 1e29]), st.sampled_from([10, 1000, 10**9]))
def logs(log: Any, changes: list[Any], torn: list[Any], sigma: float, n: int) -> None:
    """Read a log of a known kind with changed fields and damaged text."""
    rows, kind, radius = log
    rows = changed(rows, changes)
    lines = (
        ["\t".join(map(_text, r)) if isinstance(r, list) else _text(r) for r in rows] if isinstance(rows, list) else []
    )
    data = cut("\n".join(lines).encode(errors="surrogatepass"), torn)
    _use_log(data, LogParameters(kind, "any-data", sigma, 0.001 if n > 10 else 0.5, n, None, radius))


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode(errors="surrogatepass")))
def random_logs(data: bytes) -> None:
    """Any bytes for a log, after a header or not."""
    _use_log(data, LogParameters("cohen", "any-data", 0.25, 0.001, 1000))
    _use_log("\t".join(COHEN[0]).encode() + b"\n" + data, LogParameters("cohen", "any-data", 0.25, 0.001, 1000))
