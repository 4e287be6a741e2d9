"""Make timm models and load stored weights into them, checking every tensor; for bases and encoders.

timm is given tensors and never opens a file, since it falls back to pickles. Several of its families load without
strict, so a missing or renamed tensor would silently keep its random values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.io import tensors


@dataclass(frozen=True)
class Architecture:
    """A timm model without weights."""

    name: str  # for messages
    architecture: str  # timm's name
    args: dict[str, Any]  # further arguments of timm.create_model
    config: dict[str, Any] | None  # timm's pretrained_cfg, where it is not the architecture's own

    def create(self, classes: int, stored: dict[str, Tensor] | None = None) -> nn.Module:
        """Make the model on the CPU, with random weights or ``stored`` as adapted by timm. Raises BenchError."""
        from bench.models.architectures import timm

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
        except Exception as e:  # timm's models raise errors of any type
            # torch names the wrong tensor on the second line.
            lines = [line.strip() for line in str(e).splitlines()[:2]]
            why = " ".join(lines)[:300] or type(e).__name__
            raise BenchError(f"{self.name}: timm cannot make {self.architecture}: {why}") from None
        model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr,operator]
        return model

    def load(self, classes: int, stored: Mapping[str, Tensor], file: str, adapt: bool) -> tuple[nn.Module, list[str]]:
        """Load stored tensors into the model.

        Args:
            classes: Number of logits; 0: no head.
            stored: Tensors by name.
            file: Name of their file, for messages.
            adapt: Whether timm may rename tensors and resize position embeddings; if not, all must fit by name and
                shape.

        Returns:
            The model, and remarks on every difference between the stored and the loaded tensors.

        Raises:
            BenchError: A tensor of the model is not in the file, or one of the file is not in the model.
        """
        if adapt:
            try:
                model, given = self._adapted(classes, dict(stored), file)
            except BenchError as e:
                hint = tensors.prefix_hint(stored, self.create(classes).state_dict())
                problem = f"{file} does not fit {self.name}: no tensor has its name in {self.architecture}"
                raise BenchError(problem + hint if hint else str(e)) from None
        else:
            model, given = self.create(classes), dict(stored)
            tensors.check(f"{file} does not fit {self.name}", model.state_dict(), given)
            model.load_state_dict(given)
            _compare(f"{file} in {self.name}", model, given)
        return model, _remarks(stored, given, model)

    def _adapted(self, classes: int, stored: dict[str, Tensor], file: str) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model as loaded by timm, and the tensors that timm loaded. Raises BenchError where they differ."""
        with _watched() as loads:
            model = self.create(classes, stored)
        given = next((state for module, state in reversed(loads) if module is model), None)
        if given is None:
            raise BenchError(
                f"{self.name}: timm has loaded nothing of {file} into {self.architecture}; check its config"
            )
        _compare(f"{file} in {self.name}", model, given)
        return model, given


@contextmanager
def _watched() -> Iterator[list[tuple[nn.Module, dict[str, Tensor]]]]:
    """Record every call of load_state_dict, since timm does not report what it loads."""
    loads: list[tuple[nn.Module, dict[str, Tensor]]] = []
    original = nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **more: Any) -> Any:
        loads.append((self, dict(state_dict)))
        return original(self, state_dict, *args, **more)

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield loads
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def _compare(what: str, model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Raise BenchError where ``model`` does not have exactly the tensors it was given.

    Tensors of a complete submodule that the model is made without (attn_pool, AuxLogits) may be left over.
    """
    state = model.state_dict()
    parts = {name for name, _ in model.named_children()}
    extra = {k for k in given if k not in state and k.partition(".")[0] not in parts and "." in k}
    counters = {k for k in state if k.endswith(tensors.COUNTER)}
    tensors.check(what, state, {k: v for k, v in given.items() if k not in extra}, counters)
    for key, value in given.items():
        if key not in extra and not torch.equal(state[key].cpu(), value.to(state[key].dtype).cpu()):
            raise BenchError(f"{what}: {key} differs from the stored tensor after loading; report this to certbench")


def _remarks(stored: Mapping[str, Tensor], given: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Describe the changes between the file and the model, for the run's first lines and its record."""
    state = model.state_dict()
    remarks = []
    if kinds := {str(v.dtype).removeprefix("torch.") for v in stored.values() if v.is_floating_point()} - {"float32"}:
        remarks.append(f"stored as {' and '.join(sorted(kinds))}, computed in float32")
    for key in stored.keys() & given.keys():
        if stored[key].shape != given[key].shape:
            shapes = ("x".join(map(str, v.shape)) for v in (stored[key], given[key]))
            remarks.append(f"{key} resized from {' to '.join(shapes)}")
        elif stored[key] is not given[key] and not torch.equal(stored[key], given[key]):
            remarks.append(f"{key} rewritten by timm")
    same = {v.data_ptr() for v in given.values()}
    if other := [k for k, v in stored.items() if k not in given and v.data_ptr() not in same]:
        more = ", ..." if len(other) > 1 else ""
        remarks.append(f"{len(other)} stored tensors dropped or rewritten by timm ({other[0]}{more})")
    if extra := [k for k in given if k not in state]:
        parts = ", ".join(sorted({k.partition(".")[0] for k in extra}))
        remarks.append(f"left out, since the model has no such part: {parts}")
    return sorted(remarks)
