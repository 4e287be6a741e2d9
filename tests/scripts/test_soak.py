"""The soak test tells a leak from noise and from warming up."""

from __future__ import annotations

from soak import SLACK, grown


def test_a_leak_is_growth_and_noise_is_not() -> None:
    flat = [900.0 + (i * 7 % 5) for i in range(400)]
    leak = [900.0 + 0.1 * i + (i * 7 % 5) for i in range(400)]  # 40 MiB in all
    late = [900.0] * 390 + [900.0 + 2 * SLACK] * 10
    assert max(grown(flat)) < SLACK
    assert min(grown(leak)) > SLACK
    assert grown(late)[0] > SLACK
