"""A method looks the same in every figure, by its name; a panel has at most eight curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

from bench.plugins import names
from bench.report import figures, looks, tables
from bench.report.plots import SYMBOLS
from tests.helpers.records import made_up


def test_every_defense_has_a_colour_of_its_own_for_ever() -> None:
    assert set(names()) <= set(looks.KNOWN)
    assert len({looks.colour(looks.number(name)) for name in looks.KNOWN}) == len(looks.KNOWN) == len(looks.COLOURS)
    # These may never change, and nothing may be inserted before them.
    assert [looks.number(name) for name in ("none", "lora", "finetuned-diffusion")] == [0, 3, 13]
    assert [looks.colour(looks.number(name)) for name in ("none", "lora")] == ["#0072B2", "#CC79A7"]
    assert looks.number("lora rank=16") == 297


@given(strategies.lists(strategies.text(max_size=8), unique=True, max_size=30))
def test_labels_look_different_whatever_their_order_and_share_no_colour_before_all_are_used(labels: list[str]) -> None:
    found = looks.numbers({label: label for label in labels})
    assert len(set(found.values())) == len(labels)
    assert looks.numbers({label: label for label in reversed(labels)}) == found
    assert len({looks.colour(n) for n in found.values()}) == min(len(labels), len(looks.COLOURS))


@given(strategies.lists(strategies.sampled_from([*looks.KNOWN, *map(str, range(50))]), unique=True, max_size=8))
def test_eight_labels_differ_without_colour_and_known_names_keep_all_of_their_look(labels: list[str]) -> None:
    found = looks.numbers({label: label for label in labels})
    assert len({(n % len(looks.MARKERS), n % len(looks.STYLES)) for n in found.values()}) == len(labels)
    assert len({n % len(SYMBOLS) for n in found.values()}) == len(labels)
    assert all(found[label] == looks.number(label) for label in labels if label in looks.KNOWN)


def test_a_label_has_the_look_of_its_methods_name_unless_others_share_it() -> None:
    alone = looks.numbers({"lora (3 seeds)": "lora", "none": "none"})
    assert alone == {"lora (3 seeds)": looks.KNOWN.index("lora"), "none": 0}
    shared = looks.numbers({"run-1": "lora", "run-2": "lora"})
    assert shared == {"run-1": looks.number("run-1"), "run-2": looks.number("run-2")}


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draw the curves of a table of this many methods; return the figure's axes."""

    def draw(methods: list[str]) -> Any:
        for i, name in enumerate(methods):
            made_up(tmp_path / str(len(methods)), [0.3] * (20 - i) + [None] * i, name=name)
        (table,) = tables.build(tables.load_records(tmp_path / str(len(methods)))[0]).tables
        kept: list[Any] = []
        monkeypatch.setattr(figures, "_save", lambda figure, *_: kept.append(figure))
        figures.curves(table, tmp_path, "x")
        return kept[0].axes

    return draw


def test_a_method_keeps_colour_and_marker_whatever_its_rank(drawn: Any) -> None:
    def look(axes: Any, name: str) -> tuple[str, str, str]:
        (line,) = (line for ax in axes for line in ax.lines if line.get_label() == name)
        return line.get_color(), line.get_marker(), line.get_linestyle()

    few, many = drawn(["lora", "none"]), drawn(["full", "none", "mine", "lora"])
    for name in ("lora", "none"):
        assert look(few, name) == look(many, name)
    assert look(many, "lora") != look(many, "none")
    assert look(many, "mine")[0] == looks.colour(looks.number("mine"))


@pytest.mark.filterwarnings("error")
def test_long_names_do_not_squeeze_the_axes(drawn: Any) -> None:
    names = [f"denoiser objective=clf-{i} access=query schedule=cosine" for i in range(5)]
    (ax,) = drawn(names)
    ax.figure.draw_without_rendering()
    frame, legend = (part.get_window_extent() for part in (ax, ax.get_legend()))
    assert frame.width > 0.7 * ax.figure.bbox.width
    assert ax.figure.bbox.x0 <= legend.x0 and legend.x1 <= ax.figure.bbox.x1


@pytest.mark.parametrize(("rows", "panels"), [(8, [8]), (9, [8, 1]), (17, [8, 8, 1])])
def test_more_than_eight_curves_are_small_multiples(drawn: Any, rows: int, panels: list[int]) -> None:
    axes = drawn([f"method-{i:02}" for i in range(rows)])
    assert [len(ax.lines) for ax in axes] == panels
    assert [len(ax.get_legend().texts) for ax in axes] == panels
    labels = [line.get_label() for ax in axes for line in ax.lines]
    assert labels == [f"method-{i:02}" for i in range(rows)]  # in the table's order, the best first
    assert len({ax.get_xlim() for ax in axes}) == len({ax.get_ylim() for ax in axes}) == 1
    assert {line.get_drawstyle() for ax in axes for line in ax.lines} == {"steps-pre"}
