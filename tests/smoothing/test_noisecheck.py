"""Nothing is certified on a device whose noise differs from the CPU's.

The device here is torch's meta, whose tensors hold nothing: what it would draw is drawn on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.errors import BenchError
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.gridnoise_torch import TorchNoise
from bench.smoothing.noise import Noise, Vote
from bench.smoothing.noisecheck import check_device
from bench.smoothing.rows import Rows, add_float
from bench.smoothing.task import Task

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
IMAGES = np.random.default_rng(0).integers(0, 17, (2, 1, 8, 8)).astype(np.uint8)
BLOCK = 64
Change = Callable[[Tensor, list[Vote]], Tensor]


class Accelerated(GridNoise):
    """Grid noise on a made-up device: plain torch's, and then changed."""

    change: Change = staticmethod(lambda noise, votes: noise)
    called = 0

    def inputs(self, images: Tensor, rows: Rows) -> Tensor:
        if images.device != DEVICE:
            return super().inputs(images, rows)
        self.called += 1
        assert rows.placed.device == DEVICE and len(rows) == BLOCK
        here = Rows.of_votes(list(rows), [0] * len(rows), CPU)
        drawn = TorchNoise(self._streams, self._table, CPU).draw(here, 64)
        return (torch.from_numpy(IMAGES[1]) + self.change(drawn, list(rows)).view(-1, 1, 8, 8)).float() / 16


def task(noise: GridNoise, device: torch.device = DEVICE) -> Task:
    return Task(lambda i: IMAGES[i], lambda i: 0, noise.inputs, (1, 8, 8), 10, 0.25, Noise(0, "test"), BLOCK, device)


def changed(change: Change | None = None) -> Accelerated:
    noise = Accelerated(Noise(0, "test"), 0.25, 17)
    noise.change = change or noise.change
    return noise


def test_a_device_that_draws_the_noise_of_the_cpu_passes() -> None:
    check_device(task(noise := changed()), 1)
    assert noise.called == 1


def one_pixel(noise: Tensor, votes: list[Vote]) -> Tensor:
    noise[-1, 63] += 1
    return noise


def of_purpose(purpose: str) -> Change:
    return lambda noise, votes: noise + torch.tensor([v.purpose == purpose for v in votes])[:, None]


def of_large_votes(noise: Tensor, votes: list[Vote]) -> Tensor:
    return noise + torch.tensor([v.vote >= 2**32 for v in votes])[:, None]


def of_large_images(noise: Tensor, votes: list[Vote]) -> Tensor:
    return noise + torch.tensor([v.image >= 2**31 for v in votes])[:, None]


@pytest.mark.parametrize(
    "change", [one_pixel, of_purpose("select"), of_purpose("estimate"), of_large_votes, of_large_images]
)
def test_a_broken_implementation_is_refused_in_one_line(change: Change) -> None:
    with pytest.raises(
        BenchError, match=r"^meta draws other noise than the CPU: [\d,]+ of 4,096 pixels differ.*--device cpu"
    ) as e:
        check_device(task(changed(change)), 1)
    assert "\n" not in str(e.value)


def test_images_of_another_type_are_refused() -> None:
    noise = changed()
    whole = noise.inputs
    noise.inputs = lambda images, rows: whole(images, rows).double() if images.is_meta else whole(images, rows)  # type: ignore[method-assign]
    with pytest.raises(BenchError, match="float64"):
        check_device(task(noise), 1)


def test_a_cpu_and_float_noise_are_not_checked() -> None:
    def never(images: Tensor, rows: Rows) -> Tensor:
        raise AssertionError

    noise = changed()
    noise.inputs = never  # type: ignore[method-assign]
    check_device(task(noise, CPU), 1)
    source = Noise(0, "test")
    pixels = IMAGES.astype(np.float32) / 16
    noisy = add_float(source, 0.25)
    check_device(Task(lambda i: pixels[i], lambda i: 0, noisy, (1, 8, 8), 10, 0.25, source, BLOCK, DEVICE), 1)
