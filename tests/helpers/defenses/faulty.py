"""A defense that breaks at call number ``after``; ``how`` chooses the fault."""

import hashlib
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.interface import Access, Defense, Draw


class Faulty(Defense):
    """The base's logits, with a fault from call number ``after`` on."""

    access = Access.QUERY

    @dataclass(frozen=True)
    class Config:
        how: Literal["raises", "shape", "nan", "drifts", "sleeps", "computes", "greedy"] = "raises"
        after: int = 0
        rows: int = 64  # greedy: the most rows that fit into its memory

    def build(self) -> None:
        self.calls = 0

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        logits = self.context.base(x)
        self.calls += 1
        if self.calls <= self.config.after:
            return logits
        match self.config.how:
            case "raises":
                raise RuntimeError("out of ideas\nsecond line")
            case "shape":
                return logits[:, :-1]
            case "nan":
                return torch.full_like(logits, torch.nan)
            case "drifts":
                return logits + 1e-3 * logits.sin()
            case "sleeps":
                time.sleep(600)
            case "computes":  # in C, where signals are not handled
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
            case "greedy":
                if len(x) > self.config.rows:
                    raise torch.OutOfMemoryError(f"tried to allocate {len(x)} rows")
        return logits
