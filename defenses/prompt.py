"""Train prompt tokens in the base transformer's input sequence under Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Defense, Draw, Schedule


class Prompted(nn.Module):
    """A transformer's blocks with prompts among their input tokens, removed again after the last block.

    ``prompts`` [layers, tokens, dim] are inserted before the first block, after the first ``after`` tokens. At each
    further layer they replace the outputs of the previous block's prompts.
    """

    def __init__(self, blocks: nn.Sequential, prompts: Tensor, after: int, dropout: float) -> None:
        super().__init__()
        self.blocks = blocks
        self.prompts = nn.Parameter(prompts)
        self.dropout = nn.Dropout(dropout)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        before, rest = x[:, : self.after], x[:, self.after :]
        layers, tokens, _ = self.prompts.shape
        for i, block in enumerate(self.blocks):
            if i < layers:
                prompt = self.dropout(self.prompts[i].expand(len(x), -1, -1))
            x = block(torch.cat((before, prompt, rest), dim=1))
            before, prompt, rest = x.tensor_split((self.after, self.after + tokens), dim=1)
        return torch.cat((before, rest), dim=1)


class PromptTuning(Defense):
    r"""Visual prompt tuning (Jia et al. 2022, arXiv 2203.12119) as used by Certified PEFTSmoothing.

    Prompts follow the class token: at the first block alone (``deep=false``), or new ones at every block. Only the
    blocks see them: position embeddings, pooling over tokens and the head work as in the base. The base, including its
    head, stays frozen. Prompt tuning itself also trains the head; Certified PEFTSmoothing counts its parameters without
    it. That paper does not state its schedule; ``paper`` uses that of prompt tuning, as released: SGD, cosine over 100
    epochs with 10 of warm-up, batch 128. Its rates 0.05 to 50 (times batch / 256) and weight decays are searched by::

        bench run --defense prompt --dataset cifar10 --preset paper \
            --search lr=0.025,0.05,0.125,0.25,0.5,1.25,2.5,5,12.5,25 --search weight_decay=0,1e-4,1e-3,1e-2

    Without a search ``paper`` takes 2.5 times batch / 256.
    """

    family = "PEFT"
    trains = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Number and position of the prompts, and the training schedule."""

        tokens: int = 8  # prompts of a layer
        deep: bool = True  # in each layer; or before the first
        dropout: float = 0.1  # of the prompts
        epochs: float = 20
        batch: int = 64
        lr: float = 1e-2
        weight_decay: float = 0.0
        warmup: float = 0.1

    presets: ClassVar = {
        "paper": {"tokens": 50, "epochs": 100, "batch": 128, "optimizer": "sgd", "lr": 1.25, "weight_decay": 1e-4}
    }

    def build(self) -> None:
        if self.config.tokens < 0 or not 0 <= self.config.dropout < 1:
            raise BenchError("prompt: tokens must be at least 0, dropout at least 0 and below 1")
        self.model = self.context.base.copy(self.context.classes).requires_grad_(False)
        vit = self.model.model
        if not isinstance(vit, VisionTransformer):
            raise BenchError(
                f"prompt: this base ({type(vit).__name__}) is not timm's VisionTransformer, so prompts cannot be "
                f"inserted into its tokens; give a ViT with --base, or use lora"
            )
        patch = vit.in_chans * math.prod(vit.patch_embed.patch_size)
        bound = math.sqrt(6 / (patch + vit.embed_dim))
        layers = len(vit.blocks) if self.config.deep else 1
        prompts = torch.empty(layers, self.config.tokens, vit.embed_dim).uniform_(-bound, bound)
        vit.blocks = Prompted(vit.blocks, prompts, int(vit.has_class_token), self.config.dropout)  # type: ignore[assignment]

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
