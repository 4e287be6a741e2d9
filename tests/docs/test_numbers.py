"""Numbers in the pages are those of the code."""

from __future__ import annotations

import re
import tomllib

import pytest
from docs_links import ROOT
from scipy.special import ndtri

import bench
from bench.smoothing import bounds

CHOOSING = (ROOT / "docs" / "choosing.md").read_text()
FAQ = (ROOT / "docs" / "faq.md").read_text()


def table(name: str) -> list[list[str]]:
    """Return the cells of the table below a comment, its head first."""
    text = CHOOSING.partition(f"<!-- {name}:")[2].partition("-->\n")[2]
    lines = text.split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def reach(n: int, alpha: float) -> float:
    """In sigmas."""
    return bounds.radius(bounds.lower_bound(n, n, alpha), 1)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_largest_radii() -> None:
    head, *rows = table("reach")
    alphas = [float(title.removeprefix("alpha ")) for title in head[1:]]
    assert len(rows) == 4
    for n, *values in rows:
        assert values == [bounds.printed_radius(reach(int(number(n)), alpha), 2) for alpha in alphas]


def test_the_radii_of_n_votes() -> None:
    head, *rows = table("votes")
    shares = [float(title.removeprefix("p = ")) for title in head[1:]]
    assert rows.pop()[1:] == [f"{ndtri(p):.2f}" for p in shares]
    assert len(rows) == 4
    for text, *values in rows:
        n = int(number(text))
        lower = [bounds.lower_bound(round(p * n), n, 0.001) for p in shares]
        assert values == [bounds.printed_radius(bounds.radius(p, 1), 2) for p in lower]


def test_the_margins_of_error() -> None:
    _, *rows = table("margins")
    assert len(rows) == 5
    for images, margin in rows:
        low, high = bounds.interval(number(images) / 2, number(images))
        assert margin == f"{50 * (high - low):.1f}"


def test_the_fewest_votes_that_certify() -> None:
    assert bounds.smallest_n(0.001) == 10
    assert "Fewer than 10 votes can certify nothing at alpha = .001" in re.sub(r"\s+", " ", CHOOSING)
    assert "10 votes certify only if all agree, and fewer than 10 certify nothing" in re.sub(r"\s+", " ", FAQ)
    assert bounds.lower_bound(9, 10, 0.001) < 0.5 < bounds.lower_bound(10, 10, 0.001)


def test_the_dash_of_the_digits_table() -> None:
    at_sigma = bounds.printed_reach(bounds.radius(bounds.lower_bound(1000, 1000, 0.001), 0.25))
    text = re.sub(r"\s+", " ", FAQ)
    assert f"is {bounds.printed_radius(reach(1000, 0.001), 2)} sigma, which is {at_sigma[1:]} at sigma .25" in text
    assert f"`--n 10000` reaches {bounds.printed_radius(reach(10_000, 0.001), 2)} sigma" in text
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "certificates.md").read_text())
    assert f"no radius above {bounds.printed_radius(reach(1000, 0.001), 2)} sigma" in page


@pytest.mark.parametrize("row", ["retrain", "lora"])
def test_the_example_of_the_table_is_that_of_the_report(row: str) -> None:
    def cells(text: str) -> list[str]:
        (line,) = (one for one in text.splitlines() if re.match(rf"\| {row} +\|", one))
        return [cell.strip() for cell in line.strip("|").split("|")][:3]

    shown = (ROOT / "docs" / "tables.md").read_text()
    report = (ROOT / "reports" / "digits-quick" / "report.md").read_text()
    assert cells(shown) == cells(report)
    assert re.search(r"^> (.*)$", shown, re.MULTILINE)[1] in report  # type: ignore[index]


def test_the_columns_that_the_answer_on_tracking_sends() -> None:
    named = set(re.findall(r'row\["([\w.]+)"\]', FAQ))
    frame = bench.load(ROOT / "reports" / "digits-quick" / "runs").to_pandas()
    assert named == {"run", "identity", "certified_0.25"} <= set(frame.columns)


def test_the_citation_names_the_version() -> None:
    assert f"version = {{{bench.__version__}}}" in (ROOT / "docs" / "cite.md").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
