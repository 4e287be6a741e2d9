"""Low-rank adapters on the base's layers, trained under Gaussian noise."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import peft
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.errors import BenchError, one_line
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


def obstacle(layer: nn.Module) -> str:
    """Why no adapter can be merged into ``layer``, as the kind of layer it is; empty where one can.

    Merging adds B A to the weight W, which is the trained network only where the layer computes W x. peft's
    adapter of a convolution has its kernel, stride and padding, and neither its dilation nor its padding mode.
    """
    kind = type(layer).__name__
    if parametrize.is_parametrized(layer):
        return f"parametrized {kind.removeprefix('Parametrized')}"
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return kind
    if "weight" not in layer._parameters:  # torch's older weight_norm, spectral_norm and pruning compute it
        return f"{kind} with a computed weight"
    if layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer):
        return f"{kind} with hooks"
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            return "grouped Conv2d"
        if layer.dilation != (1, 1):
            return "dilated Conv2d"
        if layer.padding_mode != "zeros":
            return f"Conv2d with {layer.padding_mode} padding"
    return ""


class LoRA(Defense):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) as used by Certified PEFTSmoothing (Fu and Wang 2024).

    The base stays frozen, its head included; peft's adapters learn to see through the noise and are
    merged before certification, so a vote costs what the base's costs. ``targets`` are every linear
    layer and convolution (``linear``), the attention's fused query, key and value projection
    (``attention``), or query and value alone (``qv``, the paper's), for which it is split until the
    merge. Layers that compute anything but W x with their own W are not adapted (weight-standardised,
    parametrized, grouped or dilated ones, see ``obstacle``), and the run says so. ``dora`` also learns
    the length of each output's weights (Liu et al. 2024, arXiv 2402.09353). The paper does not state its
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
        names, skipped = self._targets(base)
        called = self._called(base, names)
        skipped += ["layers that images do not pass through"] * (len(names) - len(called))
        names = called
        left = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(skipped).items()))
        if not names:
            why = f"; it cannot adapt {left}" if left else ""
            mend = "use full or bitfit" if self.config.targets == "linear" else "try --set targets=linear"
            raise BenchError(
                f"lora: targets={self.config.targets} matches no layer of this base "
                f"({type(base.model).__name__}){why}; {mend}"
            )
        if left:
            self.context.note(f"lora adapts {len(names)} layers of this base; left as they are: {left}")
        config = peft.LoraConfig(
            r=self.config.rank, lora_alpha=self.config.lora_alpha, target_modules=names, use_dora=self.config.dora
        )
        self.model: Any = peft.get_peft_model(base, config)
        self._try(names)

    def _targets(self, base: nn.Module) -> tuple[list[str], list[str]]:
        """Names of the layers to adapt, and the kinds of those that cannot be; for ``qv`` projections are split."""
        if self.config.targets == "qv":
            # Only of timm's own attention is it known that a fused layer's thirds are query, key and value.
            found = {name: m for name, m in base.named_modules() if isinstance(m, Attention)}
            wrong = {name: why for name, m in found.items() if (why := obstacle(m.qkv))}
            for name in found.keys() - wrong:
                found[name].qkv = SplitQKV(found[name].qkv)  # type: ignore[assignment]
            return [f"{name}.qkv.{part}" for name in found if name not in wrong for part in "qv"], [*wrong.values()]
        heads = {m for head in base.heads() for m in head.modules()}  # type: ignore[operator]
        uses = Counter(id(p) for m in base.modules() for p in m._parameters.values())
        names, skipped = [], []
        for name, m in base.named_modules():
            fits = name.endswith(".qkv") if self.config.targets == "attention" else m not in heads
            if not fits or not isinstance(m, nn.Linear | nn.modules.conv._ConvNd):
                continue
            why = obstacle(m) or ("layers of shared weights" if uses[id(m.weight)] > 1 else "")
            if why:
                skipped.append(why)
            else:
                names.append(name)
        return names, skipped

    def _called(self, base: nn.Module, names: list[str]) -> list[str]:
        """Those of the named layers that an image passes through.

        BEiT reads its projection's weights without calling it: an adapter there would have no effect.
        """
        called: set[str] = set()
        layers = dict(base.named_modules())
        hooks = [layers[name].register_forward_hook(lambda *_, n=name: called.add(n)) for name in names]
        with torch.no_grad():
            base.eval()(self._black(base))
        for hook in hooks:
            hook.remove()
        return [name for name in names if name in called]

    def _try(self, names: list[str]) -> None:
        """Raise BenchError naming the layer where an image cannot pass through the adapters."""
        entered: list[str] = []
        layers = {n: m for n, m in self.model.base_model.model.named_modules() if n in set(names)}
        hooks = [m.register_forward_pre_hook(lambda *_, n=n: entered.append(n)) for n, m in layers.items()]
        try:
            with torch.no_grad():
                self.model.eval()(self._black(self.model))
        except Exception as e:
            where = entered[-1] if entered else "its input"
            raise BenchError(
                f"lora: this base's code cannot take peft's layer at or after {where.removeprefix('model.')} "
                f"({one_line(e)}); use full or bitfit"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()

    def _black(self, model: nn.Module) -> Tensor:
        return torch.zeros(1, *self.context.shape, device=next(model.parameters()).device)

    def merge(self) -> None:
        self.model = self.model.merge_and_unload()
        for module in self.model.modules():
            if isinstance(module, Attention) and isinstance(module.qkv, SplitQKV):
                module.qkv = module.qkv.fused()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
