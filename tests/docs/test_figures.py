"""The figures of docs/certificates.md are what their formulas give, and can be read on light and on dark pages."""

from __future__ import annotations

import math
import re

import docs_figures
import numpy as np
import pytest
from docs_figures import EDGE, RECTANGLE, SIGMA, SPIKE, WALL, share_1d, share_2d
from scipy.integrate import quad
from scipy.special import ndtri

NUMBER = re.compile(r"-?\d+\.?\d*")
PAPERS = ("#ffffff", "#131416", "#0d1117")  # the page of the site, light and dark, and GitHub's dark one


def test_there_is_a_file_for_each_figure() -> None:
    assert {f.name for f in docs_figures.FOLDER.iterdir()} == set(docs_figures.FIGURES)
    page = (docs_figures.FOLDER.parent / "certificates.md").read_text()
    assert sorted(re.findall(r"\(figures/(.*?)\)", page)) == sorted(docs_figures.FIGURES)


@pytest.mark.parametrize("name", docs_figures.FIGURES)
def test_the_figure_is_up_to_date(name: str) -> None:
    """Pixels may differ in the last digit, where the platform's functions round differently."""
    kept, drawn = (docs_figures.FOLDER / name).read_text(), docs_figures.FIGURES[name]()
    assert NUMBER.sub("0", kept) == NUMBER.sub("0", drawn), "run make reference"
    before, now = (np.array([float(v) for v in NUMBER.findall(text)]) for text in (kept, drawn))
    np.testing.assert_allclose(before, now, atol=0.11, err_msg="run make reference")


def density(z: float) -> float:
    return math.exp(-0.5 * (z / SIGMA) ** 2) / (SIGMA * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("x", [-0.5, 0.0, 0.3, 0.7])
def test_the_share_on_the_line_is_the_integral_of_class_a(x: float) -> None:
    ends = [-3.0, SPIKE[0], SPIKE[1], EDGE]
    parts = [quad(lambda t: density(t - x), ends[i], ends[i + 1])[0] for i in (0, 2)]
    assert share_1d(x) == pytest.approx(sum(parts), abs=1e-9)


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (0.3, 0.2), (-0.4, -0.3)])
def test_the_share_on_the_plane_is_the_integral_of_class_a(x: float, y: float) -> None:
    (left, bottom), (right, top) = RECTANGLE
    inside = quad(lambda t: density(t - x), left, right)[0] * quad(lambda t: density(t - y), bottom, top)[0]
    beyond = quad(lambda t: density(t - x), WALL, 4)[0]
    assert share_2d(x, y) == pytest.approx(1 - inside - beyond, abs=1e-9)


def test_the_smoothed_classifier_keeps_its_class_within_the_radius() -> None:
    r = docs_figures.radius_1d()
    assert r > 0.3 and min(share_1d(x) for x in np.linspace(-r, r, 400)) > 0.5
    around = SIGMA * float(ndtri(share_2d(0, 0)))
    ring = [(around * math.cos(t), around * math.sin(t)) for t in np.linspace(0, 2 * np.pi, 400)]
    assert min(share_2d(x, y) for x, y in ring) > 0.5
    assert not all(docs_figures.is_a(x, y) for x, y in ring)  # F changes


def luminance(colour: str) -> float:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", docs_figures.COLOURS)
@pytest.mark.parametrize("paper", PAPERS)
def test_colours_are_read_on_light_and_on_dark(colour: str, paper: str) -> None:
    """A contrast of 3 to 1: of graphics and of large letters in WCAG 2.2."""
    dark, light = sorted([luminance(colour), luminance(paper)])
    assert (light + 0.05) / (dark + 0.05) >= 3
    drawn = set(re.findall(r"#[0-9a-f]{6}", "".join(draw() for draw in docs_figures.FIGURES.values())))
    assert drawn == set(docs_figures.COLOURS)
