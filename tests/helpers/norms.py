"""Networks whose batch norms are not the identity, as a new network's are."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def moved(model: Network) -> Network:
    """Give every batch norm of a model other weights and statistics, and return the model."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                assert value is not None
                value.data = 0.5 + torch.rand(value.shape, generator=generator)
    return model
