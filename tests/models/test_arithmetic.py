"""Other arithmetic than float32 is another F with its own identity; training and default identities are unchanged."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.models import arithmetic
from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
CPU = torch.device("cpu")


def infos(out: Path) -> dict[str, dict[str, Any]]:
    """Return run.json by the names of defense and arithmetic."""
    found = {}
    for file in out.glob("*/run.json"):
        info = json.loads(file.read_text())
        about = info["identity"]["defense"]
        found[" ".join([about["name"], *about.get("arithmetic", [])])] = info
    return found


def test_words_have_one_order_without_float32() -> None:
    assert arithmetic.parse("float32") == ()
    assert arithmetic.parse("compile, channels-last,bfloat16") == ("bfloat16", "channels-last", "compile")
    assert arithmetic.parse("float32,channels-last") == ("channels-last",)
    assert arithmetic.parse("compile,tf32") == ("tf32", "compile")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bfloat", "did you mean bfloat16"),
        ("float32,bfloat16", "not both"),
        ("tf32,bfloat16", "not both"),
        ("", "known: "),
    ],
)
def test_wrong_words_are_one_line(text: str, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        arithmetic.parse(text)


def test_bfloat16_is_another_defense_of_the_same_weights(bench: Bench, tmp_path: Path) -> None:
    command = ("run", "--defense", "none,lora", "--dataset", TINY, "--out", tmp_path)
    assert bench(*command).code == 0
    ran = bench(*command, "--arithmetic", "channels-last,bfloat16")
    assert ran.code == 0, ran.err
    found = infos(tmp_path)
    assert set(found) == {"none", "lora", "none bfloat16 channels-last", "lora bfloat16 channels-last"}
    assert "arithmetic" not in found["lora"]["identity"]["defense"]
    plain, other = (found[name]["identity"] for name in ("lora", "lora bfloat16 channels-last"))
    assert plain["defense"]["weights"] == other["defense"]["weights"]  # training uses float32
    assert {k: v for k, v in plain.items() if k != "defense"} == {k: v for k, v in other.items() if k != "defense"}
    for name in ("none", "lora"):
        assert (
            found[name]["cost"]["flops_per_vote"] == found[f"{name} bfloat16 channels-last"]["cost"]["flops_per_vote"]
        )
    # One table, since everything else is equal; the names differ.
    (table,) = json.loads(bench("report", tmp_path, "--format", "json").out)["tables"]
    assert {row["defense"] for row in table["rows"]} == set(found)
    again = bench(*command, "--arithmetic", "bfloat16,channels-last")
    assert again.err.count("already complete") == 2
    (run,) = (f.parent for f in tmp_path.glob("tiny-none-*/run.json") if "bfloat16" in f.read_text())
    verified = bench("verify", run, "--deep")
    assert verified.code == 0, verified.out
    assert "drawn again from the seed give the recorded counts, exactly" in verified.out


class Convnet(nn.Module):
    """Records the layout and dtype of its second layer's input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5))
        self.net[2].register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, draw: Any) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize("words", ["float32", "bfloat16", "channels-last", "bfloat16,channels-last"])
def test_each_word_changes_the_arithmetic(words: str) -> None:
    net, x = Convnet().eval(), torch.rand(32, 3, 8, 8)
    with torch.inference_mode():
        expected = Convnet().eval()(x, None)
        logits = arithmetic.model(net, arithmetic.parse(words), CPU)(x, None)  # type: ignore[arg-type]
    seen = net.seen[-1]
    assert seen.dtype == (torch.bfloat16 if "bfloat16" in words else torch.float32)
    assert seen.is_contiguous(memory_format=torch.channels_last) == ("channels-last" in words)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected) == (words == "float32") or words == "channels-last"
    assert (logits - expected).abs().max() < (2e-2 if "bfloat16" in words else 1e-5)
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_tf32_is_refused_where_it_would_be_float32(bench: Bench, tmp_path: Path, more: tuple[str, ...]) -> None:
    command = ("run", "--defense", "full", "--dataset", TINY, "--out", tmp_path, "--device", "cpu")
    said = bench(*command, "--arithmetic", "tf32", *more)
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "cpu would compute in float32" in said.err and "--device cuda" in said.err
    assert not list(tmp_path.glob("*/run.json"))


@pytest.mark.parametrize(
    ("capability", "cuda", "has"), [((8, 0), "13.0", True), ((7, 5), "13.0", False), ((9, 4), None, False)]
)
def test_tf32_is_refused_on_gpus_without_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str | None, has: bool
) -> None:
    """On NVIDIA's before Ampere, and on those of another maker, which torch also calls cuda."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if has:
        arithmetic.check(("tf32",), torch.device("cuda"))
    else:
        with pytest.raises(BenchError, match="a card would compute in float32"):
            arithmetic.check(("tf32",), torch.device("cuda"))


def precision() -> tuple[str, bool]:
    """Return torch's settings of TF32, which all threads share."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


TF32, FLOAT32 = ("high", True), ("highest", False)
NOTING = '''
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.interface import Access, Defense, Draw, Schedule

SEEN: list[tuple[bool, str, bool]] = []


class Noting(Defense):
    """Notes torch's settings whenever it computes logits."""

    access = Access.WEIGHTS

    @dataclass(frozen=True)
    class Config(Schedule):
        epochs: float = 10
        batch: int = 64
        lr: float = 1e-3

    def build(self) -> None:
        self.net = self.context.base.copy()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        SEEN.append((self.training, *settings))
        return self.net(x)
'''


def test_tf32_is_on_while_votes_are_computed_only(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    """In every thread, at every check; not in training, nor in the next run of the process."""
    monkeypatch.setattr(arithmetic, "check", lambda words, device: None)  # as if this CPU had it
    (tmp_path / "noting.py").write_text(NOTING)
    set_threads(2)
    before = precision()
    calls = {}
    for words in ("tf32", "float32", "tf32,channels-last"):
        command = ("run", "--defense", tmp_path / "noting.py", "--dataset", TINY, "--out", tmp_path / "runs")
        ran = bench(*command, "--arithmetic", words)
        assert ran.code == 0, ran.err
        assert precision() == before
        (module,) = (m for m in list(sys.modules.values()) if "Noting" in vars(m))
        calls[words] = [(training, tuple(settings)) for training, *settings in module.SEEN]
        module.SEEN.clear()
    assert infos(tmp_path / "runs").keys() == {"noting", "noting tf32", "noting tf32 channels-last"}
    assert calls["tf32"].count((True, before)) > 0  # trained, once for all three
    evaluations = {words: [settings for training, settings in found if not training] for words, found in calls.items()}
    assert set(evaluations["float32"]) == {FLOAT32}
    for words in ("tf32", "tf32,channels-last"):
        assert len(evaluations[words]) == len(evaluations["float32"]) > 20
        # Two are no votes and their values are not used: of the first block, to see whether it fits into memory, and of
        # the block whose operations are counted.
        assert evaluations[words].count(FLOAT32) == 2 and evaluations[words].count(TF32) == len(evaluations[words]) - 2


def test_threads_that_end_at_other_times_leave_tf32_on_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "check", lambda words, device: None)
    found: dict[str, list[tuple[str, bool]]] = {"first": [], "second": []}
    both, first_ended = threading.Barrier(2), threading.Event()

    class Waits(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor, draw: Any) -> Tensor:
            found[self.name].append(precision())
            both.wait(10)
            if self.name == "second":
                assert first_ended.wait(10)
            found[self.name].append(precision())
            return x

    def vote(name: str) -> None:
        arithmetic.model(Waits(name), ("tf32",), CPU)(torch.zeros(1, 1), None)  # type: ignore[arg-type]
        if name == "first":
            first_ended.set()

    with arithmetic.deterministic():
        threads = [threading.Thread(target=vote, args=(name,)) for name in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert precision() == FLOAT32
    assert found == {"first": [TF32, TF32], "second": [TF32, TF32]}


def test_rows_are_checked_in_that_arithmetic(bench: Bench, tmp_path: Path) -> None:
    command = ("run", "--dataset", TINY, "--out", tmp_path, "--arithmetic", "bfloat16")
    said = bench(*command, "--defense", defense("batch_average"))
    assert said.code == 2
    assert "other rows of its batch" in said.err


def test_a_served_base_computes_as_it_does(bench: Bench, tmp_path: Path) -> None:
    url = "http://localhost:9/v2/models/m"
    said = bench("run", "--defense", "none", "--dataset", TINY, "--base", url, "--arithmetic", "bfloat16")
    assert said.code == 2
    assert said.err.count("\n") == 1 and "is computed by its server" in said.err


COUNTING = '''
from torch import Tensor

from bench.interface import Access, Defense, Draw


class Counting(Defense):
    """Gives the same logits at every call, computed with a number that changes."""

    access = Access.QUERY
    calls = 0

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        self.calls += 1
        return self.context.base(x) + 0 * self.calls
'''


@pytest.mark.slow
def test_compiled_counts_are_resumed_and_drawn_again(bench: Bench, tmp_path: Path) -> None:
    """A queried base and a randomised defense compile; a defense that would recompile is refused."""
    out = tmp_path / "runs"
    for name in ("none", defense("randomised")):
        command = ("run", "--defense", name, "--dataset", TINY, "--out", out, "--arithmetic", "compile")
        ran = bench(*command)
        assert ran.code == 0, ran.err
        (run,) = out.glob(f"tiny-{Path(name).stem}-*")
        lines = (run / "certificates.jsonl").read_text().splitlines(keepends=True)
        (run / "certificates.jsonl").write_text("".join(lines[:3]))
        info = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(info | {"status": "started"}))
        assert bench(*command).code == 0
        again = [json.loads(line) | {"seconds": 0} for line in (run / "certificates.jsonl").read_text().splitlines()]
        assert again == [json.loads(line) | {"seconds": 0} for line in lines]
        named = ("--defense", name) if name.endswith(".py") else ()  # a record's defense file is run only if named
        assert "exactly" in bench("verify", run, "--deep", *named).out
    (tmp_path / "counting.py").write_text(COUNTING)
    for name, words in ((defense("batch_average"), "other rows"), (str(tmp_path / "counting.py"), "recompile")):
        said = bench("run", "--defense", name, "--dataset", TINY, "--out", out, "--arithmetic", "compile")
        assert said.code == 2
        assert words in said.err
