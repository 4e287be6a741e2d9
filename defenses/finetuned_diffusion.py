"""Fine-tune the classifier on denoised images that it recognises, behind a diffusion model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Defense, Draw, Job, Schedule, StepDraw
from bench.training.loop import train_mode
from defenses.diffusion import DiffusionDenoised

LORA = ("rank", "lora_alpha", "targets", "head")  # settings that are passed on to lora


class FinetunedDiffusion(Defense):
    r"""FT-CADIS, confidence-aware fine-tuning behind a denoiser (Jang et al. 2024, arXiv 2411.08933).

    Each training image is noised ``copies`` times and denoised by ``diffusion`` (``unet``, ``timestep_scale`` and
    ``steps`` are its settings). The cross-entropy counts the copies that the classifier recognises, or that with the
    lowest loss where it recognises none. Where it recognises all, the adversarial loss is added,
    ``adversarial_weight`` times: each copy is moved by at most ``eps`` (l2, in pixels of [0, 1]) away from the mean
    prediction of the copies, in ``attack_steps`` steps that keep the mean and the size of its error; the largest
    divergence of a copy is the loss. The denoiser stays frozen.

    ``classifier`` is ``lora``, with its own defaults except for those of ``rank``, ``lora_alpha``, ``targets`` and
    ``head`` that are set, or ``full``. The learning rate falls by ``layer_decay`` from each block to the one before it;
    the weight decay goes from ``weight_decay`` to ``weight_decay_end`` by a cosine; each tensor's gradient is cut to
    the norm ``clip``; the attention's dropout rises from 0 in the first block to ``attention_dropout`` in the last.

    ``paper`` is the released setting for CIFAR-10, with the diffusion model of ``diffusion``. Its adversarial weight is
    given for sigma 1 there. The one for ImageNet::

        bench run --defense finetuned-diffusion --dataset imagenet --preset paper --sigma 1 --set unet=... \
            --set classifier=lora --set rank=4 --set lora_alpha=4 --set targets=qv --set head=true --set copies=2 \
            --set attack_steps=1 --set adversarial_weight=2 --set epochs=10 --set lr=2e-4 --set weight_decay=.01 \
            --set weight_decay_end=.1 --set layer_decay=.9 --set attention_dropout=0 --set clip=1

    Differences: the noise of a copy has exactly sigma, as in certification; weights are trained in float32.
    """

    family = "diffusion"
    trains = "classifier-tuned"
    paper = "2411.08933"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Denoiser, classifier, loss and schedule."""

        unet: str = ""
        timestep_scale: float | None = None
        steps: int = 1
        classifier: Literal["lora", "full"] = "lora"
        rank: int | None = None  # of lora, as the next three; None: its default
        lora_alpha: float | None = None
        targets: str | None = None
        head: bool | None = None
        copies: int = 2
        attack_steps: int = 1
        eps: float = 0.125
        adversarial_weight: float = 1.0
        epochs: float = 20
        batch: int = 64
        lr: float = 4e-3
        min_lr: float = 0.0
        weight_decay: float = 0.0
        weight_decay_end: float = 0.0
        warmup: float = 0.1
        layer_decay: float = 1.0
        attention_dropout: float = 0.0
        clip: float = 0.0  # 0: none

    presets: ClassVar = {
        "paper": {
            "unet": "google/ddpm-cifar10-32",
            "classifier": "full",
            "copies": 4,
            "attack_steps": 4,
            "adversarial_weight": 4.0,
            "epochs": 30,
            "batch": 128,
            "lr": 5e-5,
            "min_lr": 1e-6,
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "warmup": 0.1,
            "layer_decay": 0.65,
            "attention_dropout": 0.2,
            "clip": 0.3,
        }
    }

    def build(self) -> None:
        config = self.config
        given = {key: value for key in LORA if (value := getattr(config, key)) is not None}
        _check(config, given)
        self.diffusion = cast(
            DiffusionDenoised,
            self.context.inner("diffusion", unet=config.unet, timestep_scale=config.timestep_scale, steps=config.steps),
        )
        self.classifier = self.context.inner(config.classifier, **given)
        if config.attention_dropout:
            layers = [m for m in self.classifier.modules() if isinstance(m, Attention)]
            if not layers:
                raise BenchError("finetuned-diffusion: attention_dropout: this base has no attention; set it to 0")
            for i, layer in enumerate(layers):
                layer.attn_drop.p = config.attention_dropout * i / max(1, len(layers) - 1)
        n, attacks = config.copies, config.copies * config.attack_steps
        self.context.note(
            f"finetuned-diffusion: {n} noisy copies of each image and {config.attack_steps} steps of the attack "
            f"(released: 4 and 4 for CIFAR-10, 2 and 1 for ImageNet); in a training step each image takes "
            f"{n * config.steps} passes of the denoiser, {2 * n + attacks} of the classifier and as many backward, "
            f"{attacks} of them to the image"
        )

    def fit(self, job: Job) -> None:
        config, classifier = self.config, self.classifier
        trained = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(groups(trained, config.layer_decay), lr=config.lr)
        count = job.count(config)
        train_mode(classifier)
        for step in job.steps(count, config.batch, classifier, optimizer):
            done = step.number / count
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * rate(config, done)
                if group["decayed"]:
                    group["weight_decay"] = _cosine(config.weight_decay, config.weight_decay_end, done)
            value = self.loss(step.x, step.y, step.draw, job)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            for p in trained.values():
                if config.clip and p.grad is not None:
                    p.grad.mul_((config.clip / (p.grad.norm() + 1e-6)).clamp(max=1))
            optimizer.step()
            step.report(value.detach())
        classifier.eval()

    def loss(self, x: Tensor, y: Tensor, draw: StepDraw, job: Job) -> Tensor:
        config, count = self.config, self.config.copies

        def classify(images: Tensor) -> Tensor:
            out = self.classifier.logits(images, draw)
            return out.view(count, -1, out.shape[1])

        with torch.no_grad():
            noisy = (x + draw.sigma * draw.normal(*x.shape[1:]) for _ in range(count))
            denoised = torch.cat([self.diffusion.denoised(one, draw) for one in noisy])
        logits = classify(denoised)
        with draw.evaluating():
            moved = attack(classify, x, denoised, log_mean(logits).detach(), config.eps, config.attack_steps)
        return confidence_aware(logits, classify(moved), y, config.adversarial_weight)

    def merge(self) -> None:
        self.classifier.merge()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.classifier.logits(self.diffusion.denoised(x, draw), draw)


def _check(config: Any, given: dict[str, Any]) -> None:
    """Raise BenchError where a setting is invalid, or would have no effect."""
    if config.classifier == "full" and given:
        raise BenchError(f"finetuned-diffusion: {', '.join(given)} of lora with classifier=full; leave out one of them")
    if (config.optimizer, config.decay) != ("adamw", "cosine"):
        raise BenchError("finetuned-diffusion: it trains with optimizer=adamw and decay=cosine alone")
    if config.copies < 1 or config.attack_steps < 1 or config.eps <= 0:
        raise BenchError(
            f"finetuned-diffusion: copies={config.copies} and attack_steps={config.attack_steps} must be at least 1, "
            f"eps={config.eps:g} above 0"
        )


# The loss -------------------------------------------------------------------------------------------------


def log_mean(logits: Tensor) -> Tensor:
    """Return the logarithm of the mean probability of copies, [copies, B, classes] -> [B, classes]."""
    return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return KL(target || prediction) of each copy, [copies, B]; ``target`` holds log-probabilities [B, classes]."""
    return (target.exp() * (target - logits.log_softmax(2))).sum(2)


def confidence_aware(logits: Tensor, moved: Tensor, y: Tensor, weight: float) -> Tensor:
    """Return the mean loss of a batch.

    Gradients flow through the mean prediction too, as in the released code.

    Args:
        logits: Of the denoised copies, [copies, B, classes].
        moved: Of the adversarial copies, [copies, B, classes].
        y: Labels [B].
        weight: Of the adversarial loss.
    """
    recognised = logits.argmax(2) == y
    entropies = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view_as(recognised)
    lowest = F.one_hot(entropies.argmin(0), len(logits)).T.bool()
    selected = torch.where(recognised.any(0), recognised, lowest)
    adversarial = divergence(log_mean(logits), moved).max(0).values
    return ((entropies * selected).mean(0) + weight * recognised.all(0) * adversarial).mean()


def attack(
    classify: Callable[[Tensor], Tensor], x: Tensor, denoised: Tensor, target: Tensor, eps: float, steps: int
) -> Tensor:
    """Move denoised copies so that their predictions diverge from ``target``, at most ``eps`` in a step's projection.

    After each projection the error, copy minus clean image, gets back its mean and its root mean square.

    Args:
        classify: Maps [copies * B, C, H, W] to logits [copies, B, classes].
        x: Clean images [B, C, H, W].
        denoised: Copies [copies * B, C, H, W].
        target: Log-probabilities [B, classes].
        eps: Largest l2 norm of the move.
        steps: Gradient steps, of length 2 eps / steps.

    Returns:
        The moved copies, [copies * B, C, H, W]; like the released code's, they may leave [0, 1].
    """
    clean = x.repeat(len(denoised) // len(x), 1, 1, 1)
    start = denoised - clean
    mean, size = _moments(start)
    error = start
    for _ in range(steps):
        error = error.detach().requires_grad_()
        (grad,) = torch.autograd.grad(divergence(target, classify(clean + error)).sum(), error)
        norms = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        error = error.detach() + 2 * eps / steps * grad / (norms + 1e-8)
        error = start + (error - start).renorm(2, 0, eps)
        now, scale = _moments(error)
        error = mean + (error - now) / scale.clamp(min=1e-12) * size
    return (clean + error).detach()


def _moments(error: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's mean and root mean square."""
    flat = error.flatten(1)
    return flat.mean(1).view(-1, 1, 1, 1), flat.square().mean(1).sqrt().view(-1, 1, 1, 1)


# The schedule ---------------------------------------------------------------------------------------------


def groups(trained: dict[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Group parameters by the factor on their learning rate, and by whether their weights decay.

    The factor is ``decay`` to the power of the blocks between a layer and the head; biases, norms and the embeddings
    of position and class have no weight decay. Raises BenchError where the network has no numbered blocks.
    """
    blocks = {name: int(found[1]) for name in trained if (found := re.search(r"(?:^|\.)blocks\.(\d+)\.", name))}
    if decay != 1 and not blocks:
        raise BenchError("finetuned-diffusion: layer_decay: no layer in numbered blocks is trained; set it to 1")
    top = max(blocks.values(), default=0) + 2
    parted: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in trained.items():
        stem = re.search(r"(?:^|\.)(patch_embed|cls_token|pos_embed)", name)
        layer = blocks[name] + 1 if name in blocks else 0 if stem else top
        decayed = p.ndim > 1 and not name.endswith((".bias", "cls_token", "pos_embed"))
        parted.setdefault((decay ** (top - layer), decayed), []).append(p)
    return [
        {"params": params, "scale": scale, "decayed": decayed, "weight_decay": 0.0}
        for (scale, decayed), params in parted.items()
    ]


def rate(config: Any, done: float) -> float:
    """Return the learning rate of the last layer at the fraction ``done`` of the training."""
    if done < config.warmup:
        return float(config.lr * done / config.warmup)
    return _cosine(config.lr, config.min_lr, (done - config.warmup) / (1 - config.warmup))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
