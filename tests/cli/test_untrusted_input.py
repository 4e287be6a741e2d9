"""Untrusted input is read, never executed: no code run, no server contacted, no file written, no memory exhausted."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bench import plugins
from bench.data.datasets import load_card, load_split
from bench.errors import BenchError
from bench.io import http, hub, limits, tensors
from bench.io.http import Client
from bench.process.runlog import RunLog
from bench.records.record import read_run
from bench.records.schema import RunInfo
from bench.records.writer import RunFolder
from bench.smoothing.anytime import Anytime
from bench.smoothing.procedures import describe
from tests.fuzz.served import raw_server
from tests.helpers.commands import TINY, Result
from tests.helpers.inferenceserver import InferenceServer
from tests.helpers.records import made_up

Bench = Callable[..., Result]

EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("")
from bench.interface import Defense
class Evil(Defense):
    def logits(self, x, draw):
        return self.context.base(x)
"""
UNTRAINED: dict[str, Any] = {
    "name": "none",
    "source": "d",
    "config": {},
    "weights": None,
    "parts": {},
    "objective": None,
}


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A defense file that creates a file when it is run."""
    file = tmp_path / "evil.py"
    file.write_text(EVIL)
    return file


def record(out: Path, **arguments: Any) -> Path:
    """Write a run that passes its audit, of a defense without weights, with these arguments."""
    run = made_up(out, [990, 1000, 700, 400], counted=True, name="none", defense=UNTRAINED)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"arguments": {"dataset": TINY, "defenses": "none"} | arguments}))
    return run


def refused(call: Callable[[], object]) -> str:
    """Return the one line with which a call is refused."""
    with pytest.raises(BenchError) as e:
        call()
    assert "\n" not in str(e.value)
    return str(e.value)


# Code ------------------------------------------------------------------------------------------------


def test_a_records_defense_file_is_run_only_where_it_is_named(bench: Bench, tmp_path: Path, evil: Path) -> None:
    run, ran = record(tmp_path / "runs", defenses=str(evil)), evil.with_name("ran")
    for command in (("report", run.parent), ("list", "runs", "--out", run.parent), ("export", run), ("list",)):
        assert bench(*command).code == 0
    info = json.loads((run / "run.json").read_text())
    machine = dict.fromkeys(("device", "platform", "packages", "threads"))
    (run / "run.json").write_text(json.dumps(info | {"environment": machine}))
    base = tmp_path / "base.json"
    assert bench("check", run.parent, "--baseline", base, "--update").code == 0
    assert bench("check", run.parent, "--baseline", base).code == 0
    verified = bench("verify", run, "--deep")
    assert verified.code == 0, verified.err
    assert f"run only where you name it: --defense {evil}" in verified.out
    assert not ran.exists()
    bench("verify", run, "--defense", evil)
    assert ran.exists()


def test_no_file_is_run_inside_of_a_defense_either(evil: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine.py"
    other.write_text(EVIL)
    with plugins.restricted_to([str(other)]):
        assert "code named by a record is not run" in refused(lambda: plugins.load(str(evil)))
        assert not evil.with_name("ran").exists()
        plugins.load(str(other))
    plugins.load(str(evil))


WRONG_ARGUMENTS = [{"defenses": 3}, {"unknown": 1}, {"n": "many"}, {"sigma": ".25,.5"}, {"sigma": "x"}, {"n": 10**12}]


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS)
def test_arguments_that_no_run_has(bench: Bench, tmp_path: Path, arguments: dict[str, Any]) -> None:
    result = bench("verify", record(tmp_path, **arguments))
    assert result.code == 2 and result.err.count("\n") == 1, result.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("in_chans = 1 }", 'in_chans = 1, checkpoint_path = "x.pt" }'), "must not set checkpoint_path"),
        (("in_chans = 1 }", "in_chans = 1, pretrained_cfg_overlay = {} }"), "must not set pretrained_cfg_overlay"),
        (("vit_tiny_patch16_224", "hf-hub:someone/pickle"), "is an address"),
        (("vit_tiny_patch16_224", "local-dir:/tmp"), "is an address"),
        (("img_size = 8", "img_size = 8.5"), "img_size 8.5 must be a side"),
    ],
)
def test_a_card_cannot_have_timm_open_files(bench: Bench, tmp_path: Path, change: tuple[str, str], words: str) -> None:
    card = tmp_path / "card.toml"
    card.write_text(Path(TINY).read_text().replace(*change))
    result = bench("run", "--defense", "none", "--dataset", card, "--out", tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert words in result.err


# Servers ---------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceServer]:
    monkeypatch.setenv(http.TOKEN, "s3cret")
    monkeypatch.setattr(http, "PAUSES", ())
    with InferenceServer(lambda x: torch.zeros(len(x), 10), (1, 8, 8), 10) as running:
        yield running


def test_a_server_is_asked_only_where_the_user_names_it(bench: Bench, tmp_path: Path, server: InferenceServer) -> None:
    verified = bench("verify", record(tmp_path, base=server.url), "--deep")
    assert verified.code == 0 and f"--base {server.url}" in verified.out
    card = tmp_path / "card.toml"
    card.write_text(Path(TINY).read_text().replace("[presets.quick]", f'[presets.quick]\nbase = "{server.url}"'))
    ran = bench("run", "--defense", "none", "--dataset", card, "--out", tmp_path)
    assert ran.code == 2 and f"if you trust it, give --base {server.url}" in ran.err
    assert (server.requests, server.tokens) == ([], set())


def asked(most: int = 1000) -> str:
    """The error about the raw server's answer."""
    return refused(lambda: Client().ask(raw_server().url, lambda a: a.content, most=most))


@pytest.mark.parametrize("status", ["301", "307"])
def test_a_token_does_not_follow_a_redirection(server: InferenceServer, status: str) -> None:
    raw_server().reply = f"HTTP/1.1 {status} x\r\nLocation: {server.url}\r\nContent-Length: 0\r\n\r\n".encode()
    assert "give the address that it redirects to" in asked()
    assert server.requests == []


@pytest.mark.usefixtures("server")
def test_answers_are_bounded() -> None:
    raw_server().reply = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1000
    assert Client().ask(raw_server().url, lambda a: a.content, body=b"x" * 10**5, most=1000) == b"x" * 1000
    raw_server().reply += b"x"
    assert "more than 1,000 bytes" in asked()
    bomb = gzip.compress(bytes(10**7))
    raw_server().reply = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + bomb
    assert "it is compressed" in asked(10**9)
    raw_server().reply = b"HTTP/1.1 500 no\r\n\r\n" + b"y" * 10**6
    assert len(asked()) < 500


@contextmanager
def dripping() -> Iterator[str]:
    """A server that sends a byte of its header now and then, and never ends."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not over.is_set():
                connection.sendall(b"x")
                sleep(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v2"
    over.set()
    thread.join()
    listening.close()


@pytest.mark.usefixtures("server")
def test_a_server_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LONGEST", 0.5)
    with dripping() as url:
        assert "no complete answer in" in refused(lambda: Client().ask(url, lambda a: a.content))


@pytest.mark.parametrize("url", ["http://[::1/v2/models/x", "http://a:99999999/v2/models/x"])
def test_addresses_that_are_none(bench: Bench, tmp_path: Path, url: str) -> None:
    result = bench("run", "--defense", "none", "--dataset", TINY, "--base", url, "--out", tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "", "/x", ".x", "a//b", "x\n"])
def test_a_revision_is_no_path(revision: str) -> None:
    with pytest.raises(BenchError, match="is not a revision"):
        hub.fetch("a/b", "c", revision, "model")


# Files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["certificates.jsonl", "run.json", ".lock", "source.tsv"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "kept"
    kept.write_text("precious")
    run = made_up(tmp_path / "runs", [0.1])
    info = RunInfo.of(json.loads((run / "run.json").read_text()))
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(kept)
    assert "is a link" in refused(lambda: RunFolder(run.parent, "digits-lora-s0.25", info))
    assert kept.read_text() == "precious"


def test_no_log_is_written_through_a_link(tmp_path: Path) -> None:
    kept, file = tmp_path / "kept", tmp_path / "x.log"
    kept.write_text("precious")
    file.symlink_to(kept)
    assert "is a link" in refused(lambda: RunLog(file))
    file.unlink()
    os.mkfifo(file)
    assert "not a regular file" in refused(lambda: RunLog(file))
    assert kept.read_text() == "precious"


def test_pipes_and_devices_are_not_read(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs", [0.1])
    for name in ("certificates.jsonl", "run.json"):
        (run / name).unlink()
        os.mkfifo(run / name)
        assert "not a regular file" in refused(lambda: read_run(run))
    assert "unreadable" in bench("list", "runs", "--out", run.parent).out
    (tmp_path / "log.tsv").symlink_to("/dev/zero")
    stated = ("--dataset", "x", "--sigma", ".25", "--alpha", ".001", "--n", "1000")
    assert "not a regular file" in bench("import", tmp_path / "log.tsv", *stated, "--out", tmp_path).err
    os.mkfifo(tmp_path / "card.toml")
    assert "no data set card" in refused(lambda: load_card(str(tmp_path / "card.toml")))


def test_files_larger_than_any_that_bench_writes(tmp_path: Path) -> None:
    run = made_up(tmp_path, [0.1, 0.2])
    file = run / "certificates.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1] + lines[1].replace('"index": 1', '"index": 2'))
    assert "more lines than run.json has images, 2" in refused(lambda: read_run(run))
    file.write_text(lines[0] + "x" * 10**6)
    assert "a line of more than 10,000 bytes" in refused(lambda: read_run(run))
    os.truncate(run / "run.json", limits.RUN + 1)
    assert "larger than 64 MB" in refused(lambda: read_run(run))


ANYTIME = describe(Anytime(100, 1000, 0.001, (0.25,)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"indices": [0, 0]}, "identity.indices: an image is there twice"),
        ({"procedure": {k: v for k, v in ANYTIME.items() if k != "radii"}}, "identity.procedure: KeyError: 'radii'"),
        ({"procedure": ANYTIME | {"n": 10**9}}, "identity.procedure: ValueError: calibration exact is for at most"),
        ({"procedure": ANYTIME | {"alpha": 1e-300}}, "identity.procedure: ValueError: calibration exact is for at"),
        ({"procedure": ANYTIME | {"calibration": "none"}}, "identity.procedure.calibration"),
        ({"procedure": ANYTIME | {"spending": 0}}, "identity.procedure.spending"),
        ({"device": 3}, "identity.device"),
    ],
)
def test_identities_that_no_run_has(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    run = made_up(tmp_path, [0.1])
    info = json.loads((run / "run.json").read_text())
    info["identity"] |= change
    (run / "run.json").write_text(json.dumps(info))
    assert words in refused(lambda: read_run(run))


def test_json_that_is_nested_without_end(tmp_path: Path) -> None:
    run = made_up(tmp_path, [0.1])
    for name in ("certificates.jsonl", "run.json"):
        (run / name).write_text("[" * 9000 + "\n")
        assert name in refused(lambda: read_run(run))


def test_a_name_cannot_command_the_terminal(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path / "runs", [0.1], dataset="\x1b[2J\ud800", defense=UNTRAINED | {"name": "\x1b]0;x\x07"})
    shown = bench("report", tmp_path / "runs")
    assert shown.code == 0 and "\x1b" not in shown.out + shown.err and "x1b" in shown.out
    assert "\x1b" not in bench("verify", tmp_path / "\x1b[2J").err
    verified = bench("verify", record(tmp_path / "verify", defenses="./\x1b[2J.py"))
    assert "\x1b" not in verified.out + verified.err and "x1b" in verified.out, verified
    run = record(tmp_path / "shards", dataset="\x1b[2J")
    info = json.loads((run / "run.json").read_text())
    (run / "shard-1-of-2").mkdir()
    (run / "shard-1-of-2" / "run.json").write_text(json.dumps(info | {"shard": "1/2", "status": "started"}))
    (run / "run.json").unlink()
    merged = bench("merge", run)
    assert merged.code == 1 and "\x1b" not in merged.err and "x1b" in merged.err, merged


def test_latex_has_no_control_characters(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path, [0.1], dataset="\x1b[2J", defense=UNTRAINED | {"name": "\x1b]0;x\x07"})
    text = bench("report", tmp_path, "--format", "latex").out
    assert "textbackslash{}x07" in text and all(c.isprintable() or c == "\n" for c in text)


def test_csv_has_no_control_characters(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path, [0.1], dataset="\x1b[2J", defense=UNTRAINED | {"name": "\x1b]0;x\x07"})
    text = bench("report", tmp_path, "--format", "csv").out
    assert r"\x1b]0;x\x07" in text and all(c.isprintable() or c == "\n" for c in text)


def test_settings_of_a_record_cannot_add_to_markdown(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path, [0.1])
    info = json.loads((run / "run.json").read_text())
    info["defense"]["settings"] = {"epochs": "<!-- certbench: end --><img src=x>\x1b[2J"}
    (run / "run.json").write_text(json.dumps(info))
    text = bench("report", tmp_path, "--format", "md").out
    assert "Trained with" in text and "<!--" not in text.replace(r"\<", "") and "<img" not in text.replace(r"\<", "")
    assert "\x1b" not in text


def test_dollars_in_names_are_no_formula(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path / "runs", [0.1], dataset="b$\\frac$", defense=UNTRAINED | {"name": "a$\\x$"})
    drawn = bench("report", tmp_path / "runs", "--out", tmp_path / "out")
    assert drawn.code == 0, drawn.err
    assert list((tmp_path / "out").glob("*.svg"))


def test_half_a_character_is_shown_by_its_number(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path / "runs", [0.1], defense=UNTRAINED | {"name": "half \ud800, whole \U0001f600"})
    for form in ("md", "csv", "html", "latex", "json"):
        result = bench("report", tmp_path / "runs", "--format", form, "--out", tmp_path / form)
        assert result.code == 0, result.err
    assert "half \\\\ud800, whole \U0001f600" in (tmp_path / "md" / "report.md").read_text()


PARQUET = """
name = "mine"
shape = [3, 8, 8]
classes = 3
[source]
reader = "parquet"
folder = "."
train = "train.parquet"
"""


@pytest.mark.parametrize(
    ("size", "rows", "words"),
    [(2**20, 2000, "take more than "), (0, 10**6, "take more than "), (0, 11_000_000, "more than 10,000,000")],
    ids=["pictures", "labels", "rows"],
)
def test_a_parquet_bomb_is_refused_before_it_takes_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, rows: int, words: str
) -> None:
    row = pa.table({"image": pa.array([bytes(size)], pa.binary()), "label": [0]})
    out = io.BytesIO()
    with pq.ParquetWriter(out, row.schema, compression="zstd", dictionary_pagesize_limit=2**30) as writer:
        for _ in range(20):
            writer.write_table(row.take(pa.repeat(0, rows // 20)))
    assert len(out.getvalue()) < 200_000
    (tmp_path / "train.parquet").write_bytes(out.getvalue())
    (tmp_path / "card.toml").write_text(PARQUET)
    monkeypatch.setattr(limits, "memory", lambda: 2**27)
    before = pa.total_allocated_bytes()
    assert words in refused(lambda: load_split(load_card(str(tmp_path / "card.toml")), "train"))
    assert pa.total_allocated_bytes() - before < 2**27


def test_weights_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.safetensors").write_bytes(bytes(9))
    os.truncate(tmp_path / "w.safetensors", 2**31)
    monkeypatch.setattr(limits, "memory", lambda: 2**30)
    assert "GB of memory" in refused(lambda: tensors.read(tmp_path / "w.safetensors"))
