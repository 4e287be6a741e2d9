"""Draw the figures of docs/certificates.md from formulas: a toy classifier, and its smoothed version in closed form.

    python scripts/docs_figures.py

A test compares docs/figures/ with what this would draw. Colours are chosen to be read on white and on black.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from bench.smoothing import bounds

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
A, B, TEXT, LINE = "#3b82d6", "#d4632f", "#7f7f7f", "#8c8c8c"
COLOURS = (A, B, TEXT, LINE)
WIDTH, SIZE = 720, 17  # of a figure and of its letters, in pixels
ALPHA = 0.001

Point = tuple[float, float]


class Picture:
    """An SVG of shapes in a figure's own coordinates, which x and y map to pixels."""

    def __init__(self, height: int, title: str, x: Callable[[float], float], y: Callable[[float], float]) -> None:
        self.x, self.y = x, y
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'font-family="sans-serif" font-size="{SIZE}">',
            f"<title>{title}</title>",
        ]

    def line(self, points: Iterable[Point], colour: str = LINE, width: float = 2, dash: str = "") -> None:
        """Draw a line through points."""
        path = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>')

    def box(self, low: Point, high: Point, colour: str, opacity: float = 0.25) -> None:
        """Fill a rectangle."""
        left, bottom, right, top = self.x(low[0]), self.y(low[1]), self.x(high[0]), self.y(high[1])
        self.parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
            f'fill="{colour}" fill-opacity="{opacity}"/>'
        )

    def dot(self, at: Point, colour: str, size: float = 3) -> None:
        """Draw a filled circle of a size in pixels."""
        self.parts.append(f'<circle cx="{self.x(at[0]):.1f}" cy="{self.y(at[1]):.1f}" r="{size}" fill="{colour}"/>')

    def circle(self, at: Point, radius: float, colour: str) -> None:
        """Draw a circle of a radius in the figure's coordinates."""
        pixels = self.x(at[0] + radius) - self.x(at[0])
        self.parts.append(
            f'<circle cx="{self.x(at[0]):.1f}" cy="{self.y(at[1]):.1f}" r="{pixels:.1f}" fill="none" '
            f'stroke="{colour}" stroke-width="3"/>'
        )

    def text(self, at: Point, words: str, anchor: str = "middle", colour: str = TEXT, down: float = 0) -> None:
        """Write words, ``down`` pixels below a point."""
        self.parts.append(
            f'<text x="{self.x(at[0]):.1f}" y="{self.y(at[1]) + down:.1f}" text-anchor="{anchor}" '
            f'fill="{colour}">{words}</text>'
        )

    def svg(self) -> str:
        """Return the file's text."""
        return "\n".join([*self.parts, "</svg>", ""])


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the linear map of [low, high] to [start, end]."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def span(low: float, high: float, steps: int) -> list[float]:
    """Return evenly spaced numbers, both ends among them."""
    return [low + (high - low) * i / steps for i in range(steps + 1)]


# ---- one dimension: class B has an interval, and everything from a point on

SIGMA = 0.25
SPIKE, EDGE = (0.14, 0.20), 0.62


def share_1d(x: float) -> float:
    """Return the probability that x + noise is of class A."""
    spike = ndtr((SPIKE[1] - x) / SIGMA) - ndtr((SPIKE[0] - x) / SIGMA)
    return float(ndtr((EDGE - x) / SIGMA) - spike)


def radius_1d() -> float:
    """Return the radius that theorem 1 of Cohen et al. proves at x = 0."""
    return SIGMA * float(ndtri(share_1d(0)))


def smoothed() -> str:
    """Draw F on a line, the noise around x, and the share of class A, whose half is where G changes."""
    low, high = -0.8, 1.0
    figure = Picture(
        470, "A classifier F on a line, and its smoothed version G", scale(low, high, 40, 700), scale(0, 1, 420, 210)
    )
    strip, noise = scale(0, 1, 150, 120), scale(0, 1, 120, 25)
    share, figure.y = figure.y, strip
    for start, end, colour in ((low, SPIKE[0], A), (*SPIKE, B), (SPIKE[1], EDGE, A), (EDGE, high, B)):
        figure.box((start, 0), (end, 1), colour, 0.85)
    figure.text((low, 0), "F: class A", "start", A, 20)
    figure.text((high, 0), "class B", "end", B, 20)
    figure.text((sum(SPIKE) / 2, 0), "B", "middle", B, 20)
    figure.y = noise
    figure.line([(x, math.exp(-0.5 * (x / SIGMA) ** 2)) for x in span(low, high, 120)])
    figure.text((0.3, 0.75), "noise around x", "start")
    figure.y = share
    r = radius_1d()
    figure.box((-r, 0), (r, 1), A, 0.15)
    figure.line([(low, 0), (high, 0)], LINE, 1)
    figure.line([(low, 0.5), (high, 0.5)], LINE, 1, "6 5")
    figure.line([(x, share_1d(x)) for x in span(low, high, 180)], A, 3)
    figure.dot((0, share_1d(0)), A, 6)
    figure.text((0, share_1d(0)), f"p = {share_1d(0):.3f}", "middle", TEXT, 24)
    figure.text((low, 0.5), "1/2", "start", TEXT, -6)
    figure.text((low, 1), "share of A around each point", "start", TEXT, -12)
    change = brentq(lambda x: share_1d(x) - 0.5, 0, high)
    figure.dot((change, 0.5), B, 6)
    figure.text((change, 0.5), f"G changes: {change:.3f}", "start", B, -12)
    figure.text((0, 0), f"certified: x &#8722; {r:.3f} to x + {r:.3f}", "middle", A, 28)
    return figure.svg()


# ---- two dimensions: class B has a rectangle, and everything right of a line

RECTANGLE, WALL = ((0.10, -0.12), (0.24, 0.30)), 0.52
VOTES = 400


def share_2d(x: float, y: float) -> float:
    """Return the probability that (x, y) + noise is of class A."""
    (left, bottom), (right, top) = RECTANGLE
    across = ndtr((right - x) / SIGMA) - ndtr((left - x) / SIGMA)
    up = ndtr((top - y) / SIGMA) - ndtr((bottom - y) / SIGMA)
    return float(ndtr((WALL - x) / SIGMA) - across * up)


def is_a(x: float, y: float) -> bool:
    """Return whether F says A."""
    (left, bottom), (right, top) = RECTANGLE
    return x < WALL and not (left < x < right and bottom < y < top)


def halton(index: int, base: int) -> float:
    """Return a number of Halton's sequence, which fills (0, 1) evenly: the figure needs no random numbers."""
    value, unit = 0.0, 1.0
    while index:
        unit /= base
        index, digit = divmod(index, base)
        value += unit * digit
    return value


def votes() -> str:
    """Draw F on a plane, the votes around x, the change of G, and the certified circle."""
    low, high, half = -0.85, 0.95, 0.6
    figure = Picture(
        480, "Votes around an image, and the certified circle", scale(low, high, 20, 700), scale(-half, half, 450, 0)
    )
    figure.box((low, -half), (WALL, half), A, 0.12)
    figure.box((WALL, -half), (high, half), B, 0.3)
    figure.box(*RECTANGLE, B, 0.35)
    counted = 0
    for i in range(1, VOTES + 1):
        x, y = (SIGMA * float(ndtri(halton(i, base))) for base in (2, 3))
        counted += is_a(x, y)
        if low < x < high and abs(y) < half:
            figure.dot((x, y), A if is_a(x, y) else B, 2)
    edge = [(brentq(lambda x, y=y: share_2d(x, y) - 0.5, 0, 2), y) for y in span(-half, half, 40)]
    figure.line(edge, B, 3, "8 5")
    figure.text((edge[0][0], -half), "G changes ", "end", B, -12)
    p = share_2d(0, 0)
    figure.circle((0, 0), SIGMA * float(ndtri(p)), A)
    figure.dot((0, 0), TEXT, 6)
    figure.text((0, 0), "x", "end", TEXT, 22)
    figure.text((low, half), "F: class A", "start", A, 24)
    figure.text((high, half), "class B", "end", B, 24)
    words = f"{counted} of {VOTES} votes for A; p = {p:.3f}; circle: radius {SIGMA * float(ndtri(p)):.3f}"
    figure.text((0, -half), words, "middle", TEXT, 24)
    return figure.svg()


# ---- the radius

SIGMAS = (0.25, 0.5, 1.0)
COUNTS = (10, 100, 1_000, 10_000, 100_000)


def axes(figure: Picture, x: Sequence[tuple[float, str]], y: Sequence[tuple[float, str]]) -> None:
    """Draw two axes through the lowest of their ticks, and a grid; the last tick of y is the highest line."""
    for at, words in x:
        figure.line([(at, y[0][0]), (at, y[-1][0])], LINE, 0.5)
        figure.text((at, y[0][0]), words, "middle", TEXT, 24)
    for at, words in y:
        figure.line([(x[0][0], at), (x[-1][0], at)], LINE, 0.5)
        figure.text((x[0][0], at), f"{words}&#160;&#160;", "end", TEXT, 6)


def radius() -> str:
    """Draw the radius against p for several sigmas."""
    figure = Picture(400, "The radius sigma times the quantile of p", scale(0.5, 1, 60, 560), scale(0, 3, 340, 30))
    axes(figure, [(p, f"{p:g}") for p in (0.5, 0.6, 0.7, 0.8, 0.9, 1)], [(r, f"{r}") for r in range(4)])
    end = float(ndtr(2.8))
    for sigma, dash in zip(SIGMAS, ("", "10 5", "3 4"), strict=True):
        figure.line([(p, bounds.radius(p, sigma)) for p in [*span(0.5, 0.98, 96), *span(0.9805, end, 60)]], A, 3, dash)
        figure.text((end, bounds.radius(end, sigma)), f"&#160; sigma {sigma:g}", "start", A, 4)
    figure.text((0.75, 0), "p, the share of the class around the image", "middle", TEXT, 50)
    figure.text((0.5, 3), "radius", "middle", TEXT, -12)
    return figure.svg()


def reach() -> str:
    """Draw the largest radius that n votes can certify, in sigmas."""
    figure = Picture(400, "The largest radius that n votes can certify", scale(1, 5, 60, 660), scale(0, 4, 340, 30))
    axes(figure, [(math.log10(n), f"{n:,}") for n in COUNTS], [(r, f"{r}") for r in range(5)])
    figure.line([(e, bounds.radius(ALPHA ** (10**-e), 1)) for e in span(1, 5, 80)], A, 3)
    for n in COUNTS[1:]:
        most = bounds.radius(bounds.lower_bound(n, n, ALPHA), 1)
        figure.dot((math.log10(n), most), A, 6)
        figure.text((math.log10(n), most), f"{bounds.printed_radius(most, 2)}", "end", A, -10)
    figure.text((3, 0), f"n, votes for each image (alpha = {ALPHA:g}; all agree)", "middle", TEXT, 50)
    figure.text((1, 4), "radius / sigma", "start", TEXT, -12)
    return figure.svg()


FIGURES = {"smoothed.svg": smoothed, "votes.svg": votes, "radius.svg": radius, "reach.svg": reach}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(f"wrote {FOLDER / name}", file=sys.stderr)
