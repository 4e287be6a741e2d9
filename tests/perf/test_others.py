"""The time of a table on the CIFAR ViT: this engine compared with Cohen's loop and with IBM's ART.

The same images, votes, bound and network, whose last layer is fitted to three digits at 32 x 32 pixels, so that some
images are certified and some are not. Each side draws its own noise. Run by ``make perf``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import cifar_vit
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench import globalstate
from bench.interface import Draw
from bench.models.arithmetic import deterministic
from bench.process.environment import keep_freed_memory
from bench.records import metrics
from bench.smoothing.engine import Device, certify
from bench.smoothing.fixed import Fixed
from bench.smoothing.noise import Noise
from bench.smoothing.rows import add_float
from bench.smoothing.task import Task, block_rows
from bench.smoothing.votes import Certificate
from tests.helpers.loop import published_loop
from tests.helpers.turns import paired

CPU = torch.device("cpu")
SHAPE, CLASSES = (3, 32, 32), 3
SIGMA, N0, N, ALPHA, IMAGES = 0.25, 100, 1000, 0.001, 5
RADII = (0.0, 0.25, 0.5)
LEVEL = 1e-3  # chance at most that the test fails for sides with the same probabilities
Table = list[tuple[int, float]]  # class (-1: abstained) and radius of each image


def digits() -> tuple[Tensor, Tensor]:
    """Return the images [537, 3, 32, 32] and labels of 0 to 2 in scikit-learn's digits."""
    found = load_digits(n_class=CLASSES)
    images = nn.functional.interpolate(torch.from_numpy(found.images / 16).float()[:, None], SHAPE[1:], mode="bilinear")
    return images.expand(-1, 3, -1, -1), torch.from_numpy(found.target)


def fitted(images: Tensor, labels: Tensor) -> nn.Module:
    """Return the CIFAR ViT with random weights and a last layer fitted by least squares under noise."""
    with globalstate.fixed_rng(0), torch.no_grad():
        net = cifar_vit()
        noisy = images + SIGMA * torch.randn(images.shape)
        features = [net.forward_head(net.forward_features(part), pre_logits=True) for part in noisy.split(100)]
        x, y = torch.cat(features).double(), nn.functional.one_hot(labels, CLASSES).double()
        weight = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
        head = nn.Linear(x.shape[1], CLASSES)
        head.weight.copy_(weight.T)
        head.bias.copy_(y.mean(0) - x.mean(0) @ weight)
        net.head = head
    return net


@pytest.fixture(scope="module")
def subject() -> tuple[nn.Module, Tensor, list[int]]:
    """Return the network, the images that are certified, and their labels."""
    keep_freed_memory()
    images, labels = digits()
    shown = slice(402, 402 + IMAGES)  # clear and unclear ones
    return fitted(images[:400], labels[:400]), images[shown].contiguous(), labels[shown].tolist()


def cohen(net: nn.Module, images: Tensor) -> Callable[[], Table]:
    def certify_all() -> Table:
        with torch.inference_mode():
            return [published_loop(net, x, CLASSES, SIGMA, N0, N, ALPHA) for x in images]

    return certify_all


def art(net: nn.Module, images: Tensor) -> Callable[[], Table]:
    """ART, in batches of the engine's block."""
    why = "ART is not installed; pip install 'certbench[perf]'"
    smoothing = pytest.importorskip("art.estimators.certification.randomized_smoothing", reason=why)
    smooth = smoothing.PyTorchRandomizedSmoothing(
        model=net,
        loss=nn.CrossEntropyLoss(),
        input_shape=SHAPE,
        nb_classes=CLASSES,
        sample_size=N0,
        scale=SIGMA,
        alpha=ALPHA,
        device_type="cpu",
    )

    def certify_all() -> Table:
        classes, radii = smooth.certify(images.numpy(), n=N, batch_size=block_rows(SHAPE, CPU))
        return list(zip(classes.tolist(), radii.tolist(), strict=True))

    return certify_all


def agrees(ours: Certificate, theirs: tuple[int, float]) -> bool:
    """Test whether two certificates of one image can come from the same probability (Fisher's exact test)."""
    counts = np.arange(1, N + 1)
    bounds = stats.beta.ppf(ALPHA, counts, N - counts + 1)
    most = int(counts[bounds <= 0.5].max())  # votes of an abstention
    predicted, radius = theirs
    their_votes = int(counts[np.abs(bounds - stats.norm.cdf(radius / SIGMA)).argmin()])  # a radius states its votes
    if predicted == -1 or ours.predicted is None:  # of an abstention at most these votes are known
        if (predicted == -1) == (ours.predicted is None):
            return True
        return not fewer(most, their_votes if predicted != -1 else ours.top_count)
    same = predicted == ours.predicted
    return same and not fewer(their_votes, ours.top_count) and not fewer(ours.top_count, their_votes)


def fewer(one: int, other: int) -> bool:
    """Test whether ``one`` of N votes shows a lower probability than ``other`` of N, one-sided."""
    return bool(stats.hypergeom.cdf(one, 2 * N, one + other, N) < LEVEL / IMAGES / 2)


@pytest.mark.parametrize("other", [cohen, art])
def test_engine_against_others(
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    subject: tuple[nn.Module, Tensor, list[int]],
    other: Callable[[nn.Module, Tensor], Callable[[], Table]],
) -> None:
    """Ratio of seconds for the same table with all threads of torch, n = 1,000."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where ART writes its settings when it is imported
    net, images, labels = subject
    noise, pixels = Noise(0, "test"), images.numpy()
    shape = (add_float(noise, SIGMA), SHAPE, CLASSES, SIGMA, noise, block_rows(SHAPE, CPU), CPU)
    task = Task(lambda i: pixels[i], lambda i: labels[i], *shape)
    device, fixed = Device(task, [Plain(net)] * torch.get_num_threads()), Fixed(N0, N, ALPHA)
    found: dict[str, Any] = {}

    def ours() -> None:
        with deterministic(), torch.inference_mode():
            found["ours"] = list(certify([device], lambda y: fixed.certify(SIGMA, y), range(IMAGES)))

    run = other(net, images)

    def theirs() -> None:
        with globalstate.fixed_rng(0):
            found["theirs"] = run()

    ratios = paired(theirs, ours, 2)
    benchmark.pedantic(ours, rounds=1)
    benchmark.extra_info["ratio"] = statistics.median(ratios)
    ours_at = [rate.value for rate in metrics.summarise(found["ours"], RADII).certified_accuracy]
    right = [radius if top == y else -1.0 for (top, radius), y in zip(found["theirs"], labels, strict=True)]
    theirs_at = [sum(radius >= at for radius in right) / IMAGES for at in RADII]
    with capsys.disabled():
        print(
            f"\nCIFAR ViT, {other.__name__} / engine: median {statistics.median(ratios):.2f} (from {min(ratios):.2f} "
            f"to {max(ratios):.2f}); certified accuracy at {RADII}: theirs {theirs_at}, ours {ours_at}"
        )
    certificates = sorted(found["ours"], key=lambda c: c.index)
    assert all(agrees(c, theirs) for c, theirs in zip(certificates, found["theirs"], strict=True))
    assert 0 < ours_at[1] < 1  # a table that says something


class Plain:
    """A network as a model that draws no randomness."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net

    def __call__(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self._net(x)
        return out
