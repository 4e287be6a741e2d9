"""Pairs of runs: every number follows from the images of the two records."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.compare.pairs import compare
from bench.records.record import read_run
from tests.helpers.records import made_up


@given(counts=st.lists(st.tuples(st.floats(0, 0.6), st.floats(0, 0.6), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=15, deadline=None)
def test_every_count_is_what_a_loop_over_the_images_finds(counts: list[tuple[float, float, bool]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        wrong = [i for i, c in enumerate(counts) if c[2]]
        a = made_up(Path(folder), [c[0] for c in counts], wrong=wrong, name="none")
        b = made_up(Path(folder), [c[1] for c in counts])
        (pair,) = compare([a, b]).as_json()["pairs"]
        lines = [[(c.radius, c.predicted == c.label) for c in read_run(run).counted] for run in (a, b)]
    for row in pair["radii"]:
        only_a = only_b = 0
        for (first, right), (second, _) in zip(*lines, strict=True):
            held_a, held_b = first >= row["radius"] and right, second >= row["radius"]
            only_a += held_a and not held_b
            only_b += held_b and not held_a
        assert (row["only_first"], row["only_second"]) == (only_a, only_b)
        assert row["low"] - 1e-9 <= row["difference"] <= row["high"] + 1e-9
