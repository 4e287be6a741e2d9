"""Train bottleneck adapters in the base's transformer blocks under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Defense, Draw, Schedule

DROPOUT = 0.1  # between the layers of a parallel adapter, in training


class Adapted(nn.Module):
    """A block's MLP with a bottleneck that adds to its output.

    Sequential (``parallel`` is 0): h + up(gelu(down(h))) of the MLP's output h. Parallel: the MLP's output plus
    parallel * up(relu(down(x))), where x is the MLP's input.
    """

    def __init__(self, mlp: nn.Module, dim: int, width: int, parallel: float) -> None:
        super().__init__()
        self.mlp, self.parallel = mlp, parallel
        self.down = nn.Linear(dim, width)
        self.up = nn.Linear(width, dim)
        # Only up: with both at zero, neither weight would ever get a gradient.
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if parallel:
            nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.mlp(x)
        if not self.parallel:
            added: Tensor = self.up(F.gelu(self.down(h)))
            return h + added
        beside: Tensor = self.up(F.dropout(F.relu(self.down(x)), DROPOUT, self.training))
        return h + self.parallel * beside


class Adapter(Defense):
    r"""Adapters (Houlsby et al. 2019, arXiv 1902.00751) as used by Certified PEFTSmoothing (Fu and Wang 2024).

    There is one in each block, on the MLP's output before it joins the residual stream; the base, including its head,
    stays frozen. Adapters are nonlinear and cannot be merged, so a vote costs slightly more than the base's. That paper
    does not state its schedule; ``paper`` is the setting in which visual prompt tuning (Jia et al. 2022,
    arXiv 2203.12119) compares with adapters, as released: AdamW, cosine over 100 epochs with 5 of warm-up, batch 384.
    Its rates 1e-4, 5e-4, 1e-3 and 5e-3 (times batch / 256) and weight decays are searched by::

        bench run --defense adapter --dataset cifar10 --preset paper \
            --search lr=1.5e-4,7.5e-4,1.5e-3,7.5e-3 --search weight_decay=0,1e-4,1e-3,1e-2

    The width 64 is Certified PEFTSmoothing's (1.19 M parameters on ViT-B); prompt tuning's own adapters have an eighth
    of the base's (``--set width=96`` on ViT-B). Only the up-projection starts at zero. Prompt tuning's code starts both
    projections there, so that only the bias of the last one ever gets a gradient.

    ``parallel`` above 0 makes AdaptFormer's adapters (Chen et al. 2022, arXiv 2205.13535): beside the MLP, on the same
    normalised input, with ReLU, dropout 0.1 and the output scaled by this factor, 0.1 there. The paper's formula
    normalises the adapter's input; the released code leaves that out. AdaptFormer's own schedule is::

        bench run --defense adapter --dataset cifar10 --preset paper --set parallel=0.1 --set optimizer=sgd \
            --set lr=0.4 --set batch=1024 --set weight_decay=0 --set warmup=0.2
    """

    family = "PEFT"
    trains = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Width and place of the bottleneck, and the training schedule."""

        width: int = 16  # of the bottleneck
        parallel: float = 0.0  # 0: after the MLP; above: beside it, with the output scaled by this
        epochs: float = 20
        batch: int = 64
        lr: float = 1e-2
        weight_decay: float = 0.0
        warmup: float = 0.1

    presets: ClassVar = {
        "paper": {
            "width": 64,
            "epochs": 100,
            "batch": 384,
            "optimizer": "adamw",
            "lr": 1.5e-3,
            "weight_decay": 0.01,
            "warmup": 0.05,
        }
    }

    def build(self) -> None:
        if self.config.width < 1:
            raise BenchError(f"adapter: width={self.config.width} must be at least 1")
        if not 0 <= self.config.parallel <= 1e3:  # also refuses nan
            raise BenchError(
                f"adapter: parallel={self.config.parallel:g} must be 0 (after the MLP) or a factor above 0, such as 0.1"
            )
        self.model = self.context.base.copy(self.context.classes).requires_grad_(False)
        blocks = getattr(self.model.model, "blocks", ())
        # The last layer gives the width. A linear one maps tokens; a convnet's maps feature maps.
        lasts = [getattr(getattr(block, "mlp", None), "fc2", None) for block in blocks]
        dims = [last.out_features for last in lasts if isinstance(last, nn.Linear)]
        if not dims or len(dims) != len(blocks):
            kind = type(self.model.model).__name__
            raise BenchError(
                f"adapter: this base ({kind}) has no transformer blocks with an MLP to adapt; "
                f"give a ViT with --base, or use lora"
            )
        for block, dim in zip(blocks, dims, strict=True):
            block.mlp = Adapted(block.mlp, dim, self.config.width, self.config.parallel)

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
