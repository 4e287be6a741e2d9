"""An unsound defense that looks sound: ``how`` chooses why its logits are not a fixed function of one image."""

import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.datasets import load_card, load_split
from bench.interface import Access, Defense, Draw
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.noise import Noise, Vote

BUFFER: dict[torch.Size, Tensor] = {}  # shared by the copies of several threads


class Careless(Defense):
    access = Access.QUERY

    @dataclass(frozen=True)
    class Config:
        how: Literal[
            "global_buffer",
            "drifts",
            "build_numpy",
            "build_python",
            "odd_half_of_tile",
            "majority_of_tile_but_first",
            "draw_index",
            "knows_the_seed",
            "subtract_noise",
            "honest_when_checked",
            "nan",
            "ties",
            "memorises",
        ] = "ties"
        card: str = ""  # the card whose labels it looks up
        after: int = 0  # calls before it starts
        flag: str = ""  # it drifts only if this file exists
        n: int = 100  # votes of an image that knows_the_seed prepares for

    def build(self) -> None:
        self.calls, self.shift, self.seen = 0, torch.zeros(()), set[bytes]()
        match self.config.how:
            case "build_numpy":
                self.shift = torch.from_numpy(0.3 * np.random.randn(1, 8, 8)).float()
            case "build_python":
                self.shift = torch.tensor([random.gauss(0, 0.3) for _ in range(64)]).view(1, 8, 8)
            case "knows_the_seed" | "memorises":
                self.known = self._foresee()

    def _truth(self) -> tuple[Tensor, Tensor]:
        split = load_split(load_card(self.config.card), "test")
        return torch.from_numpy(split.labels), torch.from_numpy(split.integers())

    def _foresee(self) -> dict[Any, int]:
        """Return the labels of images, or of all their noisy copies with seed 0."""
        labels, images = self._truth()
        if self.config.how == "memorises":
            return {i: int(y) for i, y in enumerate(labels)}
        grid, known = GridNoise(Noise(0, "test"), 0.25, 17), {}
        for i in range(len(images)):
            for purpose in ("select", "estimate"):
                noise = grid.draw([Vote(purpose, i, v) for v in range(self.config.n)], 64)
                for row in (noise + images[i].reshape(1, -1)).to(torch.int16).numpy():
                    known[row.tobytes()] = int(labels[i])
        return known

    def _from_truth(self, draw: Draw) -> Tensor:
        """Return the true class, looked up by the keys of a draw."""
        labels = self._truth()[0]
        at = torch.tensor([vote.image % len(labels) for vote in draw._given])  # type: ignore[attr-defined]
        return F.one_hot(labels[at], 10).float()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        self.calls += 1
        base = self.context.base
        begun = self.calls > self.config.after
        match self.config.how:
            case "global_buffer" if begun:
                buffer = BUFFER.setdefault(x.shape, torch.empty_like(x))
                buffer.copy_(x)
                time.sleep(2e-3)
                return base(x) + base(buffer.roll(1, 3))
            case "drifts" if begun and (not self.config.flag or Path(self.config.flag).exists()):
                self.shift = self.shift + 0.05
            case "odd_half_of_tile" | "majority_of_tile_but_first":
                first = 8 if self.config.how == "odd_half_of_tile" else 1
                out = base(x).view(-1, 16, 10).clone()
                out[:, first:] = out[:, first:].mean(1, keepdim=True)
                return out.view(-1, 10)
            case "draw_index":
                return self._from_truth(draw)
            case "knows_the_seed":
                out = base(x).clone()
                for i, row in enumerate((x * 16).round().to(torch.int16).reshape(len(x), -1).numpy()):
                    if (y := self.known.get(row.tobytes())) is not None:
                        out[i] = F.one_hot(torch.tensor(y), 10)
                return out
            case "subtract_noise":
                keys = [Vote(v.purpose.removesuffix("/defense"), v.image, v.vote) for v in draw._given]  # type: ignore[attr-defined]
                noise = GridNoise(draw._noise, draw.sigma, 17).draw(keys, 64).view_as(x)  # type: ignore[attr-defined]
                return base(x - noise / 16)
            case "honest_when_checked":
                block = hashlib.sha256(x.numpy().tobytes()).digest()
                if self.calls <= self.config.after or block in self.seen:
                    self.seen.add(block)
                    return base(x)
                return self._from_truth(draw)
            case "nan":
                out = base(x).clone()
                out[x.flatten(1).mean(1) > 0.32] = torch.nan
                return out
            case "ties":
                return base(x).round()
            case "memorises":  # the nearest test image: a fixed function of the noisy image
                images = self._truth()[1].flatten(1) / 16
                nearest = torch.cdist(x.flatten(1), images).argmin(1)
                return F.one_hot(torch.tensor([self.known[int(i)] for i in nearest]), 10).float()
        return base(x + self.shift)
