"""Grid noise: exactly the rounded Gaussian, and F sees only the integer sum."""

from __future__ import annotations

import pickle
import sys
from fractions import Fraction
from functools import cache
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from bench.smoothing import chacha, gridnoise
from bench.smoothing.gridnoise import KINDS, VERSION, AesGridNoise, GridNoise
from bench.smoothing.gridnoise_torch import TorchNoise
from bench.smoothing.noise import Noise, Vote, Votes
from bench.smoothing.rows import Rows
from bench.smoothing.thresholds import AMBIGUOUS, Thresholds, tau, thresholds
from tests.helpers import chacha as definition

CASES = [(0.25, 17, 64), (0.25, 256, 3072), (1.0, 256, 3072)]  # sigma, levels, pixels: digits, CIFAR-10
cases = pytest.mark.parametrize(("sigma", "levels", "size"), CASES)
CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
keys = st.tuples(st.sampled_from(["select", "estimate"]), st.integers(0, 2**32 - 1), st.integers(0, 2**40 - 1)).map(
    lambda t: Vote(*t)
)


@cache
def exact_cdf(sigma: float, levels: int) -> list[mpmath.mpf]:
    """mpmath's Phi((k + 1/2)/s) for k = -reach-1 .. reach, to 40 digits."""
    reach = thresholds(sigma, levels).reach
    with mpmath.workdps(40):
        s = mpmath.mpf(sigma) * (levels - 1)
        lower = [mpmath.ncdf(-(k + mpmath.mpf("0.5")) / s) for k in range(reach + 1)]
        return lower[::-1] + [1 - p for p in lower]


def all_words(table: Thresholds) -> NDArray[np.uint64]:
    """Return critical words (the ends of every cell, each threshold and its neighbours) and random ones."""
    cells = np.arange(2**16, dtype=np.uint64) << np.uint64(48)
    one, last = np.uint64(1), np.uint64(2**48 - 1)
    random = np.random.default_rng(0).integers(0, 2**64, 2**20, np.uint64)
    near = [table.edges, table.edges - one, table.edges + one]  # at the ends of the range these wrap around: harmless
    return np.concatenate([cells, cells | last, *near, random])


@cases
def test_thresholds_against_mpmath(sigma: float, levels: int, size: int) -> None:
    """Every threshold is the correctly rounded 2^64 Phi((k + 1/2)/s)."""
    table, exact = thresholds(sigma, levels), exact_cdf(sigma, levels)
    with mpmath.workdps(40):
        worst = max(abs(int(e) - p * 2**64) for e, p in zip(table.edges, exact[1:-1], strict=True))
        assert worst <= 0.5 + 1e-15
        assert exact[0] < mpmath.mpf(2) ** -65  # the mass beyond the reach


@cases
def test_tau_bounds_the_total_variation(sigma: float, levels: int, size: int) -> None:
    """The true total variation, tail included, by mpmath; the bound is at most four times too large."""
    edges, exact = [0, *map(int, thresholds(sigma, levels).edges), 2**64], exact_cdf(sigma, levels)
    with mpmath.workdps(40):
        outside = exact[0] + (1 - exact[-1])
        drawn = [mpmath.mpf(b - a) / 2**64 for a, b in pairwise(edges)]
        mass = [b - a for a, b in pairwise(exact)]
        true = size * (outside + sum(abs(a - b) for a, b in zip(drawn, mass, strict=True))) / 2
        bound = tau(sigma, levels, size)
        assert true <= bound <= 4 * true
    assert bound < 1e-12


@cases
def test_tau_covers_the_worst_rounding(sigma: float, levels: int, size: int) -> None:
    """The bound covers any rounding: each threshold and tail may be off by half of 2^-64."""
    worst = size * (len(thresholds(sigma, levels).edges) + 2) * (2.0**-65 + 1e-39)
    assert worst <= tau(sigma, levels, size) <= 1.1 * worst


@cases
def test_distribution_is_the_rounded_gaussian(sigma: float, levels: int, size: int) -> None:
    """Chi-square of 4 million draws; fixed seed, false-alarm rate 1e-6 a case for a random seed."""
    noise = GridNoise(Noise(0, "test"), sigma, levels)
    votes = [Vote("estimate", i, i) for i in range(4_000_000 // size)]
    drawn = noise.draw(votes, size).numpy()
    reach = thresholds(sigma, levels).reach
    counts = np.bincount(drawn.ravel().astype(np.int64) + reach, minlength=2 * reach + 1)

    def p_value(cdf: NDArray[np.float64]) -> float:
        expected = np.diff(cdf) * drawn.size
        kept = np.flatnonzero(expected >= 20)  # an interval; what lies outside joins its ends
        cuts = np.r_[0, kept[1:]]
        found, wanted = np.add.reduceat(counts, cuts), np.add.reduceat(expected, cuts)
        return float(stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue)

    edges = (np.arange(-reach - 1, reach + 1) + 0.5) / (sigma * (levels - 1))
    exact = np.array([float(p) for p in exact_cdf(sigma, levels)])
    assert p_value(exact) > 1e-6
    assert p_value(stats.norm.cdf(edges / 1.01)) < 1e-6  # a sigma wrong by 1% is seen
    assert p_value(stats.norm.cdf(edges + 0.01)) < 1e-6  # and a mean wrong by sigma/100
    for a, b in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):  # neighbours and rows are uncorrelated
        product = a.astype(np.float64) * b
        assert abs(product.mean()) < 4.9 * (sigma * (levels - 1)) ** 2 * 1.02 / np.sqrt(product.size)


@cases
def test_look_up_equals_the_search(sigma: float, levels: int, size: int) -> None:
    table = thresholds(sigma, levels)
    words = all_words(table)
    leads, asked = (words >> np.uint64(32)).astype(np.uint32), []

    def lower(indices: NDArray[np.int64]) -> NDArray[np.uint32]:
        asked.append(indices)
        return words[indices].astype(np.uint32)

    assert np.array_equal(table.values(leads, lower), table.search(words))
    # The lower bits are asked for only where they can matter.
    assert np.isin(leads[asked[0]], table.edges >> np.uint64(32)).all() and len(asked) == 1
    for near in (table.edges, table.edges - np.uint64(1)):
        below = [int((table.edges <= word).sum()) - table.reach for word in near]
        assert table.search(near).tolist() == below
    assert np.array_equal(np.diff(table.search(np.sort(words))) >= 0, np.ones(len(words) - 1, bool))
    assert (table.guide == AMBIGUOUS).mean() < 0.03


@cases
def test_tail_reaches_beyond_9_sigma(sigma: float, levels: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least and the largest word give more than 9 sigma; 24-bit uniforms stop at 5.77."""
    noise, drawn = GridNoise(Noise(0, "test"), sigma, levels), []
    for word in (0, 2**32 - 1):
        monkeypatch.setattr(chacha.KeyStreams, "fill", lambda self, words, *_, word=word: words.fill(word))
        drawn.append(noise.draw([Vote("estimate", 0, 0)], 3))
    low, high = drawn
    reach = thresholds(sigma, levels).reach
    assert reach > 9 * sigma * (levels - 1)
    assert (low == -reach).all()
    assert (high == reach).all()


@given(votes=st.lists(keys, min_size=1, max_size=20), size=st.integers(1, 70), cut=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_rows_do_not_depend_on_the_block(votes: list[Vote], size: int, cut: int) -> None:
    noise = GridNoise(Noise(3, "test"), 0.25, 256)
    whole = noise.draw(votes, size)
    alone = torch.cat([GridNoise(Noise(3, "test"), 0.25, 256).draw([v], size) for v in votes])
    parts = torch.cat([noise.draw(p, size) for p in (votes[cut:], votes[:cut]) if p])
    assert whole.dtype == torch.int16
    assert torch.equal(whole, alone)
    assert torch.equal(whole, parts.roll(len(votes[:cut]), 0))
    assert torch.equal(noise.draw(votes, size + 9)[:, :size], whole)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, votes = GridNoise(Noise(3, "test"), 0.25, 256), [Vote("estimate", 0, i) for i in range(50)]
    whole = noise.draw(votes, 100)
    for chunk in (16, 48, 704, 4992):
        monkeypatch.setattr(gridnoise, "CHUNK", chunk)
        assert torch.equal(noise.draw(votes, 100), whole)


def test_values_never_change() -> None:
    """Changing a stream would silently change every certificate: bump chacha.VERSION with these values."""
    noise, votes = Noise(7, "test"), [Vote("estimate", 5, 11)]
    assert GridNoise(noise, 1.0, 256).draw(votes, 8)[0].tolist() == VALUES
    assert noise.words(votes, 2)[0].tolist() == AES_WORDS
    assert AesGridNoise(noise, 1.0, 256).draw(votes, 8)[0].tolist() == AES_VALUES
    assert noise.words(votes, 2, AesGridNoise.CALL)[0].tolist() != AES_WORDS  # grid noise has bits of its own
    assert list(KINDS) == ["chacha20-grid64-1", "aes128ctr-grid64-1"] and KINDS[VERSION] is GridNoise


VALUES = [-96, -112, 286, -99, -297, -151, -43, 156]
AES_WORDS = [13886032597867830456, 1529727839825043434]
AES_VALUES = [250, -290, -520, -209, -90, 282, -113, 118]


class Given(GridNoise):
    """Grid noise with the values given."""

    values: Tensor

    def draw(self, votes: Votes, size: int) -> Tensor:
        return self.values.reshape(len(votes), size)


def shown(votes: list[Vote], device: str | torch.device = "cpu") -> Rows:
    """Rows that show one image each, in order."""
    return Rows.of_votes(votes, range(len(votes)), torch.device(device))


@pytest.mark.parametrize("levels", [17, 256])
def test_f_sees_nothing_but_the_sum(levels: int) -> None:
    """For every pixel and every sum, the bits depend on the sum alone and are correctly rounded."""
    noise = Given(Noise(0, "test"), 1.0, levels)
    reach = thresholds(1.0, levels).reach
    pixels, sums = torch.arange(levels), torch.arange(-reach, levels + reach)
    noise.values = (sums - pixels[:, None]).to(torch.int16)
    images = pixels.to(torch.uint8)[:, None].expand(levels, len(sums)).contiguous()
    found = noise.inputs(images.view(levels, 1, 1, -1), shown([Vote("estimate", 0, 0)] * levels)).cpu()
    bits = found.view(levels, -1).view(torch.int32)
    assert found.dtype == torch.float32
    assert torch.equal(bits, bits[:1].expand_as(bits))
    for total, value in zip(sums.tolist(), found.view(levels, -1)[0].numpy(), strict=True):
        error = abs(Fraction(float(value)) - Fraction(total, levels - 1))
        assert all(
            error <= abs(Fraction(float(np.nextafter(value, side))) - Fraction(total, levels - 1))
            for side in (np.float32(-np.inf), np.float32(np.inf))
        )


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data(), levels=st.sampled_from([2, 17, 256]), sigma=st.sampled_from([0.12, 0.25, 1.0]))
@settings(max_examples=60, deadline=None)
def test_equal_sums_give_equal_bits(device: str, data: st.DataObject, levels: int, sigma: float) -> None:
    """x + k = x' + k' with real noise k: the tensors that reach F are bit-identical."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng, votes = np.random.default_rng(seed), [Vote("estimate", seed, i) for i in range(3)]
    x, other = (torch.from_numpy(rng.integers(0, levels, (3, 3, 4, 5), np.uint8)).to(device) for _ in range(2))
    noise, moved = GridNoise(Noise(0, "test"), sigma, levels), Given(Noise(0, "test"), sigma, levels)
    k = noise.draw(votes, 60).view(3, 3, 4, 5)
    moved.values = k + x.cpu() - other.cpu().to(torch.int16)
    one, two = noise.inputs(x, shown(votes, device)).cpu(), moved.inputs(other.cpu(), shown(votes))
    assert torch.equal(one.view(torch.int32), two.view(torch.int32))
    assert torch.equal((one.double() * (levels - 1)).round().long().cpu(), x.cpu().long() + k)  # unclipped


def test_adding_floats_would_leak_the_image() -> None:
    """The reason for summing integers: in float32 k/255 + x/255 differs from (k+x)/255 in a third of the pairs."""
    x = np.arange(256)[:, None]
    k = np.arange(-255, 256)
    pixel, noise, total = (v.astype(np.float32) / np.float32(255) for v in (x, k, x + k))
    share = float((pixel + noise != total).mean())
    assert 0.25 < share < 0.4
    assert not (np.arange(17, dtype=np.float32)[:, None] / 16 + k.astype(np.float32) / 16 != (x[:17] + k) / 16).any()


def test_invalid_arguments_raise() -> None:
    noise = GridNoise(Noise(0, "test"), 0.25, 17)
    with pytest.raises(TypeError, match="integer pixels"):
        noise.inputs(torch.zeros(1, 1, 8, 8), shown([Vote("estimate", 0, 0)]))
    for sigma, levels in ((0.0, 17), (float("nan"), 17), (0.25, 1)):
        with pytest.raises(ValueError, match="sigma > 0"):
            thresholds(sigma, levels)
    with pytest.raises(ValueError, match="16-bit"):
        thresholds(1.0, 2**14)
    assert thresholds(0.001, 2).reach == 0  # noise that never leaves its cell


# The same bits on every device --------------------------------------------------------------------------------------

MIXED = [Vote("estimate", 0, 0), Vote("select", 2**32 - 1, 2**40 - 1), Vote("check", 7, 2**32), Vote("estimate", 1, 5)]
GRIDS = [(0.25, 17, 64), (0.12, 256, 105), (0.5, 256, 784), (1.0, 256, 3072), (0.001, 2, 3), (0.25, 17, 1)]
grids = pytest.mark.parametrize(("sigma", "levels", "size"), [*GRIDS, (0.25, 256, 150_528)])


@grids
def test_values_are_those_of_the_definition(sigma: float, levels: int, size: int) -> None:
    """On the CPU and in plain torch; 105 and 3 pixels end within a block."""
    wanted = torch.from_numpy(definition.draw((3, "test"), MIXED, size, thresholds(sigma, levels)))
    noise = GridNoise(Noise(3, "test"), sigma, levels)
    assert torch.equal(noise.draw(MIXED, size), wanted)
    streams, table = chacha.KeyStreams(3, "test"), thresholds(sigma, levels)
    for device in DEVICES:
        place = torch.device(device)
        assert torch.equal(TorchNoise(streams, table, place).draw(shown(MIXED, device), size).cpu(), wanted)


def test_lower_bits_decide_where_leading_ones_are_a_thresholds() -> None:
    """A table in which that is so for half of the pixels, below, at and above one threshold or several."""
    vote, size = Vote("estimate", 3, 2**33), 4000
    table = definition.tied_table((3, "test"), vote, size)
    votes = [Vote("estimate", 0, 0), vote, vote]
    wanted = definition.draw((3, "test"), votes, size, table)
    leads = definition.words((3, "test"), vote, 0, size)
    assert np.isin(leads, table.upper).mean() >= 0.5
    halves = [np.searchsorted(table.upper, leads, side=side) - table.reach for side in ("left", "right")]
    assert all((half != wanted[1]).mean() > 0.1 for half in halves)  # the leading bits alone give other values
    noise = GridNoise(Noise(3, "test"), 0.25, 256)
    noise._table = table
    assert np.array_equal(noise.draw(votes, size).numpy(), wanted)
    assert np.array_equal(TorchNoise(noise._streams, table, CPU).draw(shown(votes), size).numpy(), wanted)


def test_lower_bits_of_a_run_are_those_of_the_definition() -> None:
    """The first votes of a run in which a lead is a threshold's: 1 pixel in 3.7 million at sigma .25."""
    table, size, streams = thresholds(0.25, 256), 150_528, chacha.KeyStreams(0, "test")
    votes = definition.tied_votes(streams, table, size, 3)
    wanted = definition.draw((0, "test"), votes, size, table)
    assert np.array_equal(GridNoise(Noise(0, "test"), 0.25, 256).draw(votes, size).numpy(), wanted)
    assert np.array_equal(TorchNoise(streams, table, CPU).draw(shown(votes), size).numpy(), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_rows_show_the_image_at_their_place(dtype: torch.dtype) -> None:
    images = torch.arange(3 * 60).reshape(3, 3, 4, 5).to(dtype)
    rows = Rows.of_votes(MIXED, [2, 0, 0, 1], CPU)
    noise = GridNoise(Noise(3, "test"), 0.25, 256)
    total = images[[2, 0, 0, 1]].to(torch.int32) + noise.draw(MIXED, 60).view(4, 3, 4, 5)
    wanted = total.to(torch.float32) / torch.tensor(255.0)
    assert torch.equal(noise.inputs(images, rows).view(torch.int32), wanted.view(torch.int32))
    assert torch.equal(noise.inputs(images, rows[1:3]), wanted[1:3])
    assert torch.equal(noise.inputs(images, rows.filled(6)), wanted[[0, 1, 2, 3, 0, 0]])


def test_noise_of_the_aes_version_is_added_alike() -> None:
    images, noise = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), AesGridNoise(Noise(3, "test"), 0.25, 17)
    assert torch.equal(noise.inputs(images, shown(MIXED)).view(4, 64) * 16, noise.draw(MIXED, 64).float())


def test_a_copy_draws_the_same() -> None:
    for kind in KINDS.values():
        noise = kind(Noise(3, "test"), 0.25, 17)
        again = pickle.loads(pickle.dumps(noise))
        assert type(again) is kind and torch.equal(again.draw(MIXED, 70), noise.draw(MIXED, 70))


@pytest.mark.parametrize("installed", [True, False])
def test_plain_torch_draws_where_triton_does_not_work(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel cannot be launched on a CPU, as it cannot without a C compiler; a note says so, once a device."""
    if not installed:
        monkeypatch.setitem(sys.modules, "bench.smoothing.gridnoise_triton", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gridnoise._kernel.cache_clear()
    assert gridnoise._kernel(CPU) is None and gridnoise._kernel(CPU) is None
    err = capsys.readouterr().err
    gridnoise._kernel.cache_clear()
    assert err.startswith("bench: grid noise on cpu is drawn in plain torch, which is slower: ")
    assert err.count("\n") == 1
    assert installed or "ModuleNotFoundError" in err
