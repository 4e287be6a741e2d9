"""The check that a device draws the grid noise of the CPU, without which counts would depend on the device."""

from __future__ import annotations

import torch

from bench.errors import BenchError
from bench.smoothing.noise import IMAGES, VOTES
from bench.smoothing.rows import Rows
from bench.smoothing.task import Task
from bench.smoothing.votes import Span

CPU = torch.device("cpu")


def check_device(task: Task, index: int) -> None:
    """Compare a block of the run's noisy images with the CPU's; a no-op on a CPU and for float noise.

    The block holds votes of both purposes for the image ``index``, and the largest keys that there are.

    Raises:
        BenchError: if a bit differs, so that nothing may be certified on this device.
    """
    image = torch.from_numpy(task.images([index]))
    if task.device.type == "cpu" or image.is_floating_point():  # float images get float noise, which the CPU draws
        return
    few = max(1, task.block // 4)
    spans = [
        Span("select", index, 0, few),
        Span("estimate", index, 0, max(1, task.block - 2 * few)),
        Span("estimate", IMAGES - 1, VOTES - few, few),
    ]
    places = {index: 0, IMAGES - 1: 0}
    here, there = (
        task.noisy(image.to(device), Rows.of_spans(spans, places, device)).cpu() for device in (CPU, task.device)
    )
    if here.dtype != there.dtype or here.shape != there.shape:
        raise BenchError(f"{task.device} makes noisy images of {there.dtype} {list(there.shape)}, not those of the CPU")
    if different := int((here.view(torch.int32) != there.view(torch.int32)).sum()):
        raise BenchError(
            f"{task.device} draws other noise than the CPU: {different:,} of {here.numel():,} pixels differ, so "
            "nothing is certified there; use --device cpu, or --noise float"
        )
