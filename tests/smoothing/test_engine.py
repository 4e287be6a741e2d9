"""The engine: equal counts in any packing, every vote counted, models with dependent rows refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Draw
from bench.smoothing import bounds, engine
from bench.smoothing.anytime import Anytime
from bench.smoothing.engine import Device, certify
from bench.smoothing.fixed import Fixed
from bench.smoothing.noise import Noise, Vote
from bench.smoothing.rowcheck import check_rows
from bench.smoothing.rows import Rows, add_float
from bench.smoothing.task import Task, block_rows
from bench.smoothing.votes import TILE, Batch, Certificate, Span, Voted

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)
PIXELS = np.random.default_rng(0).random((30, *SHAPE), np.float32)


def task(block: int = 64, sigma: float = 0.5) -> Task:
    noise = Noise(0, "test")
    noisy = add_float(noise, sigma)
    return Task(lambda i: PIXELS[i], lambda i: i % 3, noisy, SHAPE, 3, sigma, noise, block, CPU)


def network() -> Callable[[Tensor, Draw], Tensor]:
    """Make a network of hidden width 50: on some machines its last bits depend on a row's alignment."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 50), nn.ReLU(), nn.Linear(50, 3)).eval()
    return lambda x, draw: net(x)


def certificates(
    model: Callable[[Tensor, Draw], Tensor], t: Task, order: list[int], fixed: Fixed
) -> dict[int, Certificate]:
    with torch.inference_mode():
        found = list(certify([Device(t, [model])], lambda label: fixed.certify(t.sigma, label), order))
    assert len({c.index for c in found}) == len(found) == len(order)
    return {c.index: replace(c, seconds=0.0) for c in found}


@given(
    order=st.lists(st.integers(0, 29), min_size=1, max_size=30, unique=True),
    n0=st.integers(1, 40),
    n=st.integers(10, 150),
)
@settings(max_examples=25, deadline=None)
def test_counts_do_not_depend_on_order_subset_or_packing(order: list[int], n0: int, n: int) -> None:
    fixed, model = Fixed(n0, n, 0.01), network()
    together = certificates(model, task(), order, fixed)
    for index in order[:4]:
        assert certificates(model, task(), [index], fixed)[index] == together[index]
    assert certificates(model, task(), order[::-1], fixed) == together


@pytest.mark.parametrize("procedure", [Fixed(10, 100, 0.01), Anytime(10, 2000, 0.01, (0.1, 0.4))])
@pytest.mark.parametrize("devices", [1, 2])
def test_counts_do_not_depend_on_the_batches_in_flight(procedure: Fixed | Anytime, devices: int) -> None:
    """As on a GPU, which works on a batch while the next one is started."""
    t, model, order = task(), network(), list(range(30))

    def found(devices: list[Device]) -> dict[int, Certificate]:
        with torch.inference_mode():
            done = certify(devices, lambda label: procedure.certify(t.sigma, label), order)
            return {c.index: replace(c, seconds=0.0) for c in done}

    several = [Device(t, [model] * 2, in_flight=2) for _ in range(devices)]
    assert found(several) == found([Device(t, [model])])


def test_the_next_batch_is_started_before_the_votes_of_the_first_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, most, begin = 0, 0, Device.begin

    def counted(self: Device, *batch: Any) -> Callable[[], Voted]:
        nonlocal begun, most
        begun += 1
        most = max(most, begun)
        wait = begin(self, *batch)

        def waited() -> Voted:
            nonlocal begun
            begun -= 1
            return wait()

        return waited

    monkeypatch.setattr(Device, "begin", counted)
    t, fixed = task(), Fixed(10, 200, 0.01)
    for in_flight in (1, 2):
        most = 0
        with torch.inference_mode():
            list(certify([Device(t, [network()], in_flight)], lambda label: fixed.certify(t.sigma, label), range(9)))
        assert begun == 0 and most == in_flight


def test_an_image_is_copied_to_the_device_once_while_it_gets_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Tensor] = []
    monkeypatch.setattr(engine, "to_device", lambda x, device: copied.append(x) or x)
    t, fixed = task(64), Fixed(10, 2000, 0.01)
    with torch.inference_mode():
        list(certify([Device(t, [network()])], lambda label: fixed.certify(t.sigma, label), range(6)))
    assert len(copied) == 6


@pytest.mark.parametrize(("classes", "dtype"), [(10, torch.uint8), (255, torch.uint8), (256, torch.int16)])
def test_votes_travel_in_the_smallest_integers(classes: int, dtype: torch.dtype) -> None:
    """With the class after the last, of NaN, among them."""
    t = replace(task(), classes=classes)
    logits = torch.zeros(64, classes)
    logits[0], logits[1, -1] = math.nan, 1.0
    batch = Batch(0, (Span("estimate", 0, 0, 64),))
    voted = Device(t, [lambda x, draw: logits]).vote(batch, {0: PIXELS[0]})
    assert voted[:3].tolist() == [classes, classes - 1, 0] and voted.dtype == np.int64
    assert engine._smallest_type(classes) == dtype


def test_certificates_follow_cohen_exactly() -> None:
    """Every field recomputed from a plain loop over the same votes."""
    model, t, fixed = network(), task(), Fixed(33, 210, 0.001)
    found = certificates(model, t, [4, 9], fixed)

    def count(purpose: str, index: int, n: int) -> np.ndarray:
        rows = Rows.of_votes([Vote(purpose, index, i) for i in range(n)], [0] * n, CPU)
        with torch.inference_mode():
            classes = t.logits(model, t.image(index), rows).argmax(1)
        return np.bincount(classes.numpy(), minlength=3)

    for index, c in found.items():
        top = int(count("select", index, 33).argmax())
        counts = count("estimate", index, 210)
        p = bounds.lower_bound(int(counts[top]), 210, 0.001)
        others = np.delete(counts, top)
        assert (c.n0, c.n, c.votes, c.label) == (33, 210, 243, index % 3)
        # A vote whose two best logits tie to the last bits may differ in a block of another shape.
        assert abs(c.top_count - int(counts[top])) <= 1
        assert abs(c.runner_up_count - int(others.max())) <= 1
        if c.top_count == counts[top]:
            assert (c.p_lower, c.radius) == (p, bounds.radius(p, 0.5))
        assert c.predicted == (top if p > 0.5 else None)


def test_every_block_has_one_shape_and_memory_does_not_grow_with_n() -> None:
    shapes = set()

    def model(x: Tensor, draw: Draw) -> Tensor:
        shapes.add(tuple(x.shape))
        return torch.zeros(len(x), 3)

    certificates(model, task(64), list(range(30)), Fixed(10, 1000, 0.001))
    assert shapes == {(64, *SHAPE)}


def test_blocks_are_filled_with_several_images() -> None:
    rows = 0

    def model(x: Tensor, draw: Draw) -> Tensor:
        nonlocal rows
        rows += len(x)
        return torch.zeros(len(x), 3)

    certificates(model, task(128), list(range(30)), Fixed(16, 80, 0.001))
    votes = 30 * 96
    assert votes <= rows < votes + 2 * 128


@pytest.mark.parametrize("block", [16, 32, 256])
def test_the_same_noise_whatever_the_block(block: int) -> None:
    """A model insensitive to last bits gives the same counts at any block shape."""

    def model(x: Tensor, draw: Draw) -> Tensor:
        side = (x.double().flatten(1).mean(1) - 0.5).sign()
        return torch.stack([side, -side, side * 0 - 2], 1)

    fixed = Fixed(20, 300, 0.001)
    assert certificates(model, task(block), [1, 2, 3], fixed) == certificates(model, task(64), [3, 2, 1], fixed)


def test_nan_is_a_vote_against() -> None:
    """Three votes in ten are NaN, whichever class they would have gone to."""

    def model(x: Tensor, draw: Draw) -> Tensor:
        logits = torch.tensor([0.0, 1.0, 0.5]).repeat(len(x), 1)
        logits[draw.normal()[:, None].squeeze(1) < -0.5244, 0] = math.nan
        return logits

    c = certificates(model, task(), [0], Fixed(50, 1000, 0.001))[0]
    assert c.predicted == 1
    assert c.runner_up == 3  # the class after the last
    assert c.top_count + c.runner_up_count == 1000
    assert abs(c.runner_up_count - 300) < 5 * math.sqrt(210)


def test_all_nan_abstains_and_certifies_no_class() -> None:
    c = certificates(lambda x, d: torch.full((len(x), 3), math.nan), task(), [0], Fixed(50, 100, 0.001))[0]
    assert (c.predicted, c.radius, c.top_count, c.runner_up) == (None, 0.0, 0, 3)


def test_all_votes_agreeing_gives_the_largest_radius() -> None:
    c = certificates(lambda x, d: torch.eye(3)[[2] * len(x)], task(sigma=0.25), [0], Fixed(10, 1000, 0.001))[0]
    assert (c.predicted, c.radius) == (2, Fixed(10, 1000, 0.001).largest_radius(0.25))
    assert c.radius <= 0.25 * 2.4634


def averaging(x: Tensor, draw: Draw) -> Tensor:
    return (x.flatten(1) - 0.01 * x.flatten(1).mean(0))[:, :3]


def position(x: Tensor, draw: Draw) -> Tensor:
    return x.flatten(1)[:, :3] + torch.arange(len(x))[:, None]


def unseeded(x: Tensor, draw: Draw) -> Tensor:
    return x.flatten(1)[:, :3] + torch.randn(len(x), 1)


@pytest.mark.parametrize(
    ("model", "words"),
    [(averaging, "other rows of its batch"), (position, "place in the batch"), (unseeded, "other logits")],
)
def test_models_with_dependent_rows_are_refused(model: Callable[..., Tensor], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        check_rows(model, task(), 0)


@pytest.mark.parametrize("seed", range(10))
def test_rows_that_depend_on_any_half_of_the_others_are_refused(seed: int) -> None:
    """Random patterns: in each tile the rows of a random set share their mean."""
    shared = torch.from_numpy(np.random.default_rng(seed).random(TILE) < 0.5)

    def model(x: Tensor, draw: Draw) -> Tensor:
        out = x.flatten(1)[:, :3].reshape(-1, TILE, 3).clone()
        out[:, shared] = out[:, shared].mean(1, keepdim=True)
        return out.view(-1, 3)

    with pytest.raises(BenchError, match="other rows of its batch"):
        check_rows(model, task(), 0)


def test_a_single_row_that_depends_on_another_is_mostly_refused() -> None:
    """Row 5 of a block sees row 41: found with a chance of 3/4 by two random halves; 40 times, at 1e-4."""

    def model(x: Tensor, draw: Draw) -> Tensor:
        out = x.flatten(1)[:, :3].clone()
        out[5] += out[41]
        return out

    found = 0
    for _ in range(40):
        try:
            check_rows(model, task(), 0)
        except BenchError:
            found += 1
    assert found >= stats.binom.ppf(1e-4, 40, 0.75)


def test_valid_models_pass_the_row_check() -> None:
    def randomised(x: Tensor, draw: Draw) -> Tensor:
        return x.flatten(1)[:, :3] + draw.normal(3)

    with torch.inference_mode():
        for model in (network(), randomised):
            assert check_rows(model, task(), 0) > 0


@given(side=st.integers(1, 300), channels=st.integers(1, 4))
def test_blocks_are_whole_tiles(side: int, channels: int) -> None:
    rows = block_rows((channels, side, side), CPU)
    assert rows % TILE == 0
    assert TILE <= rows <= 256


def test_rows_of_a_block_on_a_gpu_and_on_a_cpu() -> None:
    """256 rows of 224 x 224 keep a GPU's multiprocessors busy; a CPU's blocks are as they were."""
    gpu = torch.device("cuda")
    shapes = [(1, 8, 8), (3, 32, 32), (3, 64, 64), (3, 224, 224), (3, 384, 384), (3, 1024, 1024)]
    assert [block_rows(shape, gpu) for shape in shapes] == [1024, 1024, 1024, 256, 128, 16]
    assert [block_rows(shape, CPU) for shape in shapes] == [256, 64, 16, 16, 16, 16]


ANYTIME = Anytime(20, 3000, 0.01, (0.25, 0.5))


@given(order=st.lists(st.integers(0, 29), min_size=1, max_size=12, unique=True), block=st.sampled_from([16, 64, 256]))
@settings(max_examples=25, deadline=None)
def test_speculative_votes_change_no_certificate(order: list[int], block: int) -> None:
    """With a model insensitive to last bits, packing and speculative votes change no image's certificate."""

    def model(x: Tensor, draw: Draw) -> Tensor:
        side = x.double().flatten(1).mean(1) - 0.55
        return torch.stack([side, -side, side * 0 - 2], 1)

    def found(order: list[int], block: int) -> dict[int, Certificate]:
        t = task(block)
        certified = certify([Device(t, [model])], lambda label: ANYTIME.certify(t.sigma, label), order)
        return {c.index: replace(c, seconds=0.0) for c in certified}

    together = found(order, block)
    assert together == found(order[::-1], 64)
    assert found(order[:1], block)[order[0]] == together[order[0]]


@pytest.mark.parametrize("images", [1, 3])
def test_stragglers_do_not_leave_blocks_empty(images: int) -> None:
    """Images that need most of 3,000 votes, in blocks of 256 though each look asks for 32 to 64 more."""
    rows = 0

    def model(x: Tensor, draw: Draw) -> Tensor:
        nonlocal rows
        rows += len(x)
        # p is so close to the threshold of a radius that neither certificate nor give-up comes early.
        return torch.stack([draw.normal() + 0.55, torch.zeros(len(x)), torch.full((len(x),), -9.0)], 1)

    t = task(256)
    certified = list(certify([Device(t, [model])], lambda label: ANYTIME.certify(t.sigma, label), range(images)))
    votes = sum(c.votes for c in certified)
    assert votes > 1000 * images
    assert rows < votes + 4 * 256
