"""SPSA: the estimate has the mean and spread of theory, the steps their formulas; it resumes, and says it diverged.

Seeds are fixed, so these tests give one answer for ever; that a correct program would have failed them
when the seeds were chosen has the stated probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.smoothing.noise import Noise
from bench.training.loop import TrainingDraw
from bench.training.spsa import SPSA, Diverged, Gains, Replay, directions

FLAT = Gains(a=0.1, c=0.1, o=0, alpha=0, gamma=0)
EVEN = 7 / 12  # E[d^2] of d uniform on +-[.5, 1]; E[1 / d^2] is 2


def weights(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def linear(w: nn.Parameter, slope: float = 2.0) -> Callable[[], Tensor]:
    return lambda: slope * w.sum()


def test_gains_are_the_published_formulas() -> None:
    gains = Gains(a=0.01, c=0.02, o=1, alpha=0.4, gamma=0.1, b=0.9)
    assert gains.step(1) == pytest.approx(0.01 / 2**0.4)
    assert gains.step(999) == pytest.approx(0.01 / 1000**0.4)
    assert gains.probe(1) == 0.02
    assert gains.probe(1000) == pytest.approx(0.02 / 1000**0.1)


def test_directions_keep_away_from_zero_and_have_no_preference() -> None:
    torch.manual_seed(0)
    d = directions(100_000)
    assert d.abs().min() >= 0.5
    assert d.abs().max() <= 1
    # Five standard errors: false alarm 6e-7. The variance of |d|^2 is 31/80 - (7/12)^2.
    assert abs(float(d.mean())) < 5 * math.sqrt(EVEN / 1e5)
    assert abs(float(d.square().mean()) - EVEN) < 5 * math.sqrt((31 / 80 - EVEN**2) / 1e5)


def test_the_two_sided_estimate_of_a_quadratic_is_unbiased() -> None:
    torch.manual_seed(1)
    n, w = 2000, weights(1.0, -2.0, 3.0, 0.5)
    h = torch.tensor([[3, 1, 0, 0], [1, 2, 0, 1], [0, 0, 1, 0], [0, 1, 0, 4]], dtype=torch.float64)
    true = (h @ w).detach()
    found, _ = SPSA([w], FLAT, probes=n).estimate(lambda: w @ h @ w / 2, c=0.3)
    # The quadratic's even part cancels: g_i is sum_j d_j true_j / d_i,
    # of variance E[d^2] E[1/d^2] sum_(j != i) true_j^2.
    deviation = ((2 * EVEN * (true.square().sum() - true.square())) / n).sqrt()
    assert ((found - true).abs() / deviation).max() < 5  # false alarm 4 * 6e-7
    # It could fail: without the division by d the mean would be 7/12 of the gradient.
    assert ((1 - EVEN) * true.abs() / deviation).max() > 10


def test_a_cubic_biases_both_estimates_equally_and_one_side_adds_variance() -> None:
    torch.manual_seed(2)
    n, c, w = 4000, 0.5, weights(1.0)
    kinds = {one_sided: SPSA([w], FLAT, one_sided=one_sided) for one_sided in (False, True)}
    drawn = {k: torch.stack([spsa.estimate(lambda: w**3, c)[0] for _ in range(n)]) for k, spsa in kinds.items()}
    # Two sides give 3 + c^2 d^2, one side 3 + 3 c d + c^2 d^2; d's odd moments are 0.
    bias, fourth = c**2 * EVEN, 31 / 80
    variance = {False: c**4 * (fourth - EVEN**2), True: c**4 * (fourth - EVEN**2) + 9 * c**2 * EVEN}
    for kind, values in drawn.items():
        error = math.sqrt(variance[kind] / n)
        assert bias > 7 * error  # a program without the bias would be told from theory
        assert abs(float(values.mean()) - 3 - bias) < 5 * error
        # Of bounded values a sample variance lies within a tenth at this n.
        assert float(values.var()) == pytest.approx(variance[kind], rel=0.1)


def test_at_a_minimum_two_sides_estimate_zero_and_one_side_does_not() -> None:
    torch.manual_seed(3)
    w = weights(0.0, 0.0)
    assert SPSA([w], FLAT).estimate(lambda: w.square().sum(), 0.1)[0].abs().max() == 0
    assert SPSA([w], FLAT, one_sided=True).estimate(lambda: w.square().sum(), 0.1)[0].abs().min() > 0.01


@pytest.mark.parametrize(("one_sided", "probes", "evaluations"), [(False, 3, 6), (True, 3, 4)])
def test_an_estimate_leaves_the_parameters_and_counts_its_losses(
    one_sided: bool, probes: int, evaluations: int
) -> None:
    w, calls = weights(1.0, 2.0), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return w.square().sum()

    SPSA([w], FLAT, probes, one_sided).estimate(loss, 0.1)
    assert calls == evaluations
    assert w.tolist() == [1.0, 2.0]
    assert w.requires_grad


def test_gradient_correction_looks_ahead_along_the_momentum() -> None:
    w, gains = weights(5.0), Gains(a=0.1, c=0.1, o=1, alpha=0.5, gamma=0.1, b=0.9)
    spsa, g = SPSA([w], gains), 2.0  # a linear loss: every estimate in one dimension is exact
    first = 5 - 0.1 / math.sqrt(2) * (g + 0.9 * g)
    second = first - 0.1 / math.sqrt(3) * (g + 0.9 * (0.9 * g + g))
    for expected in (first, second):
        spsa.step(linear(w))
        assert w.item() == pytest.approx(expected, rel=1e-9)


def test_without_momentum_it_is_plain_spsa() -> None:
    w = weights(5.0)
    SPSA([w], FLAT).step(linear(w))
    assert w.item() == pytest.approx(5 - 0.1 * 2, rel=1e-9)


@pytest.mark.parametrize(("b", "one_sided"), [(0.9, False), (0.0, False), (0.0, True)])
def test_it_descends_a_noisy_quadratic(b: float, one_sided: bool) -> None:
    torch.manual_seed(4)
    w = weights(3.0, -2.0, 1.0, 2.0, -3.0)
    curvature = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    spsa = SPSA([w], Gains(a=0.1, c=0.2, o=20, alpha=0.4, gamma=0.1, b=b), probes=2, one_sided=one_sided)
    for _ in range(600):
        spsa.step(lambda: (curvature * w.square()).sum() / 2 + 0.01 * torch.randn(()))
    assert float(w.detach().norm()) < 0.1 * math.sqrt(27)


def test_a_restored_optimiser_continues_to_the_last_bit() -> None:
    def run(w: nn.Parameter, spsa: SPSA, begin: int, end: int) -> None:
        for k in range(begin, end):
            torch.manual_seed(k)
            spsa.step(lambda: w.square().sum())

    gains = Gains(a=0.05, c=0.1, o=1, alpha=0.4, gamma=0.1, b=0.9)
    w, v = weights(1.0, 2.0), weights(0.0, 0.0)
    run(w, whole := SPSA([w], gains), 0, 20)
    half = weights(1.0, 2.0)
    run(half, spsa := SPSA([half], gains), 0, 13)
    v.data.copy_(half)
    restored = SPSA([v], gains)
    restored.load_state_dict(spsa.state_dict())
    run(v, restored, 13, 20)
    assert torch.equal(v, w)
    assert restored.state_dict()["recent"] == whole.state_dict()["recent"]


def test_a_rising_loss_is_divergence_and_a_noisy_one_is_not() -> None:
    torch.manual_seed(5)
    w = weights(1.0, 1.0)
    spsa = SPSA([w], Gains(a=0.5, c=0.1, o=0, alpha=0, gamma=0))  # steps uphill too large for the curvature of 8

    def descend(optimizer: SPSA, loss: Callable[[], Tensor]) -> None:
        for _ in range(1000):
            optimizer.step(loss)

    with pytest.raises(Diverged, match=r"its loss rose from .* to "):
        descend(spsa, lambda: 4 * w.square().sum())
    descend(SPSA([weights(0.0)], FLAT), lambda: 1 + torch.randn(()).square() / 2)


@pytest.mark.parametrize(("late", "diverged"), [(1.0, False), (1.4, False), (1.8, True)])
def test_a_bounded_loss_that_ends_above_its_start_is_divergence(late: float, diverged: bool) -> None:
    spsa = SPSA([weights(0.0)], FLAT)
    for k in range(300):
        spsa.step(lambda k=k: torch.tensor(1.0 if k == 0 else late))  # type: ignore[misc]
    if diverged:
        with pytest.raises(Diverged, match="its loss rose from 1"):
            spsa.check_end()
    else:
        spsa.check_end()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_it_before_the_parameters_move(value: float) -> None:
    w = weights(1.0)
    with pytest.raises(Diverged, match=f"loss {value} at step 1"):
        SPSA([w], FLAT).step(lambda: w.sum() * value)
    assert w.tolist() == [1.0]


def test_a_replayed_draw_gives_the_same_noise_to_every_probe() -> None:
    net = nn.Dropout()
    replay = Replay(TrainingDraw(Noise(0, "train"), 1, 4, torch.arange(3), 0.25, torch.device("cpu"), [net]))
    first = [replay.normal(2), replay.normal(1, 4)]
    assert (replay.sigma, replay.done, replay.rows.tolist()) == (0.25, 0.25, [0, 1, 2])
    with replay.evaluating():
        assert not net.training
    assert net.training
    assert first[0].shape == (3, 2)
    replay.rewind()
    assert torch.equal(replay.normal(2), first[0])
    with pytest.raises(ValueError, match="an earlier one"):
        replay.normal(2)
