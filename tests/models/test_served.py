"""A base served over HTTP: the same counts as the local model, whatever faults the server has, or a one-line error."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.data.datasets import load_card, load_splits
from bench.io import http
from bench.models.load import load_base
from bench.models.served import HTTPBase
from tests.helpers.commands import TINY, Result, defense
from tests.helpers.inferenceserver import InferenceServer

Bench = Callable[..., Result]
Model = Callable[[Tensor], Tensor]
CARD = load_card(TINY)
SHAPE, CLASSES = CARD.shape, len(CARD.classes)
FITS = 1  # blocks to find the largest that fits
CHECKS = 10  # blocks of check_rows
MEASURED = 1  # blocks whose cost is measured


@pytest.fixture(scope="module")
def model() -> Model:
    """The tiny card's own base, as loaded by ``--base vit``."""
    torch.set_num_threads(1)
    train, validation = load_splits(CARD, "train", "validation")
    train = train.first(CARD.presets["quick"].train_examples)
    base = load_base(CARD, "vit", train, validation, torch.device("cpu"), lambda *_: None)
    return base.module.forward  # not the module: a pass in this process would be counted as the run's


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds the client would have waited."""
    slept: list[float] = []
    monkeypatch.setattr(http, "sleep", slept.append)
    monkeypatch.delenv(http.TOKEN, raising=False)
    return slept


@pytest.fixture
def server(model: Model) -> Iterator[InferenceServer]:
    with InferenceServer(model, SHAPE, CLASSES) as running:
        yield running


def command(base: str, out: Path, name: str = "none", *more: object) -> tuple[object, ...]:
    return ("run", "--defense", name, "--dataset", TINY, "--base", base, "--out", out, *more)


def lines(out: Path) -> list[dict[str, Any]]:
    """Return the certificates of all runs in a folder in the order of the images, without their timing."""
    rows = [json.loads(x) for f in sorted(out.glob("*/certificates.jsonl")) for x in f.read_text().splitlines()]
    return sorted(({**r, "seconds": 0} for r in rows), key=lambda r: r["index"])


def last_line(result: Result) -> str:
    """Return the one-line error of a failed command."""
    assert result.code == 2, result.out + result.err
    assert "Traceback" not in result.err
    said = result.err.strip().splitlines()
    assert sum(line.startswith("bench: ") for line in said) == 1
    return said[-1].removeprefix("bench: ")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Certificates of the same model with local weights."""
    from bench.cli import main

    out = tmp_path_factory.mktemp("here")
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in command("vit", out)])
    assert not stop.value.code
    return lines(out)


@pytest.mark.parametrize("name", ["none", defense("randomised")], ids=["none", "randomised"])
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_counts_are_those_of_the_model_here(
    bench: Bench, tmp_path: Path, server: InferenceServer, name: str, binary: bool
) -> None:
    server.binary = binary
    assert bench(*command("vit", tmp_path / "here", name)).code == 0
    ran = bench(*command(server.url + "/", tmp_path / "there", name, "--json"))
    assert ran.code == 0, ran.err
    assert lines(tmp_path / "there") == lines(tmp_path / "here")
    (info,) = json.loads(ran.out)
    base = info["identity"]["base"]
    assert {k: base[k] for k in ("name", "model", "version", "platform", "tensors")} == {
        "name": server.url,
        "model": "toy",
        "version": "1",
        "platform": "pytorch_libtorch",
        "tensors": "binary" if binary else "json",
    }
    assert info["base"]["source"] == {"kind": "served", "server": "test", "server_version": "9"}
    assert info["base"]["clean_correct"] >= 4
    assert info["cost"]["base_forwards"] == info["cost"]["votes"] == 8 * 120
    assert info["cost"]["flops_per_vote"] is None
    assert info["cost"]["parameters"] is None
    assert all((b'"data"' in body) == (not binary) for body in server.bodies)


def test_what_queries_alone_can_train_is_trained_the_same(
    bench: Bench, tmp_path: Path, server: InferenceServer
) -> None:
    found: list[Any] = []
    for base in ("vit", server.url):
        ran = bench(*command(base, tmp_path / str(len(found)), defense("scaled"), "--json"))
        assert ran.code == 0, ran.err
        found += json.loads(ran.out)
    here, there = found
    assert there["cost"]["queries"] == here["cost"]["queries"] > 0
    assert there["identity"]["defense"]["weights"] == here["identity"]["defense"]["weights"] is not None
    assert there["cost"]["trained_here"] == there["cost"]["trainable_updated"] == CLASSES
    assert there["cost"]["trained_elsewhere"] == 0
    assert lines(tmp_path / "1") == lines(tmp_path / "0")


CAST = {
    "denoiser": ("access=query", "objective=stab", "epochs=1", "depth=3", "width=8"),
    "diffusion": ("epochs=1", "width=8"),
}


@pytest.mark.parametrize("name", CAST)
def test_the_query_cast_runs_on_a_served_base(bench: Bench, tmp_path: Path, server: InferenceServer, name: str) -> None:
    settings = [word for setting in CAST[name] for word in ("--set", setting)]
    for base in ("vit", server.url):
        ran = bench(*command(base, tmp_path / base[:3], name, *settings))
        assert ran.code == 0, ran.err
    assert lines(tmp_path / "htt") == lines(tmp_path / "vit")


def test_a_record_of_a_served_base_is_reported_reused_and_verified(
    bench: Bench, tmp_path: Path, server: InferenceServer
) -> None:
    out = tmp_path / "runs"
    assert bench(*command(server.url, out, f"none,{defense('half_space')}")).code == 0
    report = bench("report", out, "--out", tmp_path / "report", "--columns", "all")
    assert report.code == 0, report.err
    (row,) = [line for line in report.out.splitlines() if line.startswith("| none")]
    header = [c.strip() for c in next(x for x in report.out.splitlines() if x.startswith("| defense")).split("|")]
    cells = dict(zip(header, [c.strip() for c in row.split("|")], strict=True))
    assert cells["GFLOPs / vote"] == cells["parameters"] == "—"
    assert bench("report", out, "--format", "csv").code == 0
    (table,) = json.loads(bench("report", out, "--format", "json").out)["tables"]
    assert {r["defense"]: r["flops_per_vote"] is None for r in table["rows"]} == {"none": True, "half-space": False}
    before = lines(out)
    again = bench(*command(server.url, out))
    assert "already complete" in again.err
    assert lines(out) == before
    (run,) = out.glob("tiny-none-*")
    for flags in ((), ("--deep",)):
        verified = bench("verify", run, "--base", server.url, *flags)
        assert verified.code == 0, verified.out + verified.err
        assert "drawn again from the seed give the recorded counts, exactly" in verified.out


def test_a_dry_run_sends_only_the_requests_it_times(bench: Bench, tmp_path: Path, server: InferenceServer) -> None:
    said = bench(*command(server.url, tmp_path, "none", "--dry-run"))
    assert said.code == 0, said.err
    assert "960 votes" in said.out
    assert server.requests == ["GET /v2/models/toy", "GET /v2", *["POST /v2/models/toy/infer"] * (FITS + CHECKS)]


# Faults ----------------------------------------------------------------------------------------------

PASSING = ["500", "503;7", "429", "drop", "text", "cut", "rows", "classes", "words", "dtype", "name"]
FAR = 2 + 1 + FITS + 1 + CHECKS + MEASURED  # the first block of votes, after fingerprints, clean images and checks


@pytest.mark.parametrize("fault", PASSING)
def test_a_temporary_fault_changes_nothing(
    bench: Bench,
    tmp_path: Path,
    server: InferenceServer,
    here: list[dict[str, Any]],
    pauses: list[float],
    fault: str,
) -> None:
    server.fault = lambda number: fault if number in (FAR, FAR + 1) else ""
    ran = bench(*command(server.url, tmp_path / "there"))
    assert ran.code == 0, ran.err
    assert lines(tmp_path / "there") == here
    assert server.bodies[FAR] == server.bodies[FAR + 1] == server.bodies[FAR + 2]
    assert server.bodies[FAR + 2] != server.bodies[FAR + 3]
    assert pauses == ([7.0, 7.0] if fault == "503;7" else [1.0, 2.0])


def test_a_request_without_answer_is_retried(
    bench: Bench, tmp_path: Path, server: InferenceServer, here: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "TIMEOUT", 0.3)
    server.fault = lambda number: "slow" if number == FAR else ""
    ran = bench(*command(server.url, tmp_path / "there"))
    assert ran.code == 0, ran.err
    assert lines(tmp_path / "there") == here
    assert server.bodies[FAR] == server.bodies[FAR + 1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "HTTP 500 ("),
        ("429;2", "HTTP 429 ("),
        ("drop", "disconnected"),
        ("text", "malformed answer: Invalid JSON"),
        ("rows", "malformed answer: FP32 [255, 10], not a float tensor of shape [256, 10]"),
        ("classes", "FP32 [256, 9]"),
        ("words", "data that are not numbers"),
        ("dtype", "INT64"),
        ("name", "outputs ['other'], not ['logits']"),
    ],
)
def test_a_permanent_fault_ends_the_run_in_one_line(
    bench: Bench, tmp_path: Path, server: InferenceServer, pauses: list[float], fault: str, words: str
) -> None:
    server.fault = lambda number: fault if number >= FAR else ""
    said = last_line(bench(*command(server.url, tmp_path)))
    assert said.startswith(f"{server.url}/infer: ")
    assert words in said
    assert "tried 6 times" in said
    assert "repeat the command to resume" in said
    assert len(server.bodies) == FAR + 6
    assert len(set(server.bodies[FAR:])) == 1
    assert pauses == ([2.0] * 5 if fault == "429;2" else [1.0, 2.0, 4.0, 8.0, 16.0])


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_certificates_are_the_same_after_an_outage(
    bench: Bench, tmp_path: Path, server: InferenceServer, here: list[dict[str, Any]], binary: bool
) -> None:
    server.binary = binary
    server.fault = lambda number: "drop" if number >= FAR + 3 else ""
    out = tmp_path / "there"
    last_line(bench(*command(server.url, out)))
    first = lines(out)
    assert 0 < len(first) < len(here)
    (file,) = out.glob("*/certificates.jsonl")
    written = file.read_bytes()
    server.down = True
    assert "/v2/models/toy: " in last_line(bench(*command(server.url, out)))
    server.down, server.fault = False, lambda number: ""
    ran = bench(*command(server.url, out))
    assert ran.code == 0, ran.err
    assert file.read_bytes().startswith(written)
    assert lines(out) == here


def test_an_unreachable_server_is_one_line(bench: Bench, tmp_path: Path, pauses: list[float]) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v2/models/toy"
        said = last_line(bench(*command(url, tmp_path)))
    assert said.startswith(f"{url}: ConnectError")
    assert "tried 6 times" in said
    assert all(p.suffix == ".log" for p in tmp_path.iterdir())  # no run folder


@pytest.mark.parametrize("status", [302, 400, 401, 404, 413])
def test_a_refusal_is_not_retried(
    bench: Bench,
    tmp_path: Path,
    server: InferenceServer,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    monkeypatch.setenv(http.TOKEN, "s3cret")
    server.fault = lambda number: str(status)
    said = last_line(bench(*command(server.url, tmp_path)))
    assert said.startswith(f"{server.url}/infer: HTTP {status} (")
    assert "no luck" in said
    assert "s3cret" not in said
    assert (http.TOKEN in said) == (status == 401)
    assert len(server.bodies) == 1
    assert pauses == []


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [("0", 0, 0), ("7", 7, 7), ("3600", 60, 60), ("soon", 1, 1), (formatdate(0, usegmt=True), 0, 0), ("date", 20, 30)],
)
def test_retry_after_is_followed_within_bounds(
    bench: Bench,
    tmp_path: Path,
    server: InferenceServer,
    pauses: list[float],
    value: str,
    least: float,
    most: float,
) -> None:
    import time

    asked = formatdate(time.time() + 30, usegmt=True) if value == "date" else value
    server.fault = lambda number: f"429;{asked}" if number == 2 else ""
    assert bench(*command(server.url, tmp_path, "none", "--dry-run")).code == 0
    (pause,) = pauses
    assert least <= pause <= most


# Refusals before any query ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora", "defense lora needs WEIGHTS access"),
        ("none,full", "defense full needs WEIGHTS access"),
        ("retrain", "cannot be trained from scratch"),
        (defense("greedy"), "QUERY access and copies the base"),
    ],
)
def test_a_defense_that_needs_more_than_answers_is_refused(
    bench: Bench, tmp_path: Path, server: InferenceServer, name: str, words: str
) -> None:
    for more in ((), ("--dry-run",)):
        said = last_line(bench(*command(server.url, tmp_path, name, *more)))
        assert words in said
        assert server.url in said or "greedy" in name
    asked = set(server.requests)
    assert asked == ({"GET /v2/models/toy"} if "greedy" in name else set())
    assert all(p.suffix == ".log" for p in tmp_path.iterdir())  # no run folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 1000]}]}, "serve one with 10 classes"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]}, "takes [-1, 3, 8, 8]"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1, 8, 8]}]}, "takes [1, 1, 8, 8]"),
        ({"inputs": [{"name": "x", "datatype": "UINT8", "shape": [-1, 1, 8, 8]}]}, "maps UINT8 to FP32"),
        ({"outputs": [{"name": "label", "datatype": "INT64", "shape": [-1, 10]}]}, "maps FP32 to INT64"),
        ({"outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": "none"}, "malformed answer: Input should be a valid array inputs; tried 6 times"),
    ],
)
def test_a_model_that_does_not_fit_the_card_is_refused(
    bench: Bench, tmp_path: Path, server: InferenceServer, change: dict[str, Any], words: str
) -> None:
    server.metadata |= change
    assert words in last_line(bench(*command(server.url, tmp_path)))
    assert server.bodies == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://me:s3cret@host/v2/models/toy", "put a token in $CERTBENCH_HTTP_TOKEN"),
        ("http://host/v2/models/toy?key=s3cret", "put a token in $CERTBENCH_HTTP_TOKEN"),
        ("http://host/v2/models/toy/infer", "must be http://HOST:PORT/v2/models/NAME"),
        ("http://host/toy", "must be http://HOST:PORT/v2/models/NAME"),
        ("http:///v2/models/toy", "must be http://HOST:PORT/v2/models/NAME"),
    ],
)
def test_an_invalid_address_is_refused(bench: Bench, tmp_path: Path, url: str, words: str) -> None:
    said = last_line(bench(*command(url, tmp_path)))
    assert words in said
    assert "s3cret" not in said


def test_weights_for_a_served_base_are_refused(bench: Bench, tmp_path: Path, server: InferenceServer) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"")
    said = last_line(bench(*command(server.url, tmp_path / "runs", "none", "--weights", tmp_path / "w.safetensors")))
    assert "is a remote model" in said
    assert server.bodies == []


# Identity of the model -------------------------------------------------------------------------------


def test_another_model_is_another_base(bench: Bench, tmp_path: Path, server: InferenceServer, model: Model) -> None:
    assert bench(*command(server.url, tmp_path)).code == 0
    (run,) = tmp_path.iterdir()
    server.model = lambda x: model(x) * 1.05 + 1.5 * torch.eye(CLASSES)[0]
    assert bench(*command(server.url, tmp_path)).code == 0
    assert len(list(tmp_path.iterdir())) == 2
    verified = bench("verify", run, "--base", server.url)
    assert verified.code == 1
    assert "base differ from the record's" in verified.out


def test_last_bits_do_not_change_the_fingerprint(server: InferenceServer, model: Model) -> None:
    before = HTTPBase(CARD, server.url).identity()
    server.model = lambda x: model(x) * (1 + 1e-6)
    assert HTTPBase(CARD, server.url).identity() == before
    assert sum(pair is not None for pair in before["fingerprint"]) == 16


def test_a_model_replaced_while_it_certifies_is_noticed(
    bench: Bench, tmp_path: Path, server: InferenceServer, model: Model
) -> None:
    server.model = lambda x: model(x) * (1 if len(server.bodies) <= FAR + 2 else 2)
    said = last_line(bench(*command(server.url, tmp_path)))
    assert "its model was replaced" in said
    (run,) = tmp_path.iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "started"


def test_a_new_version_stops_the_run(bench: Bench, tmp_path: Path, server: InferenceServer, model: Model) -> None:
    def answer(x: Tensor) -> Tensor:
        server.version = "2" if len(server.bodies) > FAR else "1"
        return model(x)

    server.model = answer
    assert "model version 2, not 1" in last_line(bench(*command(server.url, tmp_path)))


def test_a_server_that_mixes_a_batch_is_refused(
    bench: Bench, tmp_path: Path, server: InferenceServer, model: Model
) -> None:
    server.model = lambda x: model(x) + x.mean()
    assert "other rows of its batch" in last_line(bench(*command(server.url, tmp_path)))


@pytest.mark.parametrize("how", ["json", "strict json", "binary"])
def test_nan_is_not_a_vote_for_any_class(
    bench: Bench, tmp_path: Path, server: InferenceServer, model: Model, how: str
) -> None:
    def sometimes(x: Tensor) -> Tensor:
        return torch.where((x.mean((1, 2, 3)) > 0.3)[:, None], model(x), torch.nan)

    server.model, server.binary, server.strict_json = sometimes, how == "binary", how == "strict json"
    x = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.6
    with torch.inference_mode():
        wanted = sometimes(x)
    assert 0 < wanted.isnan().any(1).sum() < 64
    assert torch.equal(HTTPBase(CARD, server.url).module(x).nan_to_num(7), wanted.nan_to_num(7))
    server.model = lambda x: torch.full((len(x), CLASSES), torch.nan)
    assert bench(*command(server.url, tmp_path)).code == 0
    assert {(r["predicted"], r["top_count"]) for r in lines(tmp_path)} == {(None, 0)}


# The token -------------------------------------------------------------------------------------------


def test_the_token_is_sent_and_never_written(
    bench: Bench, tmp_path: Path, server: InferenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(http.TOKEN, "s3cret")
    ran = bench(*command(server.url, tmp_path, "none", "--json"))
    assert ran.code == 0, ran.err
    assert server.tokens == {"Bearer s3cret"}
    assert "s3cret" not in ran.out + ran.err
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) >= 2
    assert not any(b"s3cret" in f.read_bytes() for f in files)


def test_a_token_that_cannot_be_sent_is_not_shown(
    bench: Bench, tmp_path: Path, server: InferenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(http.TOKEN, "s3c\nret")
    said = last_line(bench(*command(server.url, tmp_path)))
    assert http.TOKEN in said
    assert "s3c" not in said
    assert server.requests == []
