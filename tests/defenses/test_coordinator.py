"""The coordinator: it only queries, keeps its budget, resumes exactly, reports divergence, has BlackVIP's size."""

from __future__ import annotations

import functools
import json
import shutil
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from bench.data.datasets import load_splits
from bench.errors import BenchError
from bench.interface import Access
from bench.io.files import cache_root
from bench.models.load import load_base, untrained_base
from bench.options import RunOptions
from bench.runs import fitting, search
from bench.runs.context import PartTraining
from bench.runs.doctor import examine
from bench.runs.identity import make_task
from bench.runs.plan import Plan, make_plans
from bench.smoothing.noise import Noise, Vote, VoteDraw
from bench.training import loop
from bench.training.spsa import SPSA
from defenses.coordinator import Coordinator
from tests.helpers.commands import TINY, Result
from tests.helpers.timmfolders import reconfigure, rewrite, save

CPU = torch.device("cpu")
STEP = 2 * 5 * 32  # queries: two sides, five directions, a batch


def plan(*settings: str, dataset: str = TINY, **arguments: Any) -> Plan:
    (made,) = make_plans(RunOptions(defenses="coordinator", dataset=dataset, settings=settings, **arguments))
    return made


def built(*settings: str, dataset: str = TINY, **arguments: Any) -> Any:
    """Build the untrained defense on an untrained base."""
    made = plan(*settings, dataset=dataset, **arguments)
    defense = fitting.construct(made, base := untrained_base(made.card, made.base, CPU), CPU)
    defense.keeps_alive = base  # type: ignore[assignment]
    return defense


@pytest.fixture
def encoder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with a random timm ViT in the hub's layout; the arguments are the model's."""

    def make(**args: Any) -> Path:
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch16_224", num_classes=0, **args)
        folder = tmp_path / "encoder"
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        size = args.get("img_size", 224)
        pretrained = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, size, size]}
        config = {"architecture": "vit_base_patch16_224", "model_args": args, "pretrained_cfg": pretrained}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize("method", ["spsa", "one-sided", "gradient"])
def test_every_method_conforms(method: str) -> None:
    found = list(examine(plan(f"method={method}")))  # spsa-gc, the default: test_conformance.py
    assert [f for f in found if f.problem] == []
    assert len(found) == 7


def test_only_the_gradient_method_needs_more_than_queries() -> None:
    kinds = ("spsa-gc", "spsa", "one-sided", "gradient")
    needed = [(p := plan(f"method={kind}")).cls.needs(p.config) for kind in kinds]
    assert needed == [Access.QUERY] * 3 + [Access.GRADIENT]


def _neighbours(thing: Any) -> Iterable[Any]:
    """Yield everything reachable from ``thing`` by attributes, items, closures and bound methods."""
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, list | tuple | set | frozenset):
        return thing
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.FunctionType):
        return [*(c.cell_contents for c in thing.__closure__ or ()), thing.__defaults__]
    return [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, s, None) for s in _slots(thing))]


def _slots(thing: Any) -> Iterator[str]:
    for kind in type(thing).__mro__:
        slots = getattr(kind, "__slots__", ())
        yield from [slots] if isinstance(slots, str) else slots


def _leaks(root: Any) -> list[Any]:
    """Return the modules, parameters and tensors with a gradient that are reachable from ``root``."""
    seen: dict[int, Any] = {}
    left, found = [root], []
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module | nn.Parameter) or (isinstance(thing, torch.Tensor) and thing.requires_grad):
            found.append(thing)
            continue
        left += _neighbours(thing)
    return found


def test_nothing_of_a_queried_base_can_be_reached() -> None:
    defense = built()
    assert _leaks(defense.context.base) == []
    with torch.enable_grad():
        out = defense.context.base(torch.rand(2, 1, 8, 8, requires_grad=True))
    assert not out.requires_grad and out.grad_fn is None
    white = built("method=gradient")
    assert white.context.base(torch.rand(2, 1, 8, 8, requires_grad=True)).requires_grad


def test_the_search_for_leaks_finds_them_where_they_hide() -> None:
    class Slotted:
        __slots__: ClassVar = ("hidden",)
        hidden: nn.Module

    slotted = Slotted()
    slotted.hidden = nn.Linear(1, 1)
    layer = nn.Linear(1, 1)
    hiding: list[Any] = [
        slotted,
        {"a": [layer]},
        lambda: layer,
        functools.partial(print, layer),
        layer.forward,
        types.SimpleNamespace(x=(layer.weight * 2,)),
    ]
    assert all(_leaks(h) for h in hiding)


def info(out: Path) -> dict[str, Any]:
    (file,) = out.glob("*/run.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize(("objective", "step"), [("gaussian", STEP), ("consistency", 2 * STEP)])
def test_the_budget_ends_training_and_queries_are_recorded(
    bench: Callable[..., Result], tmp_path: Path, objective: str, step: int
) -> None:
    budget = 2 * step + STEP
    arguments = ["--defense", "coordinator", "--dataset", TINY, "--examples", 2, "--out", tmp_path]
    result = bench("run", *arguments, "--objective", objective, "--set", f"queries={budget}")
    assert result.code == 0, result.err
    assert info(tmp_path)["cost"]["queries"] == budget // step * step <= budget
    assert info(tmp_path)["cost"]["trainable_nominal"] == info(tmp_path)["cost"]["trainable_updated"]
    assert info(tmp_path)["defense"]["access"] == "QUERY"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"queries={STEP - 1}", f"one step takes {STEP} queries; set at least --set queries={STEP}"),
        ("probes=0", "probes must be above 0"),
    ],
)
def test_impossible_settings_are_one_line(
    bench: Callable[..., Result], tmp_path: Path, setting: str, message: str
) -> None:
    arguments = ["--defense", "coordinator", "--dataset", TINY, "--sigma", 0.05, "--out", tmp_path]
    result = bench("run", *arguments, "--set", setting)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert all(p.suffix == ".log" for p in tmp_path.iterdir())  # no run folder


def test_divergence_says_what_to_tune(
    bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule for divergence is tested in test_spsa; here, losses rise as with too large a step."""
    monkeypatch.setattr(SPSA, "estimate", lambda self, loss, c: (self.momentum, 1.0 + self.k))
    result = bench("run", "--defense", "coordinator", "--dataset", TINY, "--out", tmp_path)
    assert result.code == 2
    assert "SPSA diverged: by step" in result.err
    assert "; tune with --set, in this order: a (lower), alpha (higher), p_eps (lower), b (lower)" in result.err
    assert "Traceback" not in result.err


def test_a_budget_that_an_objectives_step_exceeds_is_refused(bench: Callable[..., Result], tmp_path: Path) -> None:
    arguments = ["--defense", "coordinator", "--dataset", TINY, "--objective", "consistency", "--out", tmp_path]
    result = bench("run", *arguments, "--set", f"queries={STEP}")
    assert result.code == 2
    assert f"one step takes {2 * STEP} queries" in result.err


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["spsa-gc", "gradient"])
def test_a_killed_training_resumes_to_the_same_weights_and_queries(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    made = plan(f"method={method}", "queries=2400", "batch=8")
    train, validation = load_splits(made.card, "train", "validation")
    train = train.first(100)
    base = load_base(made.card, made.base, train, validation, CPU, lambda *_: None)

    def fit(progress: loop.Progress = lambda *_: None) -> fitting.Fitted:
        return fitting.fit(made, base, train, CPU, progress)

    def die(done: int, count: int, loss: float) -> None:
        if made.config.queries // count in (8, 80) and done == 20:  # not the encoder's training
            raise Killed

    whole = fit()
    # Everything except the shared encoder is deleted.
    for folder in cache_root().glob("tiny-coordinator-*"):
        shutil.rmtree(folder)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        fit(die)
    assert len(list(cache_root().glob("tiny-coordinator-*/checkpoint.pt"))) == 1
    resumed = fit()
    assert resumed.queries == whole.queries == 2400
    assert resumed.sha256 == whole.sha256


def test_all_probes_of_a_step_see_the_same_noise_and_the_encoder_sees_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan("queries=320", "p_eps=1e-30")  # too weak to change a pixel: the base gets the noisy images themselves
    (train,) = load_splits(made.card, "train")
    defense = fitting.construct(made, base := untrained_base(made.card, made.base, CPU), CPU)
    shown: list[torch.Tensor] = []
    encoded: list[torch.Tensor] = []
    base.module.register_forward_pre_hook(lambda m, inputs: shown.append(inputs[0].clone()))
    defense.encoder.register_forward_pre_hook(lambda m, inputs: encoded.append(inputs[0].clone()))  # type: ignore[union-attr]
    fitting.train_or_load(made, base, train.first(50), CPU, lambda *_: None, defense)
    assert len(shown) == 10
    assert all(torch.equal(x, shown[0]) for x in shown)
    assert [torch.equal(x, shown[0]) for x in encoded] == [False, True]  # the first is for the decoder's statistics


def test_at_paper_size_the_trained_parameters_are_those_of_blackvip(encoder: Callable[..., Path]) -> None:
    defense = built(f"encoder={encoder(depth=1)}", dataset="cifar10", preset="paper", base="vit")
    trained = {name: p.numel() for name, p in defense.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 9920
    assert trained["decoder.trigger"] == 800
    assert 0 <= defense.decoder.trigger.min() < defense.decoder.trigger.max() <= 0.1
    prompt = defense.decoder(torch.rand(2, 768))
    assert prompt.shape == (2, 3, 224, 224)
    paper = plan(dataset="cifar10", preset="paper", base="vit").config
    found = (paper.a, paper.c, paper.o, paper.alpha, paper.gamma, paper.b, paper.probes, paper.batch, paper.p_eps)
    assert found == (0.01, 0.01, 1, 0.4, 0.1, 0.9, 5, 128, 1)
    assert (paper.encoder, paper.units) == ("timm/vit_base_patch16_224.mae", "clip")


CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
# Range of CLIP-normalised pixels to which the released code clips an image with its prompt.
LOWEST = torch.tensor([-1.79226253, -1.75209713, -1.48021977]).view(3, 1, 1)
HIGHEST = torch.tensor([1.93033625, 2.07488384, 2.14589699]).view(3, 1, 1)


@pytest.mark.parametrize("p_eps", [1.0, 0.5])
def test_at_paper_the_prompt_is_added_in_clips_units_as_released(encoder: Callable[..., Path], p_eps: float) -> None:
    paper = {"dataset": "cifar10", "preset": "paper", "base": "vit"}
    defense = built(f"encoder={encoder(**SMALL)}", f"p_eps={p_eps}", **paper)
    shown: list[torch.Tensor] = []
    defense.context.base = lambda x: shown.append(x) or torch.zeros(len(x), 10)
    prompt = 2 * torch.randn(4, 3, 32, 32)
    defense.decoder = nn.Module()
    defense.decoder.forward = lambda features: prompt
    x = 0.5 + 0.5 * torch.randn(4, 3, 32, 32)
    defense.logits(x, VoteDraw(Noise(0, "x"), [Vote("check", 0, i) for i in range(4)], 0.25, CPU))
    released = ((x - CLIP_MEAN) / CLIP_STD + p_eps * prompt).clamp(LOWEST, HIGHEST) * CLIP_STD + CLIP_MEAN
    torch.testing.assert_close(shown[0], released, atol=2e-6, rtol=0)
    assert ((shown[0] > 0) & (shown[0] < 1)).float().mean() > 0.2


@pytest.mark.parametrize(
    ("units", "channels", "weights"),
    [
        ("pixels", 3, [0.5, 0.5, 0.5]),
        ("clip", 3, [0.5 * 0.26862954, 0.5 * 0.26130258, 0.5 * 0.27577711]),
        ("clip", 1, [0.5 * (0.26862954 + 0.26130258 + 0.27577711) / 3]),
    ],
)
def test_the_weight_of_a_prompt_is_said(units: str, channels: int, weights: list[float]) -> None:
    notes: list[str] = []
    context = types.SimpleNamespace(shape=(channels, 8, 8), note=notes.append)
    defense: Any = types.SimpleNamespace(context=context, config=types.SimpleNamespace(units=units, p_eps=0.5))
    found = Coordinator._prompt_weight(defense)
    assert found.shape == (channels, 1, 1)
    assert found.flatten().tolist() == pytest.approx(weights, rel=1e-6)
    said = {
        ("clip", 3): ["coordinator: p_eps=0.5 of CLIP's standard deviations: 0.134 0.131 0.138 of the pixel range"],
        ("clip", 1): ["coordinator: p_eps=0.5 of CLIP's standard deviations: 0.134 of the pixel range"],
    }
    assert notes == said.get((units, channels), [])
    context.shape = (2, 8, 8)
    if units == "clip":
        with pytest.raises(BenchError, match="units=clip is for 1 or 3 channels, the images have 2; use pixels"):
            Coordinator._prompt_weight(defense)


def last_block(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """The class token that the last block of a ViT gives, from its weights alone (Dosovitskiy et al. 2021)."""

    def linear(name: str, z: torch.Tensor) -> torch.Tensor:
        return z @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, z: torch.Tensor) -> torch.Tensor:
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return z * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    z = torch.nn.functional.conv2d(x, kernel, state["patch_embed.proj.bias"], kernel.shape[-1]).flatten(2).mT
    z = torch.cat([state["cls_token"].expand(len(x), -1, -1), z], 1) + state["pos_embed"]
    for i in range(1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))):
        parts = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", z)).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
        mixed = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        z = z + linear(f"blocks.{i}.attn.proj", mixed)
        inner = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", z))
        z = z + linear(f"blocks.{i}.mlp.fc2", 0.5 * inner * (1 + torch.erf(inner / 2**0.5)))
    return z[:, 0]


@pytest.mark.parametrize("units", ["clip", "pixels"])
def test_the_encoder_gives_the_last_blocks_token_of_the_image_that_it_was_released_for(
    tmp_path: Path, units: str
) -> None:
    """In CLIP's statistics, as at paper, or in those of its config; enlarged bicubically, as the config says."""
    shape = {**SMALL, "depth": 2}
    model: Any = save(tmp_path / "m", classes=0, **shape)
    for name in ("weight", "bias"):
        nn.init.uniform_(getattr(model.norm, name), 2, 3)  # a norm that would be noticed
    rewrite(tmp_path / "m", lambda _: model.state_dict())
    defense = built(f"encoder={tmp_path / 'm'}", f"units={units}")
    x = torch.rand(3, 1, 8, 8)
    big = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
    seen = (big - CLIP_MEAN) / CLIP_STD if units == "clip" else (big - 0.5) / 0.5
    torch.testing.assert_close(defense.encode(x), last_block(model.state_dict(), seen, 2), atol=2e-5, rtol=0)


def test_the_first_lines_say_what_encoder_and_prompt_get(encoder: Callable[..., Path]) -> None:
    folder = encoder(**SMALL)
    said = {}
    for units in ("clip", "pixels"):
        made = plan(f"encoder={folder}", f"units={units}")
        (train,) = load_splits(made.card, "train")
        training = PartTraining(train.first(1), lambda *_: None, most=1)
        fitting.construct(made, untrained_base(made.card, made.base, CPU), CPU, training)
        said[units] = training.notes
    start, end = (
        f"coordinator: encoder {folder}: images are resized to 32x32 (bicubic), mean and std are ",
        "; class token",
    )
    assert said["clip"] == [
        "coordinator: p_eps=0.5 of CLIP's standard deviations: 0.134 of the pixel range",
        f"{start}CLIP's, as in BlackVIP's code{end} before its last norm",
    ]
    assert said["pixels"] == [f"{start}from config.json{end} before its last norm"]


def test_an_encoders_interpolation_that_cannot_be_done_is_refused(encoder: Callable[..., Path]) -> None:
    folder = encoder(**SMALL)
    pretrained = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    reconfigure(folder, pretrained_cfg={**pretrained, "interpolation": "lanczos"})
    with pytest.raises(BenchError, match=r"coordinator: encoder .*: interpolation 'lanczos' of its config cannot be"):
        built(f"encoder={folder}")


@pytest.mark.slow
def test_an_encoder_from_files_trains_and_its_statistics_stay_fixed(encoder: Callable[..., Path]) -> None:
    made = plan(f"encoder={encoder(**SMALL)}", "queries=24", "batch=4", "probes=1", "a=1e-4")
    train, validation = load_splits(made.card, "train", "validation")
    base = load_base(made.card, made.base, train.first(50), validation, CPU, lambda *_: None)
    statistics = []
    for steps in (1, 3):
        short = replace(made, config=replace(made.config, queries=steps * 8))
        fitted = fitting.fit(short, base, train.first(50), CPU, lambda *_: None)
        module = fitted.defense.get_submodule("encoder")
        assert fitted.elsewhere == sum(p.numel() for p in module.parameters())
        statistics.append([b for n, b in fitted.defense.named_buffers() if "running" in n])
    assert all(torch.equal(a, b) for a, b in zip(*statistics, strict=True))
    assert not torch.equal(statistics[0][0], torch.zeros_like(statistics[0][0]))  # taken from a batch, not the default
    assert not fitted.defense.training
    # The output of BlackVIP's decoder, too, is a function of each image alone.
    found = list(examine(made))
    assert [f for f in found if f.problem] == []


def test_the_encoder_normalises_grey_images_as_its_config_says(encoder: Callable[..., Path]) -> None:
    defense = built(f"encoder={encoder(**SMALL)}")
    x = torch.full((1, 1, 8, 8), 0.5)
    seen = defense.encoder.model.forward_features(torch.zeros(1, 3, 32, 32))[:, 0]
    assert torch.allclose(defense.encode(x), seen, atol=1e-6)
    # Encoder and base only get pixels in [0, 1].
    assert torch.equal(defense.encode(x + 9), defense.encode(torch.ones_like(x)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "its config has no timm architecture"),
        (None, "has no file 'config.json'"),
    ],
)
def test_an_unsuitable_encoder_is_one_line(
    bench: Callable[..., Result], tmp_path: Path, config: str | None, message: str
) -> None:
    (folder := tmp_path / "encoder").mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    out = tmp_path / "runs"
    result = bench("run", "--defense", "coordinator", "--dataset", TINY, "--set", f"encoder={folder}", "--out", out)
    assert result.code == 2
    assert message in result.err


def test_an_encoder_as_timm_saves_it_is_read_with_or_without_its_head(tmp_path: Path) -> None:
    features = []
    for classes in (0, 5):
        model: Any = save(tmp_path / str(classes), classes=classes, **SMALL)
        defense = built(f"encoder={tmp_path / str(classes)}")
        assert sum(p.numel() for p in defense.encoder.parameters()) < sum(p.numel() for p in model.parameters()) + 1
        x = torch.rand(2, 1, 8, 8)
        features.append(defense.encode(x))
        big = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
        model.norm = nn.Identity()
        assert torch.allclose(features[-1], model.forward_features(big * 2 - 1)[:, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "kind"),
    [
        ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}, "VisionTransformer"),
        ("resnet10t", {"in_chans": 3}, "ResNet"),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]},
            "Swin",
        ),
    ],
)
def test_an_encoder_without_class_token_is_refused_by_name(
    tmp_path: Path, name: str, args: dict[str, Any], kind: str
) -> None:
    save(tmp_path / "m", name, classes=0, **args)
    with pytest.raises(BenchError, match=rf"this {kind}\w* has no class token"):
        built(f"encoder={tmp_path / 'm'}")


def test_the_base_gets_pixels_between_0_and_1() -> None:
    defense = built("p_eps=1")
    shown: list[torch.Tensor] = []
    defense.context.base = lambda x: shown.append(x) or torch.zeros(len(x), 10)
    nn.init.normal_(defense.decoder.body.weight)
    votes = [Vote("check", 0, i) for i in range(4)]
    defense.logits(3 * torch.randn(4, 1, 8, 8), VoteDraw(Noise(0, "x"), votes, 0.25, CPU))
    assert shown[0].min() == 0 and shown[0].max() == 1
    assert ((shown[0] > 0) & (shown[0] < 1)).any()


@pytest.mark.slow
def test_on_digits_it_helps_more_than_clipping_and_less_than_with_gradients() -> None:
    made = plan(dataset="digits")
    train, validation = load_splits(made.card, "train", "validation")
    base = load_base(made.card, made.base, train, validation, CPU, lambda *_: None)
    task = make_task(made, validation, CPU)

    def score(made: Plan) -> float:
        fitted = fitting.fit(made, base, train, CPU, lambda *_: None)
        assert fitted.queries <= made.config.queries
        with torch.inference_mode():
            return search.accuracy_under_noise(fitted.defense, task, len(validation))

    class Clip(nn.Module):
        def forward(self, x: torch.Tensor, draw: object) -> Any:
            return base.module(x.clamp(0, 1))

    with torch.inference_mode():
        clip = search.accuracy_under_noise(Clip(), task, len(validation))
    found = score(made)
    ceiling = score(plan("method=gradient", "queries=64000", dataset="digits"))
    assert clip + 0.03 < found < ceiling + 0.02, np.array([clip, found, ceiling])
