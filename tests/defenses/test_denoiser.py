"""Denoised smoothing: the DnCNN, its objectives, its queries to the base, and its shared parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import globalstate
from bench.data.datasets import load_splits
from bench.data.split import Split
from bench.errors import BenchError
from bench.interface import Access, Schedule
from bench.io.files import file_sha256
from bench.models.base import BaseModel
from bench.models.convert import Stated, convert
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.context import PartTraining
from bench.runs.doctor import examine
from bench.runs.plan import Plan, make_plans
from bench.smoothing.noise import Noise
from bench.training import loop
from bench.training.objectives import gaussian
from defenses.denoiser import Denoiser, DnCNN, Surrogate
from tests.helpers import released
from tests.helpers.commands import TINY, Result

Bench = Callable[..., Result]
CPU = torch.device("cpu")
SIGMA = 0.25
STEPS, BATCH = 12, 50  # 3 epochs (the card's scale of 30) of 200 images


def plan(*settings: str, dataset: str = TINY, preset: str | None = None) -> Plan:
    batch = () if preset else (f"batch={BATCH}",)
    (found,) = make_plans(RunOptions(defenses="denoiser", dataset=dataset, preset=preset, settings=(*batch, *settings)))
    return found


@cache
def digits() -> tuple[Split, Split]:
    train, test = load_splits(plan().card, "train", "test")
    return train.first(200), test


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """An untrained base, which is usually wrong."""
    with globalstate.fixed_rng(0):
        return untrained_base(plan().card, plan().base, CPU)


def construct(of: Plan, base: BaseModel) -> Denoiser:
    """Build the defense; it and its shared parts are untrained."""
    defense = fitting.construct(of, base, CPU)
    assert isinstance(defense, Denoiser)
    return defense


def fit(of: Plan, base: BaseModel, *, relabel: bool = False) -> fitting.Fitted:
    train, _ = digits()
    if relabel:
        train = replace(train, labels=(train.labels + 1) % 10)
    return fitting.fit(of, base, train, CPU, lambda *_: None)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


# The network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "count"), [(64, 558_400), (128, 2_222_720)])
def test_the_papers_networks_have_the_papers_sizes(width: int, count: int) -> None:
    assert parameters(DnCNN(3, 17, width)) == count


def test_it_starts_as_the_identity() -> None:
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(DnCNN(3, 4, 8)(x), x)


def test_the_paper_preset_is_the_papers() -> None:
    of = plan("objective=stab+mse", dataset="digits", preset="paper")
    defense = construct(of, untrained_base(of.card, of.base, CPU))
    assert parameters(defense) == 558_400 - 2 * 2 * 64 * 9  # one channel in and out, not three
    config = defense.config
    assert (config.optimizer, config.lr, config.weight_decay) == ("adam", 1e-3, 1e-4)
    assert (config.epochs, config.decay, config.batch) == (90, "step", 256)
    tuning = defense.schedule()
    assert tuning.epochs == pytest.approx(20)
    assert (tuning.lr, tuning.decay) == (1e-5, "constant")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 12, 10)])
def test_every_surrogate_takes_every_shape(shape: tuple[int, int, int]) -> None:
    from defenses.denoiser import _SURROGATES

    assert len(set(_SURROGATES["paper"])) == 14
    for name in (*_SURROGATES["small"], *_SURROGATES["paper"]):
        with torch.inference_mode():
            assert Surrogate(name, Schedule()).build(7, shape).eval()(torch.rand(2, *shape)).shape == (2, 7), name


# Objectives ------------------------------------------------------------------------------------------


def test_mse_removes_noise(base: BaseModel) -> None:
    x = torch.from_numpy(digits()[1].pixels(np.arange(100)))
    noisy = x + SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    defense = fit(plan("objective=mse", "epochs=8"), base).defense
    with torch.inference_mode():
        error = float((defense.denoiser(noisy) - x).square().mean())  # type: ignore[operator]
    assert error < 0.5 * SIGMA**2


def test_stab_takes_the_bases_hard_labels_and_clf_the_true_ones(base: BaseModel) -> None:
    train, _ = digits()
    x, y = torch.from_numpy(train.pixels(np.arange(40))), torch.from_numpy(train.labels[:40])
    noisy = x + SIGMA * draw(len(x)).normal(1, 8, 8)
    said = base.module(x).argmax(1)
    assert (said != y).float().mean() > 0.5
    for objective, target in (("stab", said), ("clf", y)):
        defense = construct(plan(f"objective={objective}"), base)
        job = loop.TrainingJob(train, (), SIGMA, gaussian, 0, CPU, Path(), lambda *_: None)
        got = defense.loss(x, y, draw(len(x)), job)
        torch.testing.assert_close(got, F.cross_entropy(base.module(defense.denoiser(noisy)), target))


def draw(rows: int) -> loop.TrainingDraw:
    return loop.TrainingDraw(Noise(0, "train"), 0, 1, torch.arange(rows), SIGMA, CPU, [])


@pytest.mark.parametrize("objective", ["mse", "stab", "stab+mse", "clf"])
def test_only_clf_learns_from_labels(objective: str, base: BaseModel) -> None:
    of = plan(f"objective={objective}")
    with_labels, with_others = (fit(of, base, relabel=relabel).defense for relabel in (False, True))
    assert same(with_labels, with_others) == (objective != "clf")


def test_training_through_the_base_lowers_its_loss(base: BaseModel) -> None:
    of = plan("objective=stab", "epochs=12")
    train, _ = digits()
    x, y = torch.from_numpy(train.pixels(np.arange(100))), torch.from_numpy(train.labels[:100])
    before, after = construct(of, base), fit(of, base).defense
    with torch.no_grad():
        losses = [float(d.loss(x, y, draw(len(x)), job=None)) for d in (before, after)]  # type: ignore[arg-type]
    assert losses[1] < losses[0]


# Query access ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (("objective=mse",), Access.QUERY),
        (("objective=stab",), Access.GRADIENT),
        (("objective=clf", "access=query"), Access.QUERY),
        (("objective=stab+mse", "access=query"), Access.QUERY),
    ],
)
def test_it_gets_the_access_it_needs(settings: tuple[str, ...], most: Access, base: BaseModel) -> None:
    defense = construct(plan(*settings), base)
    assert defense.context.base.most == most
    out = defense.context.base(torch.zeros(1, 1, 8, 8, requires_grad=True))
    assert out.requires_grad == (most == Access.GRADIENT)


@pytest.mark.parametrize(("objective", "asked"), [("stab", STEPS * BATCH), ("clf", 0)])
def test_with_query_access_the_base_only_gives_labels(objective: str, asked: int, base: BaseModel) -> None:
    of = plan(f"objective={objective}", "access=query")
    train, _ = digits()
    defense = fitting.construct(of, base, CPU, PartTraining(train, lambda *_: None))
    assert isinstance(defense, Denoiser)
    assert {k.partition(".")[0] for k in defense.state_dict()} == {"denoiser"}
    states = [{k: v.clone() for k, v in s.state_dict().items()} for s in defense.surrogates]
    used: set[int] = set()

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        used.add(defense.surrogates.index(module))
        assert inputs[0].requires_grad and output.requires_grad
        assert not any(m.training for m in module.modules())

    for surrogate in defense.surrogates:
        surrogate.register_forward_hook(look)
    shown: list[Tensor] = []
    hook = base.module.register_forward_hook(lambda m, inputs, out: shown.append(inputs[0]))
    trained = fitting.train_or_load(of, base, train, CPU, lambda *_: None, defense)
    hook.remove()
    assert trained.meta["queries"] == sum(len(x) for x in shown) == asked
    assert all(torch.equal(x, x.clamp(0, 1)) for x in shown)  # clean images, never denoised ones
    assert len(used) == len(defense.surrogates) == 4
    for surrogate, state in zip(defense.surrogates, states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in surrogate.state_dict().items())


def test_surrogates_count_as_trained_here(base: BaseModel) -> None:
    fitted = fit(plan("access=query"), base)
    assert isinstance(fitted.defense, Denoiser)
    assert fitted.nominal == fitted.updated == parameters(fitted.defense)
    assert fitted.here == fitted.nominal + parameters(*fitted.defense.surrogates)
    assert sum(name.startswith("Surrogate") for name in fitted.parts) == 4


# Released denoisers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[released.DnCNN, Path]:
    """A checkpoint of the released code for grey images, and the file that bench convert makes of it."""
    folder = tmp_path_factory.mktemp("released")
    net = released.DnCNN(channels=1).eval()
    wrapped = torch.nn.DataParallel(net)  # as the released denoisers for ImageNet
    file = released.save(folder / "best.pth.tar", wrapped, arch="imagenet_dncnn")
    convert(file, folder / "best.safetensors", Stated())
    return net, folder / "best.safetensors"


@pytest.mark.parametrize("objective", ["mse", "stab", "clf", "stab+mse"])
def test_a_released_denoiser_is_used_as_it_is(
    objective: str, base: BaseModel, converted: tuple[released.DnCNN, Path]
) -> None:
    net, file = converted
    fitted = fit(plan(f"objective={objective}", f"weights={file}"), base)
    x = torch.from_numpy(digits()[1].pixels(np.arange(8)))
    with torch.no_grad():
        wanted = base.module(net(x + SIGMA * draw(8).normal(1, 8, 8)))
        got = fitted.defense.logits(x + SIGMA * draw(8).normal(1, 8, 8), draw(8))
    torch.testing.assert_close(got, wanted)
    assert (fitted.nominal, fitted.updated, fitted.here, fitted.queries, fitted.sha256) == (0, 0, 0, 0, None)
    assert fitted.elsewhere == parameters(net) == 558_400 - 2 * 2 * 64 * 9
    assert fitted.sources == ["best.safetensors"]
    assert list(fitted.parts.values()) == [file_sha256(file)]
    assert not fitted.uses_train_sigma
    (remark,) = fitted.notes
    assert "a DnCNN of depth 17 and width 64, trained elsewhere" in remark
    assert fitted.defense.context.base.most == Access.QUERY


def test_a_released_denoiser_records_no_schedule(converted: tuple[released.DnCNN, Path]) -> None:
    _, file = converted
    one = plan("objective=stab", f"weights={file}").config
    for other in (
        plan("objective=stab", f"weights={file}", "lr=.5", "epochs=7", "depth=9", "access=query").config,
        plan("objective=stab", f"weights={file}", dataset="digits", preset="paper").config,
    ):
        assert one == other
    assert (one.epochs, one.depth, one.width) == (0, 0, 0)


def test_a_released_denoiser_stands_in_the_record_and_the_report(
    bench: Bench, tmp_path: Path, converted: tuple[released.DnCNN, Path]
) -> None:
    _, file = converted
    ran = bench(
        *("run", "--defense", "denoiser", "--dataset", TINY, "--out", tmp_path, "--json"),
        *("--set", f"weights={file}", "--examples", 2, "--n", 20, "--alpha", 0.1),
    )
    assert ran.code == 0, ran.err
    (info,) = json.loads(ran.out)
    assert info["defense"]["trained_elsewhere"] == ["best.safetensors"]
    assert info["defense"]["trains"] == "training-free"
    assert file_sha256(file) in json.dumps(info["identity"])
    cells = (
        bench("report", tmp_path, "--columns", "all")
        .out.split(f"| denoiser weights={file} ")[1]
        .partition("\n")[0]
        .split("|")
    )
    assert "best.safetensors" in [cell.strip() for cell in cells]  # under extra data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"net.0.weight": None}, "no net.0.weight); convert the released checkpoint: bench convert FILE"),
        ({"net.0.weight": torch.rand(64, 3, 3, 3)}, "takes 3 channels, the images have 1"),
        ({"net.3.running_mean": None}, "net.3.running_mean is missing"),
        ({"other": torch.rand(2)}, "other is unknown to the model"),
    ],
)
def test_files_that_are_no_denoiser_are_refused(
    change: dict[str, Tensor | None],
    words: str,
    base: BaseModel,
    tmp_path: Path,
    converted: tuple[released.DnCNN, Path],
) -> None:
    state: dict[str, Tensor | None] = {**load_file(converted[1]), **change}
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "x.safetensors")
    with pytest.raises(BenchError) as e:
        construct(plan(f"weights={tmp_path / 'x.safetensors'}"), base)
    assert words in str(e.value)


def test_a_pickled_denoiser_names_the_command(base: BaseModel, converted: tuple[released.DnCNN, Path]) -> None:
    with pytest.raises(BenchError, match=r"bench convert .*best\.pth\.tar --to best\.safetensors"):
        construct(plan(f"weights={converted[1].with_suffix('.pth.tar')}"), base)


def test_a_truncated_or_wider_checkpoint_is_converted_or_refused(tmp_path: Path) -> None:
    wide = released.DnCNN(width=128).state_dict()
    torch.save(wide, tmp_path / "wide.pt")
    lines = convert(tmp_path / "wide.pt", tmp_path / "wide.safetensors", Stated())
    assert "recognised: a DnCNN of depth 17 and width 128 for 3 channels" in lines
    del wide["dncnn.3.weight"]
    torch.save(wide, tmp_path / "cut.pt")
    with pytest.raises(BenchError, match=r"cut.pt is not a DnCNN: net.3.weight is missing"):
        convert(tmp_path / "cut.pt", tmp_path / "cut.safetensors", Stated())


# The harness's contract ------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["full", "query"])
@pytest.mark.parametrize("objective", ["mse", "stab", "clf", "stab+mse"])
def test_it_conforms(objective: str, access: str) -> None:
    found = list(examine(plan(f"objective={objective}", f"access={access}")))
    assert [f for f in found if f.problem] == []
    assert len(found) == 7


@pytest.mark.parametrize(("stage", "access"), [("mse", "full"), ("fine-tuning", "query")])
def test_killed_and_resumed_gives_the_same_weights(
    stage: str, access: str, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = plan("objective=stab+mse", f"access={access}")
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "whole"))
    whole = fit(of, base)
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "parts"))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    forward, calls = DnCNN.forward, 0

    def dies(self: DnCNN, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == (5 if stage == "mse" else STEPS + 3):
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(DnCNN, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(of, base)
    killed_in = "msedenoiser" if stage == "mse" else "denoiser"
    assert list((tmp_path / "parts").glob(f"tiny-{killed_in}-*/checkpoint*.pt"))
    resumed = fit(of, base)
    tuning = STEPS // 4
    assert calls == STEPS + tuning + 1  # only the interrupted step was repeated
    assert same(resumed.defense, whole.defense)
    assert (
        (resumed.queries, resumed.parts)
        == (whole.queries, whole.parts)
        == (tuning * BATCH * (2 if access == "full" else 1), whole.parts)
    )


# The command line ------------------------------------------------------------------------------------


def test_the_mse_denoiser_is_trained_once(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))

    def run(objective: str) -> dict[str, Any]:
        ran = bench(
            *("run", "--defense", "denoiser", "--dataset", TINY, "--out", tmp_path / "runs", "--json"),
            *("--set", f"objective={objective}"),
        )
        assert ran.code == 0, ran.err
        (info,) = json.loads(ran.out)
        assert info["status"] == "complete"
        return info

    tuned, plain = run("stab+mse"), run("mse")
    assert len(list((tmp_path / "cache").glob("tiny-msedenoiser-*"))) == 1
    assert plain["identity"]["defense"]["parts"] == tuned["identity"]["defense"]["parts"] != {}
    assert 0 < plain["cost"]["train_seconds"] < tuned["cost"]["train_seconds"]  # the part's, and more than the part's
    # One network, counted once, whether it was trained in one stage or two.
    assert plain["cost"]["trained_here"] == tuned["cost"]["trained_here"] == tuned["cost"]["trainable_updated"]
    assert (plain["cost"]["trainable_nominal"], plain["identity"]["defense"]["weights"]) == (0, None)
    assert plain["cost"]["parameters"] == tuned["cost"]["parameters"]
    assert (plain["defense"]["access"], tuned["defense"]["access"]) == ("QUERY", "GRADIENT")
    assert plain["path"] != tuned["path"]


def test_weights_of_another_width_are_one_line(bench: Bench, tmp_path: Path) -> None:
    state = {f"denoiser.{k}": v for k, v in DnCNN(1, 5, 16).state_dict().items()}
    save_file(state, tmp_path / "narrow.safetensors")
    args = ("--weights", tmp_path / "narrow.safetensors", "--out", tmp_path / "runs")
    ran = bench("run", "--defense", "denoiser", "--dataset", TINY, *args)
    assert ran.code == 2
    assert "narrow.safetensors does not fit defense denoiser: denoiser.net.0.bias has shape [16]" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "depth=1"), "depth 1 and width 32 are too small for a DnCNN; set a depth of at least 2"),
        (("--set", "objective=stability"), "objective: Input should be 'mse', 'stab', 'clf' or 'stab+mse'"),
        (("--objective", "stability"), "denoiser has a loss of its own"),
    ],
)
def test_wrong_settings_are_one_line(bench: Bench, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    ran = bench("run", "--defense", "denoiser", "--dataset", TINY, "--out", tmp_path / "runs", *arguments)
    assert ran.code == 2
    assert words in ran.err
    assert "Traceback" not in ran.err
