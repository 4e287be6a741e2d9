"""Low-rank adapters on the base's layers, trained under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import peft
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Defense, Draw, Schedule


class SplitQKV(nn.Module):
    """timm's fused query, key and value projection as three layers, so that each can be adapted alone."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases = (None, None, None) if fused.bias is None else fused.bias.chunk(3)
        self.q, self.k, self.v = map(_linear, fused.weight.chunk(3), biases)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)

    def fused(self) -> nn.Linear:
        """The one layer again."""
        parts = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([p.bias for p in parts])
        return _linear(torch.cat([p.weight for p in parts]), bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The layer of that weight and bias, frozen; it holds copies."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


class LoRA(Defense):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) as used by Certified PEFTSmoothing (Fu and Wang 2024).

    The base stays frozen, its head included; peft's adapters learn to see through the noise and are
    merged before certification, so a vote costs what the base's costs. ``targets`` are every linear
    layer and convolution (``linear``), the attention's fused query, key and value projection
    (``attention``), or query and value alone (``qv``, the paper's), for which it is split until the
    merge. Grouped convolutions are left alone: peft cannot merge them. ``dora`` also learns the
    length of each output's weights (Liu et al. 2024, arXiv 2402.09353). The paper does not state its
    schedule; ``paper`` has that of the prompt tuning it builds on (Jia et al. 2022, arXiv 2203.12119).
    """

    family = "PEFT"
    trains = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Rank, scale, place and kind of the adapters, and the training schedule."""

        rank: int = 8
        lora_alpha: float = 16
        targets: Literal["linear", "attention", "qv"] = "linear"
        dora: bool = False
        epochs: float = 20
        batch: int = 64
        lr: float = 4e-3
        weight_decay: float = 0.0
        warmup: float = 0.1

    presets: ClassVar = {"paper": {"targets": "qv", "epochs": 100, "batch": 128, "optimizer": "sgd", "lr": 0.05}}

    def build(self) -> None:
        if self.config.rank < 1:
            raise BenchError(f"lora: rank={self.config.rank} must be at least 1")
        base = self.context.base.copy(self.context.classes)
        names = self._called(base, self._targets(base))
        if not names:
            raise BenchError(
                f"lora: targets={self.config.targets} matches no layer of this base "
                f"({type(base.model).__name__}); try --set targets=linear"
            )
        config = peft.LoraConfig(
            r=self.config.rank, lora_alpha=self.config.lora_alpha, target_modules=names, use_dora=self.config.dora
        )
        self.model: Any = peft.get_peft_model(base, config)

    def _targets(self, base: nn.Module) -> list[str]:
        """The names of the layers to adapt; for ``qv`` the fused projections are split first."""
        if self.config.targets == "linear":
            head = base.head()  # type: ignore[operator]
            return [
                name
                for name, m in base.named_modules()
                if m is not head and (isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1))
            ]
        if self.config.targets == "attention":
            return [name for name, m in base.named_modules() if isinstance(m, nn.Linear) and name.endswith(".qkv")]
        # Only of timm's own attention is it known that a fused layer's thirds are query, key and value.
        found = {name: m for name, m in base.named_modules() if isinstance(m, Attention)}
        for attention in found.values():
            attention.qkv = SplitQKV(attention.qkv)  # type: ignore[assignment]
        return [f"{name}.qkv.{part}" for name in found for part in "qv"]

    def _called(self, base: nn.Module, names: list[str]) -> list[str]:
        """Those of the named layers that an image passes through.

        BEiT reads its projection's weights without calling it: an adapter there would have no effect.
        """
        called: set[str] = set()
        layers = dict(base.named_modules())
        hooks = [layers[name].register_forward_hook(lambda *_, n=name: called.add(n)) for name in names]
        with torch.no_grad():
            base.eval()(torch.zeros(1, *self.context.shape, device=next(base.parameters()).device))
        for hook in hooks:
            hook.remove()
        return [name for name in names if name in called]

    def merge(self) -> None:
        self.model = self.model.merge_and_unload()
        for module in self.model.modules():
            if isinstance(module, Attention) and isinstance(module.qkv, SplitQKV):
                module.qkv = module.qkv.fused()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
