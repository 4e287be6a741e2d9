"""What a base classifier is before its weights are loaded: ``Blueprint``, and how timm's configs describe one.

A blueprint opens its weights itself, from safetensors alone, and hands the tensors to timm, which
never opens a file: left alone it falls back to pickles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from bench import tensors
from bench.base import Classifier, LocalBase
from bench.cards import Card, Split
from bench.errors import BenchError, one_line, unknown
from bench.interface import Schedule

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one value a channel


@dataclass(frozen=True)
class Weights:
    """Where a blueprint's weights are."""

    open: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]  # reads them: tensors, and the record of their source
    adapt: bool  # let timm rename keys and resize position embeddings; False: they must fit key by key


@dataclass(frozen=True)
class Blueprint:
    """A base classifier before its weights are loaded."""

    card: Card
    name: str
    architecture: str  # timm's name
    args: dict[str, Any]  # further arguments of timm.create_model
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None  # height and width it takes; None: the card's
    classes: int  # of the weights, not of the card; 0: no head
    config: dict[str, Any] | None = None  # timm's pretrained_cfg where it is not the architecture's own
    weights: Weights | None = None  # None: fresh ones
    schedule: Schedule | None = None  # clean training on the card's data, if any
    only: tuple[int, ...] = ()  # the card's labels that this training is on, in the order of its head; empty: all

    @property
    def made_for(self) -> int:
        """How many classes the base tells apart once its training, if any, is done; 0: it has no head."""
        return self.classes if self.schedule is None else len(self.only) or len(self.card.classes)

    def describe(self) -> dict[str, Any]:
        """What the tensors do not tell, JSON-able."""
        return {"architecture": self.architecture, "args": self.args, "resize": self.size and list(self.size)}

    def fresh(self, classes: int) -> Classifier:
        """The architecture with fresh weights, on the CPU. Raises BenchError where timm cannot make it."""
        return Classifier(self._create(classes, None), self.mean, self.std, self.size)

    def load(self) -> tuple[Classifier, dict[str, Any]]:
        """The architecture with its stored weights, on the CPU, and the record of their source.

        Raises BenchError where they cannot be read, do not fit, or make no logits of the card's images.
        """
        assert self.weights is not None
        stored, record = self.weights.open()
        stored, normalisation = unwrap(stored)
        if self.weights.adapt:
            model = self._create(self.classes, stored)
        else:
            model = self._create(self.classes, None)
            tensors.check(f"{record['file']} does not fit base {self.name}", model.state_dict(), stored)
            model.load_state_dict(stored)
        mean, std = normalisation or (self.mean, self.std)
        try:
            module = Classifier(model, mean, std, self.size).eval()
            with torch.inference_mode():
                out = module(torch.zeros(1, *self.card.shape))
        except Exception as e:  # here too
            shape = "x".join(map(str, self.card.shape))
            raise BenchError(f"base {self.name} cannot take {shape} images: {one_line(e)}") from None
        if self.classes and tuple(out.shape) != (1, self.classes):
            raise BenchError(f"base {self.name} gives {list(out.shape)} for an image, not [1, {self.classes}] logits")
        if not all(v.isfinite().all() for v in (out, module.mean, module.std)):
            raise BenchError(f"base {self.name}: its mean, std or logits are not finite; give the right mean and std")
        return module, record

    def base(self, module: Classifier, meta: dict[str, Any], device: torch.device) -> LocalBase:
        """The base made of this blueprint: ``module``, which it freezes; ``meta`` is what to record of it."""

        def untrained(classes: int) -> nn.Module:
            return self.fresh(classes).to(device)

        normalisation = {"mean": module.mean.flatten().tolist(), "std": module.std.flatten().tolist()}
        classes: int = module.model.num_classes  # type: ignore[assignment]
        return LocalBase(self.name, module, untrained, classes, meta, self.describe() | normalisation)

    def accuracy(self, module: Classifier, split: Split, device: torch.device) -> float:
        """The part of a split's clean images, 0 to 1, that ``module`` gets right; freezes it."""
        right, total = self.base(module, {}, device).accuracy(split, list(range(len(split))))
        return right / total

    def _create(self, classes: int, stored: dict[str, Tensor] | None) -> nn.Module:
        import timm

        config = None if self.config is None else {**self.config, "num_classes": classes}
        if stored is not None:
            config = {**(config or {}), "state_dict": stored, "custom_load": False}
        try:
            model: nn.Module = timm.create_model(
                self.architecture,
                pretrained=stored is not None,
                pretrained_cfg=config,
                num_classes=classes,
                **self.args,
            )
        except Exception as e:  # timm's models raise whatever they stumble over
            # torch names the key that does not fit on the second line.
            lines = [line.strip() for line in str(e).splitlines()[:2]]
            why = " ".join(lines)[:300] or type(e).__name__
            raise BenchError(f"base {self.name}: timm cannot make {self.architecture}: {why}") from None
        model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr,operator]
        return model


def from_config(card: Card, name: str, config: dict[str, Any], weights: Weights) -> Blueprint:
    """The blueprint a timm config.json describes (architecture, model_args, num_classes, pretrained_cfg).

    What the file leaves out is as timm has it for the architecture. Raises BenchError where it is no timm
    config, sets an argument that is certbench's to set, or its channels cannot take the card's images.
    """
    from timm.models import PretrainedCfg

    if odd := [k for k in ("model_args", "pretrained_cfg") if not isinstance(config.get(k) or {}, dict)]:
        raise BenchError(f"base {name}: {odd[0]} in its config must be an object; fetch the config again")
    architecture, args = config.get("architecture"), dict(config.get("model_args") or {})
    if not isinstance(architecture, str):
        raise BenchError(f"base {name}: its config states no timm architecture; only timm models can be bases")
    # Before timm 0.9 the pretrained_cfg was the whole file.
    stated = config.get("pretrained_cfg") or {k: v for k, v in config.items() if k != "architecture"}
    classes = config.get("num_classes", args.pop("num_classes", stated.get("num_classes")))
    known = {f.name for f in fields(PretrainedCfg)}
    check_source(f"base {name}: its config", architecture, args)
    merged = architecture_config(architecture, f"base {name}") | {k: v for k, v in stated.items() if k in known}
    merged |= {} if classes is None else {"num_classes": classes}
    return from_pretrained_cfg(card, name, architecture, args, merged, weights)


def check_source(where: str, architecture: str, args: Mapping[str, Any]) -> None:
    """Raise BenchError where somebody else's architecture or arguments would have timm read files of their choice.

    The name may be no address (hf-hub:, local-dir:), and the arguments only the model's, none of timm's own.
    """
    import timm

    if re.search(r"[:/\\]", architecture):
        raise BenchError(f"{where}: {architecture!r} is an address; give the name of a timm model")
    if not timm.is_model(architecture):  # timm would say so too, but first write the name on the terminal as it is
        raise BenchError(f"{where}: {unknown('timm model', architecture, timm.list_models())}")
    own = {*signature(timm.create_model).parameters, "pretrained_strict", "pretrained_filter_fn"}
    if forbidden := sorted(own & set(args)):
        raise BenchError(f"{where} may not set {forbidden[0]}")


def from_pretrained_cfg(
    card: Card, name: str, architecture: str, args: dict[str, Any], config: dict[str, Any], weights: Weights
) -> Blueprint:
    """The blueprint of a timm architecture whose normalisation, input size and classes a pretrained_cfg states.

    Where it says weights are is dropped: they are ``weights``. Raises BenchError where it lacks something
    or its channels cannot take the card's images.
    """
    from timm.models import filter_pretrained_cfg

    config = filter_pretrained_cfg(config, remove_source=True)  # type: ignore[no-untyped-call]
    try:
        channels = int(args.get("in_chans") or config["input_size"][0])
        mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
        size, classes = input_size(card, args, config), int(config["num_classes"])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as e:
        raise BenchError(f"base {name}: its config is not timm's: {one_line(e)}") from None
    if not len(mean) == len(std) == channels:
        raise BenchError(f"base {name}: {channels} channels and a mean of {len(mean)} and std of {len(std)} values")
    if card.shape[0] not in (1, channels):
        raise BenchError(f"base {name} takes {channels} channels; images of {card.name} have {card.shape[0]}")
    return Blueprint(card, name, architecture, args, mean, std, size, classes, config, weights)


def architecture_config(architecture: str, where: str) -> dict[str, Any]:
    """timm's own pretrained_cfg of an architecture (with or without a tag), its defaults for one it does not know.

    Raises BenchError beginning with ``where`` for a tag timm does not know.
    """
    from timm.models import resolve_pretrained_cfg

    try:
        config: dict[str, Any] = resolve_pretrained_cfg(architecture).to_dict()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as e:
        raise BenchError(f"{where}: {one_line(e)}") from None
    return config


def input_size(card: Card, args: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The height and width in pixels the model takes, from its arguments or its pretrained_cfg; None: the card's."""
    size = args.get("img_size") or config["input_size"][-2:]
    try:
        height, width = (size, size) if isinstance(size, int) else (int(v) for v in size)
    except (TypeError, ValueError, OverflowError):
        raise BenchError(f"img_size {size!r:.40} is no side in pixels, nor a height and a width") from None
    return None if (height, width) == card.shape[1:] else (height, width)


def unwrap(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Normalisation | None]:
    """A copy of ``stored`` under timm's own keys, and the mean and std it held, None where it held none.

    certbench's own files hold them, and "model." before every other key (see ``Classifier``).
    """
    own = {"mean", "std"}
    if not own <= set(stored) or not all(k in own or k.startswith("model.") for k in stored):
        return dict(stored), None
    mean, std = (tuple(stored[k].flatten().tolist()) for k in ("mean", "std"))
    return {k.removeprefix("model."): v for k, v in stored.items() if k not in own}, (mean, std)
