"""How F is computed where that is not plain float32: faster, with other last bits, so part of the identity.

Only certification is affected: training, and the weights it gives, are those of float32. Noise, pixels and the
comparison of logits stay float32 too, so F in another arithmetic is another classifier, certified as any other.
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

# What may be asked for, several at a time; float32 alone is the default, and no part of an identity.
WORDS = ("float32", "bfloat16", "channels-last", "compile")


def parse(text: str) -> tuple[str, ...]:
    """The words of ``--arithmetic`` in a fixed order, without float32. Raises BenchError."""
    words = {w.strip() for w in text.split(",")}
    if wrong := sorted(words - set(WORDS)):
        raise unknown("--arithmetic", wrong[0], WORDS)
    if {"float32", "bfloat16"} <= words:
        raise BenchError(f"--arithmetic {text}: float32 or bfloat16, not both")
    return tuple(w for w in WORDS[1:] if w in words)


def model(defense: nn.Module, words: tuple[str, ...], device: torch.device) -> Logits:
    """The fitted defense as the engine calls it: float32 pixels to float32 logits, computed as ``words`` say.

    The weights keep their values. The base, which other runs share, is left as it is.
    """
    if not words:
        return defense
    layout = torch.channels_last if "channels-last" in words else torch.contiguous_format
    defense.to(memory_format=layout)
    call = _compiled(defense) if "compile" in words else defense

    def logits(x: Tensor, draw: Draw) -> Tensor:
        # autocast reaches a base that may only be queried, whose weights are nobody's to convert.
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
    """The defense through torch.compile, all at the first call.

    Its draws and the count of its queries are left to Python. A later call that would compile anew, as where logits
    depend on a number that changes, raises RuntimeError: in mid-run F would become another function.
    """
    import torch._dynamo
    import torch._inductor.config
    from torch._dynamo.decorators import skip

    if not hasattr(torch._inductor.config, "deterministic"):
        raise BenchError("--arithmetic compile: the compiler of this torch may choose by timing; upgrade torch")
    # Code is kept by Python function, which all defenses share, and is given up beyond so many of them.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**20
    skip(View.__call__)  # it counts; the base that it asks is compiled apart

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
    """torch's compiler has one stance for all threads: it stays while any of them runs what is compiled."""

    def __init__(self) -> None:
        self._lock, self._running, self._kept = threading.Lock(), 0, ExitStack()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """For the first call of a defense, before any votes: one at a time."""
        with self._lock:
            yield

    @contextmanager
    def as_compiled(self) -> Iterator[None]:
        """Nothing is compiled within this context, and what would be raises RuntimeError."""
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
