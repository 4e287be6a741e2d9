"""Compute F in other arithmetic than plain float32: faster, with other last bits, so part of the identity.

Noise, pixels and the comparison of logits always use float32; what training uses is a preset's choice
(``bench.training.bfloat16``). F in another arithmetic is another classifier, certified as any other.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError, unknown
from bench.interface import Draw, Logits
from bench.models.base import View
from bench.models.rounded import RoundedLayers, RoundedWeights
from bench.process.runlog import log

# Values of --arithmetic, which may be combined. float32 alone is the default, and not part of an identity.
WORDS = ("float32", "bfloat16", "tf32", "channels-last", "compile")
_NUMBERS = {"float32", "bfloat16", "tf32"}  # one of them at a time


def parse(text: str) -> tuple[str, ...]:
    """Return the words of ``--arithmetic`` in a fixed order, without float32. Raises BenchError."""
    words = {w.strip() for w in text.split(",")}
    if wrong := sorted(words - set(WORDS)):
        raise unknown("--arithmetic", wrong[0], WORDS)
    if len(both := [w for w in WORDS if w in words & _NUMBERS]) > 1:
        raise BenchError(f"--arithmetic {text}: {' or '.join(both)}, not both; leave one of them out")
    return tuple(w for w in WORDS[1:] if w in words)


def check(words: Sequence[str], device: torch.device) -> None:
    """Raise BenchError where a device would compute something else under these words."""
    if "tf32" not in words:
        return
    name = device.type
    if device.type == "cuda":
        if torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0):
            return
        name = torch.cuda.get_device_name(device)
    raise BenchError(
        f"--arithmetic tf32: {name} would compute in float32; only NVIDIA GPUs have TF32, since the A100. "
        "Leave tf32 out, or choose such a GPU with --device cuda"
    )


def model(
    defense: nn.Module,
    words: tuple[str, ...],
    device: torch.device,
    base: nn.Module | None = None,
    weights: RoundedWeights | None = None,
) -> Logits:
    """Return the fitted defense as a function from float32 pixels to float32 logits, computed as ``words`` say.

    The values of the weights, and the base, which other runs share, stay unchanged.

    Args:
        defense: It stays usable in float32.
        words: As ``parse`` returns them.
        device: Where defense and base are.
        base: The classifier that the defense queries.
        weights: bfloat16 copies of weights that other models made and this one may share.

    Raises:
        BenchError: The device has no such arithmetic (see ``check``).
    """
    check(words, device)
    if not words:
        return defense
    layout = torch.channels_last if "channels-last" in words else torch.contiguous_format
    defense.to(memory_format=layout)
    call = _compiled(defense) if "compile" in words else defense
    if "bfloat16" in words:
        call = _in_bfloat16(call, defense, device, base, weights or RoundedWeights())
    held = _tf32.held if "tf32" in words else nullcontext

    def logits(x: Tensor, draw: Draw) -> Tensor:
        with held():
            out: Tensor = call(x.contiguous(memory_format=layout), draw)
        return out.float()

    return logits


def _in_bfloat16(
    call: Logits, defense: nn.Module, device: torch.device, base: nn.Module | None, weights: RoundedWeights
) -> Logits:
    """Call within autocast, which also applies to a base with QUERY access, with weights that are rounded once."""
    layers = RoundedLayers([m for m in (defense, base) if m is not None], weights, device)

    def first(x: Tensor, draw: Draw) -> bool:
        """Whether the block has the same logits with weights rounded once as with autocast alone."""
        alone: Tensor = defense(x, copy.copy(draw))
        with layers.used():
            once: Tensor = defense(x, copy.copy(draw))
        if torch.equal(alone.nan_to_num(), once.nan_to_num()):
            return True
        log.warning(
            "bfloat16: its weights are rounded in every block, not once, which would change its logits: they change "
            "while it votes, or its logits differ from call to call"
        )
        return False

    use: bool | None = None  # not known before the first block

    def logits(x: Tensor, draw: Draw) -> Tensor:
        nonlocal use
        with torch.autocast(device.type, torch.bfloat16):
            if use is None:
                use = bool(layers) and first(x, draw)
            with layers.used() if use else nullcontext():
                return call(x, draw)

    return logits


@contextmanager
def deterministic() -> Iterator[None]:
    """Compute the same at every call: nothing chosen by timing, on a CPU one thread a block.

    Without TF32, which a ``model`` that computes in it sets for its own calls.
    """
    benchmark = torch.backends.cudnn.benchmark
    tf32 = torch.backends.cudnn.allow_tf32
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def _compiled(defense: nn.Module) -> Logits:
    """Compile the defense with torch.compile, completely at the first call.

    Draws and the count of queries stay in Python. A later call that would recompile, as when logits depend on a number
    that changes, raises RuntimeError, since F would become another function during the run.
    """
    import torch._dynamo
    import torch._inductor.config
    from torch._dynamo.decorators import skip

    if not hasattr(torch._inductor.config, "deterministic"):
        raise BenchError("--arithmetic compile: this torch's compiler may choose kernels by timing; upgrade torch")
    # Compiled code is stored by Python function, which all defenses share; beyond this limit torch stops compiling.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**20
    skip(View.__call__)  # it counts queries; the base it calls is compiled separately

    class Opaque:
        def __init__(self, draw: Draw) -> None:
            self.sigma, self._draw = draw.sigma, draw

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def normal(self, *shape: int) -> Tensor:
            return self._draw.normal(*shape)

    call: Any = torch.compile(defense, dynamic=False, options={"deterministic": True})
    done = False

    def logits(x: Tensor, draw: Draw) -> Tensor:
        nonlocal done
        with _as_compiled.held() if done else _as_compiled.alone():
            out: Tensor = call(x, Opaque(draw))
        done = True
        return out

    return logits


class _WhileAny:
    """A setting that torch shares between threads, made by the first that needs it and undone by the last."""

    def __init__(self, setting: Callable[[], AbstractContextManager[object]]) -> None:
        self._setting = setting
        self._lock, self._running, self._kept = threading.Lock(), 0, ExitStack()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads from making or undoing it while the context lasts."""
        with self._lock:
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the setting while the context lasts."""
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._kept.enter_context(self._setting())
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._kept.close()


@contextmanager
def _allow_tf32() -> Iterator[None]:
    tf32, precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(precision)


# Compilation happens alone, at the first call of a defense, before any votes; later a recompilation is an error.
_as_compiled = _WhileAny(lambda: torch.compiler.set_stance("fail_on_recompile"))
_tf32 = _WhileAny(_allow_tf32)  # only while logits are computed: other models of the process use float32
