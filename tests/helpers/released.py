"""Networks of released repositories, with random weights under the names of their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block of 3x3 convolutions, or with a bottleneck of 1x1 convolutions around one of 3x3."""

    def __init__(self, before: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        after = 4 * width if bottleneck else width
        plan = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
        self.count = 3 if bottleneck else 2
        for i, (a, b, side, step) in enumerate(
            plan if bottleneck else [(before, width, 3, stride), (width, width, 3, 1)]
        ):
            self.add_module(f"conv{i + 1}", nn.Conv2d(a, b, side, step, side // 2, bias=False))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(b))
        self.downsample: nn.Module | None = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.count + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = out if i == self.count else out.relu()
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """Cohen et al.'s ResNet-110 for CIFAR-10, or torchvision's ResNet-50."""

    def __init__(self, blocks: tuple[int, ...], width: int, bottleneck: bool, classes: int) -> None:
        super().__init__()
        self.large = bottleneck
        stem = (7, 2, 3) if bottleneck else (3, 1, 1)
        self.conv1, self.bn1 = nn.Conv2d(3, width, *stem, bias=False), nn.BatchNorm2d(width)
        before = width
        for stage, count in enumerate(blocks):
            here, layers = width * 2**stage, []
            for i in range(count):
                layers.append(Block(before, here, 2 if stage and not i else 1, bottleneck))
                before = 4 * here if bottleneck else here
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(blocks)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = F.max_pool2d(x, 3, 2, 1) if self.large else x
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def resnet110() -> ResNet:
    return _random(ResNet((18, 18, 18), 16, False, 10))


def resnet50() -> ResNet:
    return _random(ResNet((3, 4, 6, 3), 64, True, 1000))


def _random(net: ResNet) -> ResNet:
    _draw_norms(net)
    return net.eval()


def _draw_norms(net: nn.Module) -> None:
    """Draw batch norms and their statistics; residual branches stay small."""
    generator = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_(0, 0.1, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(m.weight, 0.1, 0.4, generator=generator)
            nn.init.normal_(m.bias, 0, 0.1, generator=generator)


class DnCNN(nn.Module):
    """The denoiser of Salman et al. 2020; every tensor is random, so that a lost one shows."""

    def __init__(self, depth: int = 17, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, eps=1e-4), nn.ReLU()]
        self.dncnn = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1, bias=False))
        _draw_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.dncnn(x)


class Normalised(nn.Sequential):
    """A network behind a normalisation layer whose values are no part of its state, as released."""

    def __init__(self, net: nn.Module, wrapped: bool) -> None:
        super().__init__(nn.Identity(), nn.DataParallel(net) if wrapped else net)


def save(path: Path, net: nn.Module, **entries: Any) -> Path:
    """Write a checkpoint as the released training loops do, after a step of their optimizer."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for p in trained[:2]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = {"epoch": 90, "state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), **entries}
    torch.save(state, path, _use_new_zipfile_serialization=False)  # of their time
    return path
