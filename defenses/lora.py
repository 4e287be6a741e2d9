"""Low-rank adapters on the base's layers, trained under Gaussian noise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
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
    """Why an adapter cannot be merged into ``layer``, as the kind of layer it is; empty where it can.

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


def _takes_adapter(layer: nn.Module, given: torch.Size, made: torch.Size) -> bool:
    """Whether the output of peft's adapter can be added to the layer's, input and output being of these shapes."""
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.dilation == (1, 1):
        like: Any = (layer.in_channels, 1, layer.kernel_size, layer.stride, layer.padding)
        with torch.device("meta"):  # shapes only
            added: Tensor = nn.Conv2d(*like)(torch.empty(given))
        return added.shape[2:] == made[2:]
    return isinstance(layer, nn.Linear)


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


class LoRA(Defense):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) as used by Certified PEFTSmoothing (Fu and Wang 2024).

    The base stays frozen, its head included; peft's adapters learn to see through the noise and are
    merged before certification, so a vote costs what the base's costs. ``targets`` are every linear
    layer and convolution (``linear``), the attention's fused query, key and value projection
    (``attention``), or query and value alone (``qv``, the paper's), for which it is split until the
    merge. Of layers that do not compute W x (weight-standardised, parametrized: see ``obstacle``) the
    adapters stay unmerged, or are left out where peft has none that fits (grouped, dilated), and the run
    says so. ``dora`` also learns the length of each output's weights (Liu et al. 2024, arXiv 2402.09353).
    The paper does not state its schedule; ``paper`` has that of the prompt tuning it builds on (Jia et al.
    2022, arXiv 2203.12119).
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
        sizes = self._sizes(base, names)
        uses = Counter(id(p) for m in base.modules() for p in m._parameters.values())
        adapted, self.beside, kinds = [], set[str](), Counter[str]()
        for name in names:
            layer = base.get_submodule(name)
            why = obstacle(layer) or ("layers of shared weights" if uses[id(layer.weight)] > 1 else "")
            if name not in sizes:
                skipped["layers that images do not pass through"] += 1
            elif why and not _takes_adapter(layer, *sizes[name]):
                skipped[why] += 1
            else:
                adapted.append(name)
                if why:
                    self.beside.add(name)
                    kinds[why] += 1
        if not adapted:
            why = f"; it cannot adapt {_listed(skipped)}" if skipped else ""
            mend = "use full or bitfit" if self.config.targets == "linear" else "try --set targets=linear"
            raise BenchError(
                f"lora: targets={self.config.targets} matches no layer of this base "
                f"({type(base.model).__name__}){why}; {mend}"
            )
        if skipped:
            self.context.note(f"lora adapts {len(adapted)} layers of this base and leaves out {_listed(skipped)}")
        if kinds:
            self.context.note(
                f"lora cannot merge the adapters of {_listed(kinds)}, whose output is not W x: "
                f"they stay beside their layers, and a vote costs more than the base's"
            )
        config = peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.lora_alpha,
            target_modules="|".join(map(re.escape, adapted)),  # a list would also match by the names' ends
            use_dora=self.config.dora,
        )
        self.model: Any = peft.get_peft_model(base, config)
        self._try(adapted)

    def _targets(self, base: nn.Module) -> tuple[list[str], Counter[str]]:
        """The names of the layers to adapt, and kinds of those left out; for ``qv`` the projections are split."""
        if self.config.targets == "qv":
            # Only of timm's own attention is it known that a fused layer's thirds are query, key and value.
            found = {name: m for name, m in base.named_modules() if isinstance(m, Attention)}
            wrong = {name: why for name, m in found.items() if (why := obstacle(m.qkv))}
            for name in found.keys() - wrong.keys():
                found[name].qkv = SplitQKV(found[name].qkv)  # type: ignore[assignment]
            return [f"{name}.qkv.{part}" for name in found if name not in wrong for part in "qv"], Counter(
                wrong.values()
            )
        layers = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
        if self.config.targets == "attention":
            return [n for n, m in layers.items() if isinstance(m, nn.Linear) and n.endswith(".qkv")], Counter()
        heads = {m for head in base.heads() for m in head.modules()}  # type: ignore[operator]
        return [name for name, m in layers.items() if m not in heads], Counter()

    def _sizes(self, base: nn.Module, names: list[str]) -> dict[str, tuple[torch.Size, torch.Size]]:
        """The shapes of input and output of those of the named layers that an image passes through.

        BEiT reads its projection's weights without calling it: an adapter there would have no effect.
        """
        sizes: dict[str, tuple[torch.Size, torch.Size]] = {}

        def record(name: str) -> Callable[..., None]:
            return lambda _, inputs, output: sizes.update({name: (inputs[0].shape, output.shape)})

        hooks = [base.get_submodule(name).register_forward_hook(record(name)) for name in names]
        with torch.no_grad():
            base.eval()(self._black(base))
        for hook in hooks:
            hook.remove()
        return sizes

    def _try(self, names: list[str]) -> None:
        """Raise BenchError naming the layer where an image cannot pass through the adapters."""
        entered: list[str] = []
        layers = {name: self.model.base_model.model.get_submodule(name) for name in names}
        hooks = [m.register_forward_pre_hook(lambda *_, n=n: entered.append(n)) for n, m in layers.items()]
        try:
            with torch.no_grad():
                self.model.eval()(self._black(self.model))
        except Exception as e:
            where = entered[-1].removeprefix("model.") if entered else "its input"
            raise BenchError(
                f"lora: this base's code cannot take peft's layer at or after {where} ({one_line(e)}); "
                f"use full or bitfit"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()

    def _black(self, model: nn.Module) -> Tensor:
        return torch.zeros(1, *self.context.shape, device=next(model.parameters()).device)

    def merge(self) -> None:
        # peft's own merge_and_unload takes any module with a base_layer, as DLA has, for one of its adapters.
        model: nn.Module = self.model.base_model.model
        for name, layer in [*model.named_modules()]:
            if isinstance(layer, BaseTunerLayer) and name not in self.beside:
                layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.get_base_layer())
        self.model = model
        for module in model.modules():
            if isinstance(module, Attention) and isinstance(module.qkv, SplitQKV):
                module.qkv = module.qkv.fused()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
