"""Train low-rank adapters of the base's layers under Gaussian noise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.errors import BenchError, one_line
from bench.interface import Defense, Draw, Schedule
from bench.io import tensors
from bench.models import peft_folders
from bench.models.peft_folders import FolderWeights

_MODEL = "model.base_model.model.model."  # before the names of the timm model inside peft's


class SplitQKV(nn.Module):
    """timm's fused query, key and value projection as three layers, so that each can be adapted separately."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases = (None, None, None) if fused.bias is None else fused.bias.chunk(3)
        self.q, self.k, self.v = map(_linear, fused.weight.chunk(3), biases)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)

    def fused(self) -> nn.Linear:
        """Return the three layers as one."""
        parts = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([p.bias for p in parts])
        return _linear(torch.cat([p.weight for p in parts]), bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen layer with copies of the weight and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def obstacle(layer: nn.Module) -> str:
    """Return the kind of ``layer`` if an adapter cannot be merged into it; empty where it can.

    Merging adds B A to the weight W, which gives the trained network only where the layer computes W x. peft's adapter
    of a convolution has its kernel, stride and padding, but not its dilation or padding mode.
    """
    kind = type(layer).__name__
    if parametrize.is_parametrized(layer):
        return f"parametrized {kind.removeprefix('Parametrized')}"
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return kind
    if "weight" not in layer._parameters:  # computed by torch's older weight_norm, spectral_norm and pruning
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
    """Return whether peft's adapter gives outputs of the layer's shape ``made`` for inputs of shape ``given``."""
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.dilation == (1, 1):
        like: Any = (layer.in_channels, 1, layer.kernel_size, layer.stride, layer.padding)
        with torch.device("meta"):  # shapes only
            added: Tensor = nn.Conv2d(*like)(torch.empty(given))
        return added.shape[2:] == made[2:]
    return isinstance(layer, nn.Linear)


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


class LoRA(Defense, FolderWeights):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) as used by Certified PEFTSmoothing (Fu and Wang 2024).

    The base, including its head unless ``head`` is set, stays frozen. peft's adapters are trained and merged before
    certification, so a vote costs the same as the base's. ``targets`` are all linear layers and convolutions
    (``linear``), the attention's fused query, key and value projection (``attention``), query and value alone (``qv``,
    as in the paper), for which the projection is split until the merge, or the layers that ``layers:NAME+NAME`` names,
    in full or by the ends of their names as peft does. Adapters of layers that do not compute W x (weight-standardised,
    parametrized: see ``obstacle``) stay unmerged; layers without a fitting adapter in peft (grouped, dilated) are left
    out. The run reports both. ``dora`` also learns the norm of each output's weights (Liu et al. 2024,
    arXiv 2402.09353); ``rslora`` divides ``lora_alpha`` by the root of the rank, not by the rank (Kalajdzievski 2023,
    arXiv 2312.03732). The paper does not state its schedule; ``paper`` uses that of the prompt tuning it builds on (Jia
    et al. 2022, arXiv 2203.12119). ``--weights`` also takes a folder of peft, which decides these settings.
    """

    family = "PEFT"
    trains = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Rank, scale, layers and kind of the adapters, and the training schedule."""

        rank: int = 8
        lora_alpha: float = 16  # scale of the adapters: this / rank
        targets: Annotated[str, Field(pattern=r"^(linear|attention|qv|layers:[\w.+]+)$")] = "linear"  # layers
        dora: bool = False  # weight-decomposed, arXiv 2402.09353
        rslora: bool = False  # scale by the root of the rank, arXiv 2312.03732
        head: bool = False  # train the head too
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
        adapted, self.unmerged, kinds = [], set[str](), Counter[str]()
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
                    self.unmerged.add(name)
                    kinds[why] += 1
        if not adapted:
            why = f"; it cannot adapt {_listed(skipped)}" if skipped else ""
            fix = "use full or bitfit" if self.config.targets == "linear" else "try --set targets=linear"
            raise BenchError(
                f"lora: targets={self.config.targets} matches no layer of this base "
                f"({type(base.model).__name__}){why}; {fix}"
            )
        if skipped:
            self.context.note(f"lora adapts {len(adapted)} layers of this base and leaves out {_listed(skipped)}")
        if kinds:
            self.context.note(
                f"lora cannot merge the adapters of {_listed(kinds)}, whose output is not W x: "
                f"they stay separate, and a vote costs more than the base's"
            )
        config = peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.lora_alpha,
            target_modules="|".join(map(re.escape, adapted)),  # a list would also match the ends of other names
            use_dora=self.config.dora,
            use_rslora=self.config.rslora,
        )
        self.model: Any = peft.get_peft_model(base, config)
        self.adapted = [name.removeprefix("model.") for name in adapted]
        if self.config.head:
            for head in base.heads():  # type: ignore[operator]
                head.requires_grad_(True)
        self._try(adapted)

    def _targets(self, base: nn.Module) -> tuple[list[str], Counter[str]]:
        """Return the names of the layers to adapt, and the kinds of those left out; split projections for ``qv``."""
        if self.config.targets == "qv":
            # Only in timm's own attention are the thirds of the fused layer known to be query, key and value.
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
        if self.config.targets.startswith("layers:"):
            words = self.config.targets.removeprefix("layers:").split("+")
            named = {word: [n for n in layers if f".{n}".endswith(f".{word}")] for word in words}
            if none := next((word for word, found in named.items() if not found), None):
                raise BenchError(f"lora: targets: this base ({type(base.model).__name__}) has no layer {none}")
            return [n for n in layers if any(n in found for found in named.values())], Counter()
        heads = {m for head in base.heads() for m in head.modules()}  # type: ignore[operator]
        return [name for name, m in layers.items() if m not in heads], Counter()

    def _sizes(self, base: nn.Module, names: list[str]) -> dict[str, tuple[torch.Size, torch.Size]]:
        """Return the shapes of input and output of the named layers that are called for an image.

        BEiT uses its projection's weights without calling it, so an adapter there would have no effect.
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
        """Raise BenchError naming the layer where the forward pass of an image fails."""
        entered: list[str] = []
        layers = {name: self.model.base_model.model.get_submodule(name) for name in names}
        hooks = [m.register_forward_pre_hook(lambda *_, n=n: entered.append(n)) for n, m in layers.items()]
        try:
            with torch.no_grad():
                self.model.eval()(self._black(self.model))
        except Exception as e:
            where = entered[-1].removeprefix("model.") if entered else "its input"
            raise BenchError(
                f"lora: this base's code does not work with peft's layer at or after {where} ({one_line(e)}); "
                f"use full or bitfit"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()

    def _black(self, model: nn.Module) -> Tensor:
        return torch.zeros(1, *self.context.shape, device=next(model.parameters()).device)

    def merge(self) -> None:
        # Not peft's merge_and_unload, which mistakes any module with a base_layer, as in DLA, for an adapter.
        model: nn.Module = self.model.base_model.model
        for name, layer in [*model.named_modules()]:
            if isinstance(layer, BaseTunerLayer) and name not in self.unmerged:
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

    # Folders of peft -------------------------------------------------------------------------------------

    @classmethod
    def folder_settings(cls, folder: Path) -> dict[str, Any]:
        return peft_folders.read(folder).settings

    def _trained(self) -> dict[str, tuple[str, Tensor]]:
        """Return the trained tensors by their names in the timm model, each with its name in this defense."""
        found = {k: p for k, p in self.named_parameters() if p.requires_grad}
        plain = {k: k.removeprefix(_MODEL).replace(".default", "") for k in found}
        return {
            name.replace("magnitude_vector.weight", "magnitude_vector"): (k, found[k].detach())
            for k, name in plain.items()
        }

    def _heads(self, base: nn.Module) -> dict[str, nn.Module]:
        """Return the heads of a base by their names in the timm model."""
        heads: list[nn.Module] = base.heads()  # type: ignore[operator]
        return {name: m for name, m in base.model.named_modules() if m in heads}  # type: ignore[union-attr]

    def read_folder(self, folder: Path) -> tuple[dict[str, Tensor], str]:
        found, wanted = peft_folders.read(folder), self._trained()
        where = f"--weights {folder}"
        tensors.check(f"{where} does not fit this base", {k: v for k, (_, v) in wanted.items()}, found.tensors)
        frozen = peft_folders.frozen_sha256(self.context.base.copy(), found.tensors)
        if found.frozen not in (None, frozen):
            raise BenchError(
                f"{where} was trained on a base of other weights (it names {found.base or 'none'}); give that as --base"
            )
        self.context.note(f"lora takes {found.remark(folder)}")
        return {wanted[k][0]: v for k, v in found.tensors.items()}, found.sha256

    def write_folder(self, folder: Path, base: str, head: bool) -> None:
        plain = self.context.base.copy()
        state = {k: v for k, (_, v) in self._trained().items()}
        layers, rank, alpha = self.adapted, self.config.rank, self.config.lora_alpha
        rslora = self.config.rslora
        if self.config.targets == "qv":
            state = peft_folders.fuse_qv(state, dict(plain.model.named_parameters()))  # type: ignore[union-attr]
            layers = sorted({name.rpartition(".")[0] for name in layers})
            alpha, rslora = 2 * alpha * (rank**0.5 if rslora else 1), False
            rank *= 2
        heads = self._heads(plain) if head or self.config.head else {}
        if not self.config.head:
            state |= {f"{name}.{k}": v for name, m in heads.items() for k, v in m.state_dict().items()}
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": peft_folders.names_of(plain.model, layers),  # type: ignore[arg-type]
            "use_dora": self.config.dora,
            "use_rslora": rslora,
            "modules_to_save": [*heads] or None,
            "base_model_name_or_path": base,
        }
        x = torch.rand(4, *self.context.shape, generator=torch.Generator().manual_seed(0))
        x = x.to(next(plain.parameters()).device)
        with torch.no_grad():
            peft_folders.write(folder, config, state, plain, (x, self.model.eval()(x)))
