"""Clean training of base classifiers: what each key of a recipe's schedule does, and resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import globalstate
from bench.data.card import Card
from bench.data.datasets import load_card, load_split
from bench.data.split import Split
from bench.errors import BenchError
from bench.interface import Draw, Schedule
from bench.models.load import load_base
from bench.models.recipes import recipe_base
from bench.smoothing.noise import Noise, TrainDraw
from bench.training import clean, loop, objectives
from bench.training.clean import CleanSchedule

CPU = torch.device("cpu")
CLASSES = 3
MEAN = (0.5, 0.4, 0.3)
RNG = np.random.default_rng(0)
DATA = Split("train", RNG.integers(0, 256, (60, 3, 8, 8)).astype(np.uint8), RNG.integers(0, CLASSES, 60), 256)
DRAW = TrainDraw(Noise(0, "train"), 0, 8, 0.0, CPU)
EVERY_KEY = {
    "label_smoothing": 0.1,
    "randaugment": "rand-m6-n2-mstd0.5",
    "mixup": 0.2,
    "cutmix": 1.0,
    "clip_grad": 1.0,
    "arithmetic": "bfloat16",
}


class Recorded(nn.Module):
    """A linear classifier that keeps its last input and logits."""

    def __init__(self) -> None:
        super().__init__()
        with globalstate.fixed_rng(2):
            self.layer = nn.Linear(3 * 8 * 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().clone()
        self.out: Tensor = self.layer(x.flatten(1))
        return self.out


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(DATA.pixels(np.arange(rows))), torch.from_numpy(DATA.labels[:rows])


def computed(schedule: CleanSchedule, key: int = 0) -> tuple[Tensor, Recorded]:
    module, (x, y) = Recorded(), batch()
    with globalstate.fixed_rng(key):
        return clean.loss(module, schedule, CLASSES, MEAN)(x.clone(), y, DRAW).detach(), module


def expected(module: Recorded, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with soft targets, (1 - smoothing) of it, and smoothing times that with uniform targets."""
    logs = module.layer(module.seen.flatten(1)).detach().log_softmax(1)
    own, uniform = -(target * logs).sum(1).mean(), -logs.mean(1).mean()
    return (1 - smoothing) * own + smoothing * uniform


def tiny_card(folder: Path, keys: str) -> Card:
    """Load the tests' card of digits with further keys in the schedule of its recipe vit."""
    text, file = (Path(__file__).parents[1] / "tiny.toml").read_text(), folder / "card.toml"
    file.write_text(text.replace("lr = 4e-3 }", f"lr = 4e-3, {keys} }}", 1))
    return load_card(str(file))


def one_hot() -> Tensor:
    return F.one_hot(batch()[1], CLASSES).float()


def test_label_smoothing_mixes_the_label_with_all_classes() -> None:
    value, module = computed(CleanSchedule(label_smoothing=0.2))
    torch.testing.assert_close(value, expected(module, one_hot(), 0.2))
    assert torch.equal(module.seen, batch()[0])
    assert abs(float(value) - float(expected(module, one_hot()))) > 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_averages_two_images_and_their_labels_with_one_weight(smoothing: float) -> None:
    weights = []
    for key in range(4):
        value, module = computed(CleanSchedule(mixup=1.0, label_smoothing=smoothing), key)
        x, other = batch()[0], batch()[0].flip(0)
        weight = float(((module.seen - other) * (x - other)).sum() / (x - other).square().sum())
        torch.testing.assert_close(module.seen, weight * x + (1 - weight) * other)
        target = weight * one_hot() + (1 - weight) * one_hot().flip(0)
        torch.testing.assert_close(value, expected(module, target, smoothing))
        weights.append(weight)
    assert len({round(w, 6) for w in weights}) == 4 and all(0 <= w <= 1 for w in weights)


def test_cutmix_pastes_a_box_and_weighs_the_labels_by_its_area() -> None:
    areas = []
    for key in range(4):
        value, module = computed(CleanSchedule(cutmix=1.0), key)
        x, other = batch()[0], batch()[0].flip(0)
        pasted = (module.seen != x).any(0).any(0)
        assert torch.equal(module.seen, torch.where(pasted, other, x))
        rows, columns = (pasted.any(1 - side).nonzero().flatten() for side in (0, 1))
        assert pasted.sum() == len(rows) * len(columns)  # a box
        share = float(pasted.float().mean())
        target = (1 - share) * one_hot() + share * one_hot().flip(0)
        torch.testing.assert_close(value, expected(module, target))
        areas.append(share)
    assert max(areas) > 0


def test_randaugment_changes_most_images_within_their_levels_and_follows_the_random_state() -> None:
    x, found = batch(32)[0], []
    augment = clean.randaugment("rand-m6-n2", MEAN)
    for key in (0, 0, 1):
        with globalstate.fixed_rng(key):
            found.append(augment(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].shape == x.shape and found[0].dtype == torch.float32
    assert torch.equal((found[0] * 255).round() / 255, found[0]) and found[0].min() >= 0 and found[0].max() <= 1
    changed = (found[0] != x).flatten(1).any(1)
    assert changed.float().mean() > 0.5


def test_randaugment_fills_with_the_mean_and_leaves_images_alone_at_no_operation() -> None:
    grey = torch.arange(64.0).reshape(1, 1, 8, 8) / 255
    assert torch.equal(clean.randaugment("rand-n0", (0.5,))(grey), grey)
    colour = batch(4)[0]
    assert torch.equal(clean.randaugment("rand-n0", MEAN)(colour), colour)
    with globalstate.fixed_rng(0):
        many = clean.randaugment("rand-m10-n1", (0.5,))(torch.zeros(200, 1, 8, 8))
    assert bool((many == 128 / 255).any())  # a black image gets this grey from nothing but what moves into it


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("randaugment", '"rand-mfew"', "match pattern"),  # timm would take its default magnitude instead
        ("randaugment", '"augmix-m3"', "match pattern"),
        ("randaugment", '"rand-m6-n2"', "256 levels"),  # the digits have 17
        ("label_smoothing", "1.0", "less than 1"),
        ("clip_grad", "-1", "greater than or equal to 0"),
        ("arithmetic", '"float16"', "'float32' or 'bfloat16'"),
    ],
)
def test_wrong_keys_are_refused_by_name(tmp_path: Path, key: str, text: str, problem: str) -> None:
    with pytest.raises(BenchError, match=rf"bases\.vit\.schedule\.{key}: .*{problem}"):
        recipe_base(tiny_card(tmp_path, f"{key} = {text}"), "vit")


def trained(folder: Path, module: nn.Module, loss: Any, schedule: Schedule, clip: float = 0.0) -> nn.Module:
    folder.mkdir(exist_ok=True)
    job = loop.TrainingJob(DATA, ("crop", "flip"), 0.0, objectives.clean, 3, CPU, folder / "c.pt", lambda *_: None)
    job.train(module, loss, schedule, clip)
    return module


def test_a_gradient_longer_than_clip_grad_is_shortened_to_it(tmp_path: Path) -> None:
    moves = {}
    for clip in (0.0, 0.5, 1e6):
        weight = nn.Linear(3, 1, bias=False)
        before = weight.weight.detach().clone()
        schedule = Schedule(1, batch=60, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, decay="constant")
        trained(tmp_path / str(clip), weight, lambda x, y, d, w=weight: 2 * w.weight.sum(), schedule, clip)
        moves[clip] = (before - weight.weight.detach()).flatten()
    torch.testing.assert_close(moves[0.0], torch.full((3,), 2.0))  # one step on a slope of 2 in each of three weights
    torch.testing.assert_close(moves[0.5], torch.full((3,), 0.5 / 3**0.5))
    torch.testing.assert_close(moves[1e6], moves[0.0])


def test_bfloat16_computes_the_logits_and_leaves_weights_and_loss_in_float32() -> None:
    value, module = computed(CleanSchedule(arithmetic="bfloat16"))
    plain, _ = computed(CleanSchedule())
    assert module.out.dtype == torch.bfloat16 and value.dtype == module.layer.weight.dtype == torch.float32
    assert 0 < abs(float(value) - float(plain)) < 0.05


class Watched(timm.layers.Attention):
    """timm's attention, which notes how it was computed and can fail."""

    how, fails = "", False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.how = "fused" if self.fused_attn else "products"
        if self.fails:
            raise RuntimeError("no memory left")
        return super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("fails", [False, True])
def test_bfloat16_on_a_cpu_multiplies_out_attention_and_gives_it_back(fails: bool) -> None:
    with globalstate.fixed_rng(4):
        attention = Watched(4, num_heads=2)
    module = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), attention, nn.Flatten(), nn.Linear(32, CLASSES))
    assert attention.fused_attn, "timm fuses attention by default"
    x, y = batch()
    values = {}
    for kind in ("float32", "bfloat16"):
        of = clean.loss(module, CleanSchedule(arithmetic=kind), CLASSES, MEAN)
        attention.fails = fails and kind == "bfloat16"
        if attention.fails:
            with pytest.raises(RuntimeError, match="no memory"):
                of(x, y, DRAW)
        else:
            values[kind] = float(of(x, y, DRAW).detach())
        assert attention.how == ("fused" if kind == "float32" else "products")
        assert attention.fused_attn
    assert fails or 0 < abs(values["float32"] - values["bfloat16"]) < 0.05


def network() -> nn.Module:
    with globalstate.fixed_rng(1):
        stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
        return nn.Sequential(stem, nn.Linear(144, CLASSES))


class Killed(Exception):
    pass


@pytest.mark.parametrize("keys", [{}, EVERY_KEY])
def test_a_killed_training_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    schedule = CleanSchedule(epochs=4, batch=8, lr=0.01, **keys)

    def run(folder: Path, die_at: int = 0) -> nn.Module:
        module, calls = network(), 0
        loss = clean.loss(module, schedule, CLASSES, MEAN)

        def counted(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == die_at:
                raise Killed
            return loss(x, y, draw)

        return trained(folder, module, counted, schedule, schedule.clip_grad)

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        run(tmp_path / "killed", die_at=17)
    assert (tmp_path / "killed" / "c.pt").exists()
    resumed = run(tmp_path / "killed")
    for (key, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_a_recipe_without_keys_of_its_own_trains_as_the_objective_clean_and_keeps_its_identity(tmp_path: Path) -> None:
    """So that bases in a cache of an earlier version are found again, and are what would be trained now."""
    given = {"epochs": 3.0, "batch": 16, "lr": 4e-3, "weight_decay": 0.05, "warmup": 0.2}
    schedule, plain = CleanSchedule(**given), Schedule(**given)  # type: ignore[arg-type]
    assert schedule.identity() == asdict(plain) and not schedule.own()
    one, other = network(), network()
    trained(tmp_path / "one", one, clean.loss(one, schedule, CLASSES, MEAN), schedule)
    trained(tmp_path / "other", other, lambda x, y, d: objectives.clean(lambda z, _: other(z), x, y, d), plain)
    for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("key", EVERY_KEY)
def test_each_key_is_part_of_the_identity_and_changes_the_weights(tmp_path: Path, key: str) -> None:
    base = CleanSchedule(epochs=1, batch=20, lr=0.01)
    value = {"clip_grad": 0.01}.get(key, EVERY_KEY[key])
    changed = CleanSchedule(**{**base.identity(), key: value})
    assert changed.identity() == {**base.identity(), key: value}

    def weights(folder: str, schedule: CleanSchedule) -> Tensor:
        module = Recorded()
        # Without momentum and Adam's scaling, so that a shorter gradient is a shorter step.
        sgd = Schedule(1, batch=20, optimizer="sgd", lr=0.1, momentum=0.0)
        loss: Callable[..., Tensor] = clean.loss(module, schedule, CLASSES, MEAN)
        trained(tmp_path / folder, module, loss, sgd, schedule.clip_grad)
        return module.layer.weight.detach()

    assert not torch.equal(weights("base", base), weights("changed", changed))


def test_a_base_records_its_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path))
    card = tiny_card(tmp_path, 'arithmetic = "bfloat16", label_smoothing = 0.1')
    train, validation = load_split(card, "train").first(64), load_split(card, "validation").first(20)
    base = load_base(card, "vit", train, validation, CPU, lambda *_: None)
    assert {"arithmetic": "bfloat16", "label_smoothing": 0.1, "epochs": 10}.items() <= base.meta["schedule"].items()
    (entry,) = tmp_path.glob("tiny-base-vit-*/meta.json")
    assert '"arithmetic": "bfloat16"' in entry.read_text() and f'"clean": {clean.VERSION}' in entry.read_text()
