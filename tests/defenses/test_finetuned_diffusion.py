"""FT-CADIS: its loss and attack compared with formulas written here, its schedule, and its training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench import globalstate
from bench.data.datasets import load_split
from bench.errors import BenchError
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.doctor import examine
from bench.runs.plan import Plan, make_plans
from bench.smoothing.noise import Noise
from bench.training import loop
from defenses import finetuned_diffusion as ours
from tests.helpers.commands import TINY, Bench

CPU = torch.device("cpu")
NAME = "finetuned-diffusion"


def plan(*settings: str) -> Plan:
    (found,) = make_plans(RunOptions(defenses=NAME, dataset=TINY, settings=settings))
    return found


def build(*settings: str) -> Any:
    found = plan(*settings)
    with globalstate.fixed_rng(7):
        base = untrained_base(found.card, found.base, CPU)
    return fitting.construct(found, base, CPU)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The loss -------------------------------------------------------------------------------------------------


def reference_loss(logits: Tensor, moved: Tensor, y: Tensor, weight: float) -> Tensor:
    """Equations of the paper, image by image."""
    total = torch.zeros(())
    for i, label in enumerate(y.tolist()):
        copies = [F.cross_entropy(logits[k, i], y[i]) for k in range(len(logits))]
        right = [k for k in range(len(logits)) if int(logits[k, i].argmax()) == label]
        selected = right or [min(range(len(logits)), key=lambda k: copies[k].item())]
        total = total + sum((copies[k] for k in selected), torch.zeros(())) / len(logits)
        if len(right) == len(logits):
            mean = torch.stack([logits[k, i].softmax(0) for k in range(len(logits))]).mean(0)
            far = [(mean * (mean.log() - moved[k, i].log_softmax(0))).sum() for k in range(len(logits))]
            total = total + weight * torch.stack(far).max()
    return total / len(y)


def test_value_and_gradient_of_the_loss_are_those_of_the_formula() -> None:
    logits, moved = 2 * random(1, 3, 60, 4), 2 * random(2, 3, 60, 4)
    y = torch.arange(60) % 4
    logits[:, :20, :] += 6 * F.one_hot(y[:20], 4)  # recognised in all copies
    right = (logits.argmax(2) == y).sum(0)
    assert {int(n) for n in right} == {0, 1, 2, 3}
    found = []
    for loss in (ours.confidence_aware, reference_loss):
        a, b = logits.clone().requires_grad_(), moved.clone().requires_grad_()
        value = loss(a, b, y, 4.0)
        found.append((value, *torch.autograd.grad(value, (a, b))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert found[0][2][:, right < 3].eq(0).all()  # the adversarial loss is masked


def test_certain_predictions_give_finite_gradients() -> None:
    """Probabilities that are 0 in float32, for which p log p has no gradient."""
    logits = torch.tensor([[[300.0, 0, -300]], [[300.0, -300, 0]]]).requires_grad_()
    moved = torch.tensor([[[-300.0, 300, 0]], [[300.0, 0, 0]]]).requires_grad_()
    value = ours.confidence_aware(logits, moved, torch.tensor([0]), 4.0)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (logits, moved)))


# The attack -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small network of images [N, 2, 4, 4] with a batch norm; records in which mode it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5))
        with torch.no_grad():
            for i, p in enumerate(self.layers.parameters()):
                p.copy_(0.5 * random(i, *p.shape))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        out: Tensor = self.layers(self.norm(x))
        return out


def reference_attack(net: nn.Module, clean: Tensor, denoised: Tensor, target: Tensor, eps: float, steps: int) -> Tensor:
    """The released attack in its own unit, pixels of [-1, 1], one image after another."""
    moved: list[Tensor] = []
    for x, d in zip(2 * clean - 1, 2 * denoised - 1, strict=True):
        i = len(moved) % len(target)
        start = d - x
        mu, size = start.mean(), start.square().mean().sqrt()
        error = start
        for _ in range(steps):
            error = error.detach().requires_grad_()
            log_q = net(((x + error + 1) / 2)[None]).log_softmax(1)[0]
            (g,) = torch.autograd.grad(F.kl_div(log_q, target[i], reduction="sum"), error)
            error = error.detach() + 2 * eps / steps * g / (g.norm() + 1e-8)
            shift = error - start
            shift = shift * min(1.0, eps / float(shift.norm()))
            error = start + shift
            error = mu + (error - error.mean()) / error.square().mean().sqrt() * size
        moved.append((x + error + 1) / 2)
    return torch.stack(moved).detach()


def attacked(steps: int, eps: float = 0.125, seed: int = 3) -> tuple[Net, Tensor, Tensor, Tensor, Tensor]:
    net, x = Net().eval(), random(seed, 6, 2, 4, 4).sigmoid()
    denoised = (x.repeat(3, 1, 1, 1) + 0.1 * random(seed + 1, 18, 2, 4, 4)).clamp(0, 1)

    def classify(images: Tensor) -> Tensor:
        out: Tensor = net(images)
        return out.view(3, -1, 5)

    target = ours.log_mean(classify(denoised)).detach()
    return net, x, denoised, target, ours.attack(classify, x, denoised, target, eps, steps)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_attack_is_the_released_one(steps: int) -> None:
    net, x, denoised, target, moved = attacked(steps)
    wanted = reference_attack(net, x.repeat(3, 1, 1, 1), denoised, target.exp(), 0.25, steps)
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=0)


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.125, 0.5]), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_attack_moves_predictions_and_keeps_the_size_of_the_error(seed: int, eps: float, steps: int) -> None:
    net, x, denoised, target, moved = attacked(steps, eps, seed)
    clean = x.repeat(3, 1, 1, 1)
    for one, other in zip(ours._moments(moved - clean), ours._moments(denoised - clean), strict=True):
        # Of the error's root mean square, 0.1: the two moments cannot both be exact unless the mean is 0.
        torch.testing.assert_close(one, other, atol=0.02, rtol=0)
    with torch.no_grad():
        before, after = (ours.divergence(target, net(z).view(3, -1, 5)) for z in (denoised, moved))
    assert after.mean() > before.mean()
    # The projection alone keeps the ball; restoring the moments then shrinks or stretches the error a little.
    step = (moved - denoised).flatten(1).norm(dim=1)
    error = (denoised - clean).flatten(1).norm(dim=1)
    assert (step <= eps + 2 * error).all()


def test_no_gradient_and_no_error_give_no_nan() -> None:
    x = torch.full((2, 1, 4, 4), 0.5)

    def constant(images: Tensor) -> Tensor:
        return 0 * images.flatten(1)[:, :3].view(2, 2, 3)

    target = torch.full((2, 3), 1 / 3).log()
    moved = ours.attack(constant, x, x.repeat(2, 1, 1, 1), target, 0.125, 2)
    assert torch.equal(moved, x.repeat(2, 1, 1, 1))


def test_the_attack_runs_in_eval_mode_which_is_restored_after_errors() -> None:
    net = Net().train()
    net.norm.eval()  # one that training keeps so
    before = net.norm.running_mean.clone()  # type: ignore[union-attr]

    def stopped() -> None:
        with loop.TrainingDraw(Noise(0, "train"), 0, 1, torch.arange(4), 0.25, CPU, [net]).evaluating():
            net(torch.rand(4, 2, 4, 4))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert net.modes == [False]
    assert (net.training, net.layers.training, net.norm.training) == (True, True, False)
    assert torch.equal(net.norm.running_mean, before)  # type: ignore[arg-type]


def test_a_step_denoises_copies_and_trains_the_classifier_alone() -> None:
    made = build("copies=3", "attack_steps=2", "classifier=full")
    calls: list[tuple[str, int, bool]] = []
    made.diffusion.unet.register_forward_hook(lambda m, i, o: calls.append(("unet", len(i[0]), False)))
    made.classifier.model.register_forward_hook(lambda m, i, o: calls.append(("classifier", len(i[0]), m.training)))
    loop.train_mode(made.classifier)
    draw = loop.TrainingDraw(Noise(0, "train"), 0, 1, torch.arange(4), 0.25, CPU, [made.classifier])
    value = made.loss(torch.rand(4, 1, 8, 8), torch.arange(4), draw, None)
    # Three copies are denoised; one pass of all copies, two in the attack, one of the moved copies.
    modes = [True, False, False, True]
    assert calls == [("unet", 4, False)] * 3 + [("classifier", 12, mode) for mode in modes]
    value.backward()
    assert all(p.grad is None for p in made.diffusion.unet.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in made.classifier.parameters())


# The schedule ---------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_released_code_for_a_vit() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=12)
    found = ours.groups(dict(net.named_parameters()), 0.65)
    of = {id(p): (g["scale"], g["decayed"]) for g in found for p in g["params"]}
    named = {name: of[id(p)] for name, p in net.named_parameters()}
    assert len(of) == len(named)
    assert named["cls_token"] == named["pos_embed"] == (0.65**13, False)
    assert named["patch_embed.proj.weight"] == (0.65**13, True)
    assert named["blocks.0.attn.qkv.weight"] == (0.65**12, True)
    assert named["blocks.11.mlp.fc1.weight"] == (0.65, True)
    assert named["blocks.11.mlp.fc1.bias"] == named["blocks.11.norm1.weight"] == (0.65, False)
    assert named["norm.weight"] == (1, False)
    assert named["head.weight"] == (1, True)


def test_rates_are_those_of_the_released_schedule() -> None:
    (found,) = make_plans(RunOptions(defenses=NAME, dataset="digits", preset="paper", settings=("unet=x",)))
    config = found.config
    epochs, warm, lr, least = 30, 3, 5e-5, 1e-6
    for epoch in (0, 1.5, 3, 10, 29.9):
        wanted = lr * epoch / warm
        if epoch >= warm:
            wanted = least + (lr - least) * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))
        assert ours.rate(config, epoch / epochs) == pytest.approx(wanted)
        decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * epoch / epochs))
        assert ours._cosine(config.weight_decay, config.weight_decay_end, epoch / epochs) == pytest.approx(decay)


class Killed(Exception):
    pass


def trained(folder: Path, die_at: int = 0, *settings: str) -> dict[str, Tensor]:
    """Train on 64 images in a folder of its own, and die after a step if asked."""

    def progress(done: int, count: int, value: float) -> None:
        if done == die_at:
            raise Killed

    made = build("batch=16", "epochs=5", *settings)
    folder.mkdir(exist_ok=True)
    data = load_split(plan().card, "train").first(64)
    objective: Any = None
    job = loop.TrainingJob(data, (), 0.25, objective, 3, CPU, folder / "checkpoint.pt", progress, [])
    made.fit(job)
    return dict(made.classifier.state_dict())


def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    settings = ("classifier=full", "attention_dropout=.3", "layer_decay=.8", "weight_decay=.1", "clip=.3")
    undisturbed = trained(tmp_path / "a", 0, *settings)
    with pytest.raises(Killed):
        trained(tmp_path / "b", 10, *settings)
    assert (tmp_path / "b" / "checkpoint.pt").exists()
    resumed = trained(tmp_path / "b", 0, *settings)
    for key, value in undisturbed.items():
        assert torch.equal(resumed[key], value), key


def test_each_setting_changes_what_is_trained(tmp_path: Path) -> None:
    def weights(*settings: str) -> dict[str, Tensor]:
        return trained(tmp_path / ",".join(settings), 0, "classifier=full", "epochs=2", *settings)

    plain, again = weights(), weights("warmup=.1")
    assert all(torch.equal(again[k], v) for k, v in plain.items())
    for setting in ("clip=.05", "weight_decay=3", "weight_decay_end=3", "layer_decay=.5", "min_lr=.01", "eps=1"):
        changed = weights(setting)
        assert any(not torch.equal(changed[k], v) for k, v in plain.items()), setting


def test_the_attentions_dropout_rises_from_block_to_block(bench: Bench) -> None:
    (found,) = make_plans(RunOptions(defenses=NAME, dataset="digits", settings=("attention_dropout=.3",)))
    made: Any = fitting.construct(found, untrained_base(found.card, found.base, CPU), CPU)
    rates = [m.attn_drop.p for m in made.classifier.modules() if hasattr(m, "attn_drop")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


# Runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [("steps=2",), ("classifier=full", "layer_decay=.7", "clip=1")])
def test_variants_conform(variant: tuple[str, ...]) -> None:
    found = list(examine(plan(*variant)))
    assert [f for f in found if f.problem] == []
    assert len(found) == 7


def test_a_run_trains_adapters_behind_the_denoiser_of_diffusion(bench: Bench, tmp_path: Path) -> None:
    ran = bench(
        *("run", "--defense", f"{NAME},diffusion,lora", "--dataset", TINY, "--out", tmp_path, "--json"),
        *("--examples", 2, "--set", "rank=2"),
    )
    assert ran.code == 0, ran.err
    mine, denoiser, lora = json.loads(ran.out)
    assert mine["defense"]["access"] == "WEIGHTS"
    assert mine["cost"]["trainable_nominal"] == lora["cost"]["trainable_nominal"] > 0
    assert mine["cost"]["trainable_updated"] > 0
    assert mine["cost"]["flops_per_vote"] == denoiser["cost"]["flops_per_vote"]
    (shared,) = [k for k in denoiser["identity"]["defense"]["parts"] if k.startswith("Diffusion ")]
    assert mine["identity"]["defense"]["parts"][shared] == denoiser["identity"]["defense"]["parts"][shared]
    assert mine["cost"]["train_seconds"] > denoiser["cost"]["train_seconds"]  # that of the denoiser included
    note = (
        "2 noisy copies of each image and 1 steps of the attack (released: 4 and 4 for CIFAR-10, 2 and 1 for "
        "ImageNet); in a training step each image takes 2 passes of the denoiser, 6 of the classifier and as many "
        "backward, 2 of them to the image"
    )
    assert note in ran.err
    assert any(note in text for text in mine["defense"]["notes"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["classifier=full", "rank=4"], "rank of lora with classifier=full"),
        (["optimizer=sgd"], "optimizer=adamw and decay=cosine alone"),
        (["copies=0"], "copies=0 and attack_steps=1 must be at least 1"),
        (["eps=0"], "eps=0 above 0"),
        (["steps=4000"], "steps=4000: must be 1 to"),
        (["classifier=head"], "classifier"),
    ],
)
def test_invalid_settings_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(BenchError, match=message) as e:
        build(*settings)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("setting", "message"), [("layer_decay=.5", "numbered blocks"), ("attention_dropout=.1", "attention")]
)
def test_what_a_base_of_convolutions_lacks_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    card = tmp_path / "conv.toml"
    text = Path(TINY).read_text().partition("[bases.vit-0to4]")[0].replace('transfer_base = "vit-0to4"\n', "")
    args = "args = { in_chans = 1, layers = [1, 1, 1, 1], channels = [8, 8, 8, 8] }"
    lines = [
        args if line.startswith("args") else line
        for line in text.replace("vit_tiny_patch16_224", "resnet18").splitlines()
    ]
    card.write_text("\n".join(lines))
    (found,) = make_plans(RunOptions(defenses=NAME, dataset=str(card), settings=(setting, "batch=16", "epochs=1")))

    def fit() -> None:
        made = fitting.construct(found, untrained_base(found.card, found.base, CPU), CPU)
        data = load_split(found.card, "train").first(16)
        objective: Any = None
        made.fit(loop.TrainingJob(data, (), 0.25, objective, 0, CPU, tmp_path / "c.pt", lambda *_: None, []))

    with pytest.raises(BenchError, match=message):
        fit()


def test_an_objective_is_refused(bench: Callable[..., Any], tmp_path: Path) -> None:
    ran = bench("run", "--defense", NAME, "--dataset", TINY, "--objective", "consistency", "--out", tmp_path)
    assert ran.code == 2
    assert "has a loss of its own" in ran.err
