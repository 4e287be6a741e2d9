"""Train bottleneck adapters in the base's transformer blocks under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Defense, Draw, Schedule


class Adapted(nn.Module):
    """A block's MLP followed by a bottleneck with a residual: h + up(gelu(down(h)))."""

    def __init__(self, mlp: nn.Module, dim: int, width: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.down = nn.Linear(dim, width)
        self.up = nn.Linear(width, dim)
        # Only up: with both at zero, neither weight would ever get a gradient.
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.mlp(x)
        added: Tensor = self.up(F.gelu(self.down(h)))
        return h + added


class Adapter(Defense):
    """Adapters (Houlsby et al. 2019, arXiv 1902.00751) as used by Certified PEFTSmoothing (Fu and Wang 2024).

    There is one in each block, on the MLP's output before it joins the residual stream; the base, including its head,
    stays frozen. Adapters are nonlinear and cannot be merged, so a vote costs slightly more than the base's. The paper
    does not state its schedule; ``paper`` uses that of the prompt tuning it builds on (Jia et al. 2022,
    arXiv 2203.12119) and a learning rate from its search.
    """

    family = "PEFT"
    trains = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Width of the bottleneck, and the training schedule."""

        width: int = 16
        epochs: float = 20
        batch: int = 64
        lr: float = 1e-2
        weight_decay: float = 0.0
        warmup: float = 0.1

    presets: ClassVar = {"paper": {"width": 64, "epochs": 100, "batch": 128, "optimizer": "sgd", "lr": 0.05}}

    def build(self) -> None:
        if self.config.width < 1:
            raise BenchError(f"adapter: width={self.config.width} must be at least 1")
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
            block.mlp = Adapted(block.mlp, dim, self.config.width)

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
