"""The comparison of hot paths: slower means by a test and by a factor; new paths; the right code is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ratio


def rounds(seed: int, factor: float = 1.0, noise: float = 0.02, name: str = "path") -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    return [{name: 0.01 * factor * float(rng.lognormal(0, noise))} for _ in range(ratio.ROUNDS)]


@pytest.mark.parametrize(
    ("factor", "noise", "slower"),
    [
        (1.0, 0.02, False),
        (1.3, 0.02, True),
        (1.05, 0.001, False),  # significant, but below the factor
        (1.3, 1.0, False),  # above the factor, but not significant
        (0.5, 0.02, False),
    ],
)
def test_slower_needs_a_test_and_a_factor(factor: float, noise: float, slower: bool) -> None:
    (found,) = ratio.compare(rounds(0, noise=noise), rounds(1, factor, noise))
    assert found.slower == slower
    assert ("SLOWER" in str(found)) == slower
    if noise < 0.1:
        assert np.median(found.ratios) == pytest.approx(factor, rel=0.05)


def test_several_paths_are_corrected_for() -> None:
    """One of six paths is slower in every round: found, since 6/3432 is below the level."""
    base: list[dict[str, float]] = [{} for _ in range(ratio.ROUNDS)]
    head: list[dict[str, float]] = [{} for _ in range(ratio.ROUNDS)]
    for i in range(6):
        for side, seed, factor in ((base, 2 * i, 1.0), (head, 2 * i + 1, 1.2 if i == 3 else 1.0)):
            for one, more in zip(side, rounds(seed, factor, name=f"path{i}"), strict=True):
                one |= more
    found = ratio.compare(base, head)
    assert [p.name for p in found if p.slower] == ["path3"]
    assert found[3].p == pytest.approx(6 / 3432)


def test_equal_code_is_rarely_called_slower() -> None:
    """With noise of 20% per round, where the factor alone would often alarm, at most one gate in a hundred does."""
    alarms = sum(ratio.compare(rounds(2 * i, noise=0.2), rounds(2 * i + 1, noise=0.2))[0].slower for i in range(300))
    assert alarms <= 10  # Binomial(300, .01) exceeds it with probability below .001


def test_a_path_that_base_lacks_is_new_and_one_that_sometimes_fails_is_an_error() -> None:
    nothing: list[dict[str, float]] = [{} for _ in range(ratio.ROUNDS)]
    (found,) = ratio.compare(nothing, rounds(0))
    assert not found.slower and str(found).startswith("path: new, ")
    with pytest.raises(ValueError, match="path failed in some rounds"):
        ratio.compare([*rounds(1)[1:], {}], rounds(0))


def test_the_code_that_was_timed_is_the_one_asked_for(tmp_path: Path) -> None:
    def report(file: Path) -> dict[str, Any]:
        return {"benchmarks": [{"name": "path", "stats": {"median": 0.5}, "extra_info": {"bench": str(file)}}]}

    assert ratio.medians(report(tmp_path / "bench" / "__init__.py"), tmp_path) == {"path": 0.5}
    with pytest.raises(ValueError, match="not the code in"):
        ratio.medians(report(tmp_path.parent / "bench" / "__init__.py"), tmp_path)
