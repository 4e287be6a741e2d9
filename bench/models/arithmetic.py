"""Compute F in other arithmetic than plain float32: faster, with other last bits, so part of the identity.

Training always uses float32; so do noise, pixels and the comparison of logits. F in another arithmetic is another
classifier, certified as any other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import BenchError, unknown
from bench.interface import Draw, Logits
from bench.models.base import View

# Values of --arithmetic, which may be combined. float32 alone is the default, and not part of an identity.
WORDS = ("float32", "bfloat16", "channels-last", "compile")


def parse(text: str) -> tuple[str, ...]:
    """Return the words of ``--arithmetic`` in a fixed order, without float32. Raises BenchError."""
    words = {w.strip() for w in text.split(",")}
    if wrong := sorted(words - set(WORDS)):
        raise unknown("--arithmetic", wrong[0], WORDS)
    if {"float32", "bfloat16"} <= words:
        raise BenchError(f"--arithmetic {text}: float32 or bfloat16, not both")
    return tuple(w for w in WORDS[1:] if w in words)


def model(defense: nn.Module, words: tuple[str, ...], device: torch.device) -> Logits:
    """Return the fitted defense as a function from float32 pixels to float32 logits, computed as ``words`` say.

    The values of the weights, and the base, which other runs share, stay unchanged.
    """
    if not words:
        return defense
    layout = torch.channels_last if "channels-last" in words else torch.contiguous_format
    defense.to(memory_format=layout)
    call = _compiled(defense) if "compile" in words else defense

    def logits(x: Tensor, draw: Draw) -> Tensor:
        # By autocast, which also applies to a base with QUERY access, whose weights must not be converted.
        with torch.autocast(device.type, torch.bfloat16, enabled="bfloat16" in words):
            out: Tensor = call(x.contiguous(memory_format=layout), draw)
        return out.float()

    return logits


@contextmanager
def deterministic() -> Iterator[None]:
    """Arithmetic that is the same at every call: no TF32, nothing chosen by timing, on a CPU one thread a block."""
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
        with _stance.as_compiled() if done else _stance.compiling():
            out: Tensor = call(x, Opaque(draw))
        done = True
        return out

    return logits


class _Stance:
    """The compiler's stance, which torch shares between threads: set while any thread runs compiled code."""

    def __init__(self) -> None:
        self._lock, self._running, self._kept = threading.Lock(), 0, ExitStack()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Compile, in one thread at a time: for the first call of a defense, before any votes."""
        with self._lock:
            yield

    @contextmanager
    def as_compiled(self) -> Iterator[None]:
        """Raise RuntimeError for any recompilation while the context lasts."""
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._kept.enter_context(torch.compiler.set_stance("fail_on_recompile"))
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._kept.close()


_stance = _Stance()
