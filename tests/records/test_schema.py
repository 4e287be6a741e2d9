"""The schema of run.json: what is validated is kept exactly, hash included, and what no run has is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.io.files import digest
from bench.records.flaws import LogParameters
from bench.records.importing import import_log
from bench.records.record import read_run
from bench.records.schema import Environment, Identity, RunInfo
from bench.records.stored import parse_json
from bench.smoothing.anytime import Anytime
from bench.smoothing.fixed import Fixed
from bench.smoothing.procedures import describe
from tests.helpers.records import begun, made_up

COHEN = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.25\t1\t0.5\n1\t2\t-1\t0.0\t0\t0.5\n"


def written(info: Any) -> str:
    """Return the bytes that a hash is over: 1 and 1.0 differ, the order of keys does not."""
    return json.dumps(info, sort_keys=True)


def runs(out: Path) -> list[Path]:
    """Write a run with each procedure, one that has not begun to certify, and an imported log."""
    anytime = describe(Anytime(100, 1000, 0.001, (0.25, 0.5)))
    found = [made_up(out, [0.25, None]), made_up(out, [0.25, None], name="any", procedure=anytime)]
    found.append(made_up(out, [0.25], name="one", sigma=1, train_sigma=1, noise={"kind": "grid", "tau": 0}))
    (out / "log.tsv").write_text(COHEN)
    return [*found, import_log(out / "log.tsv", LogParameters("cohen", "any-data", 1, 0.001, 1000), out).path]


def test_a_record_is_kept_exactly(tmp_path: Path) -> None:
    for run in runs(tmp_path):
        stored = json.loads((run / "run.json").read_text())
        record = read_run(run)
        assert written(record.info.as_json()) == written(stored)
        assert record.identity.sha256 == digest(stored["identity"])
        assert run.name.endswith(record.identity.folder_suffix)
    assert written(read_run(tmp_path / run.name).identity.as_json()["sigma"]) == "1"


# Numbers as whole and as floating point ones, unknown fields everywhere, names that a model itself has.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["new", "version", "sampling", "model_fields", "as_json", "__class__", "copy", "sha256", "é"])
WHERE = st.sampled_from(["", "identity", "identity.noise", "identity.procedure", "identity.defense", "cost", "base"])
NUMBERS = st.sampled_from([1, 1.0, 2, 2.0, 0.1, 1e-3])


@given(st.lists(st.tuples(WHERE, NAMES, JSON), max_size=4), NUMBERS, NUMBERS, st.sampled_from([0, 0.0, 0.25]))
def test_whatever_is_validated_is_kept_exactly(
    unknown: list[tuple[str, str, Any]], sigma: float, seconds: float, tau: float
) -> None:
    info = begun(3, sigma=sigma, noise={"kind": "grid", "tau": tau}).as_json()
    info["cost"] = dict.fromkeys(COSTS, seconds) | {"votes": 2}
    for where, name, value in unknown:
        part = info
        for key in filter(None, where.split(".")):
            part = part[key]
        if where != "identity.procedure" and (where, name) != ("identity.noise", "version"):  # fields that have a type
            part.setdefault(name, value)
    stored = json.loads(json.dumps(info))
    found = RunInfo.of(stored)
    assert written(found.as_json()) == written(stored)
    assert found.identity.sha256 == digest(stored["identity"])
    assert written(found.replace(status="other").as_json()) == written(stored | {"status": "other"})


COSTS = (
    *("train_seconds", "certify_seconds", "base_forwards", "queries", "trainable_nominal", "trainable_updated"),
    *("trained_here", "trained_elsewhere", "parameters", "flops_per_vote", "peak_memory"),
)


def test_the_procedure_is_an_object() -> None:
    assert begun(3).identity.procedure == Fixed(100, 1000, 0.001)
    anytime = Anytime(100, 1000, 0.001, (0.25,), target="label")
    assert begun(3, procedure=describe(anytime)).identity.procedure == anytime


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": True}, "identity.sigma"),
        ({"sigma": float("nan")}, "identity.sigma"),
        ({"split": "training"}, "identity.split"),
        ({"seed": None}, "a run that is not imported has a base, a seed and an n0"),
        ({"imported": None}, "identity.imported"),
        ({"procedure": {"kind": "adaptive", "n0": 1, "n": 100, "alpha": 0.1}}, "only an imported log is adaptive"),
        ({"procedure": {"kind": "fixed", "n0": 1, "n": 100, "alpha": 0.1, "x": 1}}, "identity.procedure: TypeError"),
    ],
)
def test_what_no_run_has_is_one_line(change: dict[str, Any], words: str) -> None:
    info = begun(3).as_json()
    with pytest.raises(BenchError) as e:
        RunInfo.of(info | {"identity": info["identity"] | change})
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_finished_run_has_cost_and_metrics(tmp_path: Path) -> None:
    info = json.loads((made_up(tmp_path, [0.25]) / "run.json").read_text())
    for name in ("cost", "metrics", "certificates_sha256"):
        with pytest.raises(BenchError, match=name):
            RunInfo.of({k: v for k, v in info.items() if k != name})
    with pytest.raises(BenchError, match="has counted its votes"):
        RunInfo.of(info | {"cost": info["cost"] | {"votes": None}})


def test_a_record_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        begun(3).status = "complete"
    before = Environment.of({"device": "cpu", "new": 1})
    after = before.replace(workers={"cpu": 2})
    assert (before.workers, after.as_json()) == (None, {"device": "cpu", "new": 1, "workers": {"cpu": 2}})


def test_half_a_surrogate_pair_is_escaped() -> None:
    assert parse_json('{"a\\ud800": ["\\ud83d\\ude00", "\\udfff"]}') == {"a\\ud800": ["\U0001f600", "\\udfff"]}
    identity = begun(3).identity.as_json() | {"dataset": "\ud800"}
    assert Identity.of(parse_json(json.dumps(identity))).dataset == "\\ud800"


@pytest.mark.parametrize(
    "split", ["../test", "test-", "test-OOD", "test-a/b", "test-" + "a" * 50, "tests", "", "test\n"]
)
def test_a_split_is_a_name_that_a_card_can_have(tmp_path: Path, split: str) -> None:
    for name in ("test", "train", "validation", "test-ood", "test-jpeg_compression-5"):
        assert read_run(made_up(tmp_path, [0.25], split=name)).identity.split == name
    path = made_up(tmp_path, [0.5]) / "run.json"
    path.write_text(path.read_text().replace('"split": "test"', f'"split": {json.dumps(split)}'))
    with pytest.raises(BenchError, match=r"identity\.split: String should match pattern"):
        read_run(path.parent)
