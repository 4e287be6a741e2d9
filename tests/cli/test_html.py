"""The report page: one file, numbers as in the tables, whatever a record holds, opened in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data.datasets import load_split
from bench.options import RunOptions
from bench.records.flaws import LogParameters
from bench.records.importing import import_log
from bench.records.schema import Identity
from bench.report import output, tables
from bench.runs.identity import make_task
from bench.runs.plan import make_plans
from tests.helpers.commands import TINY, Result
from tests.helpers.records import certificate, fewest, seal

Bench = Callable[..., Result]
NASTY = "</script><script>window.pwned=1</script><img src=x onerror=\"window.pwned=1\"> %{x} 'é漢' & $"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real run, the pattern for the made-up ones."""
    from bench.cli import main

    out = tmp_path_factory.mktemp("runs")
    with pytest.raises(SystemExit) as stop:
        main(["run", "--defense", "none", "--dataset", TINY, "--device", "cpu", "--out", str(out)])
    assert not stop.value.code
    (run,) = out.iterdir()
    return run


def made_up(
    finished: Path,
    out: Path,
    name: str,
    radii: list[float],
    *,
    sigma: float = 0.25,
    seed: int = 0,
    cost: dict[str, float] | None = None,
    settings: dict[str, str] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda info: None,
) -> Path:
    """A copy of the run under another name, whose images have these radii: None for abstained, below 0 for wrong."""
    info = json.loads((finished / "run.json").read_text())
    info["identity"]["defense"] |= {"name": name, "config": settings or {}}
    info["identity"] |= {"sigma": sigma, "seed": seed}
    info["defense"]["settings"] = settings or {}
    info["cost"] |= cost or {}
    change(info)
    run = out / f"tiny-{name}-s{sigma:g}-{seed:08x}"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(info))
    with (run / "certificates.jsonl").open("w") as file:
        for line, radius in zip((finished / "certificates.jsonl").read_text().splitlines(), radii, strict=True):
            identity = Identity.of(info["identity"])
            old, votes = json.loads(line), fewest(identity, abs(radius) or None)
            new = certificate(identity, old["index"], old["label"], votes, wrong=radius < 0)
            file.write(json.dumps(vars(new)) + "\n")
    return seal(run)


GOOD = [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.1, 0.0]  # 7 right, 6 of them beyond 0.25
FAIR = [0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 0.0, 0.0]
POOR = [0.3, 0.1, 0.1, -0.2, 0.0, 0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def runs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sigmas, three methods, one of them with two seeds."""
    out = tmp_path_factory.mktemp("made-up")
    for sigma in (0.25, 0.5):
        made_up(finished, out, "good", GOOD, sigma=sigma, cost={"trained_here": 4000, "train_seconds": 9.0})
        made_up(finished, out, "fair", FAIR, sigma=sigma, cost={"trained_here": 900000, "train_seconds": 2.0})
        made_up(finished, out, "poor", POOR, sigma=sigma, cost={"trained_here": 0, "train_seconds": 0.0})
    made_up(finished, out, "fair", GOOD, seed=1, cost={"trained_here": 900000, "train_seconds": 4.0})
    return out


class Seen(NamedTuple):
    tags: list[tuple[str, dict[str, str | None]]]
    text: str
    views: dict[str, Any]
    rows: list[list[str]]  # of all tables, headings included


def read(file: Path) -> Seen:
    """Parse the page as a browser does: text in scripts and attributes is not a tag."""
    tags: list[tuple[str, dict[str, str | None]]] = []
    text: list[str] = []
    scripts: dict[str, str] = {}
    rows: list[list[str]] = []
    inside: list[str] = []
    cells: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))
            if tag in ("script", "style"):
                inside.append(dict(attrs).get("id") or tag)
            if tag == "tr":
                rows.append([])
            if tag in ("td", "th"):
                rows[-1].append("")
                cells.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag in ("script", "style"):
                inside.clear()
            if tag in ("td", "th"):
                cells.clear()

        def handle_data(self, data: str) -> None:
            if inside:
                scripts[inside[0]] = scripts.get(inside[0], "") + data
                return
            text.append(data)
            if cells:
                rows[-1][-1] += data

    Reader().feed(file.read_text(encoding="utf-8"))
    return Seen(tags, "".join(text), json.loads(scripts["views"]), rows)


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "deep" / "page.html"
    records, left_out = tables.load_records(runs)
    assert output.write(tables.build(records), "html", file, left_out) == [file]
    return file


def test_the_page_is_written_to_a_file_and_not_printed(bench: Bench, runs: Path, tmp_path: Path) -> None:
    printed = bench("report", runs, "--format", "html")
    assert (printed.code, printed.out) == (2, "")
    assert "--out" in printed.err and printed.err.count("\n") == 1
    folder = bench("report", runs, "--format", "html", "--out", tmp_path / "folder")
    assert (folder.code, folder.out) == (0, "")
    assert [f.name for f in (tmp_path / "folder").iterdir()] == ["report.html"]
    assert "report.html" in folder.err


def test_the_page_loads_nothing(page: Path) -> None:
    seen = read(page)
    addresses = [(t, v) for t, attrs in seen.tags for k, v in attrs.items() if k in ("src", "href", "action", "srcset")]
    assert any(t == "img" for t, _ in addresses)
    assert [(t, v) for t, v in addresses if not str(v).startswith(("data:image/png;base64,", "#"))] == []
    (policy,) = (a["content"] for t, a in seen.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none';") and "http" not in str(policy)
    style = page.read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert page.stat().st_size < 6e6


def test_the_numbers_are_those_of_the_tables(runs: Path, page: Path) -> None:
    seen = read(page)
    made = tables.build(tables.load_records(runs)[0]).tables
    assert len(made) == 2
    plots = list(seen.views.values())
    assert len(plots) == 1 + 2 * 4  # curves of both sigmas together; costs, abstention, p_lower and classes of each
    lines = {t["name"]: t for t in plots[0][""]["data"] if "name" in t}
    for table, (costs, abstained, _, classes) in zip(made, (plots[1:5], plots[5:9]), strict=True):
        shown, sigma, reach = table.cells, table.setting.sigma, table.setting.reach
        for i, method in enumerate(table.methods):
            label, row = method.label, method.row
            line = lines[f"{label}, sigma {sigma:g}"]
            assert 0 <= reach - line["x"][-1] < 1e-4 and line["x"][0] == 0
            at = [100 * v for v in (row.certified[0].value, row.certified[0].low, row.certified[0].high)]
            assert [line["y"][0], *line["customdata"][0]] == pytest.approx(at)
            before, after = np.searchsorted(line["x"], 0.25) - 1, np.searchsorted(line["x"], 0.25)
            assert line["y"][before] >= 100 * row.certified[0.25].value >= line["y"][after]
            for radius in [r for r in (0.0, 0.25, 0.5) if r <= reach]:
                for key in ("trained_here", "train_seconds", "flops_per_vote", "votes"):
                    view = costs[f"{radius:g}|{key}"]
                    (point,) = (t for t in view["data"] if t["name"] == label)
                    _, low, high = point["customdata"][0]
                    share = row.certified[radius]
                    expected = [100 * share.value, 100 * share.low, 100 * share.high]
                    assert [point["y"][0], low, high] == pytest.approx(expected)
                    if view["layout"]["xaxis"].get("type") != "log":
                        assert point["x"] == [getattr(row, key)]
            assert row.abstained is not None
            assert abstained[""]["data"][0]["x"][i] == pytest.approx(100 * row.abstained)
            column = [line[i] for line in classes["0"]["data"][0]["z"]]
            assert np.mean(column) == pytest.approx(100 * row.certified[0].value)  # one image a class
            assert [shown[k][i] for k in shown] in seen.rows
            few = table.few.cells  # a line break ends the first number of a cell, by which the page sorts
            assert [few[k][i] for k in few] in seen.rows and any("\n" in few[k][i] for k in few)
        assert "0.5" not in classes or sigma == 0.5  # no view of a radius out of reach


def test_no_method_beats_one_on_the_pareto_front(page: Path) -> None:
    costs = list(read(page).views.values())[5]  # of sigma 0.5
    view = costs["0.25|train_seconds"]["data"]
    front, *points = view
    assert {p["name"]: (p["x"][0], p["y"][0]) for p in points} == {
        "good": (9.0, 75.0),
        "fair": (2.0, 37.5),
        "poor": (0.0, 12.5),
    }
    assert (front["x"], front["y"]) == ([0.0, 2.0, 9.0], [12.5, 37.5, 75.0])
    # By parameters "fair" costs more than "good" and certifies less. Powers of ten, where 0 is left of them all.
    front, *points = costs["0.25|trained_here"]["data"]
    assert (front["x"], front["y"]) == ([100.0, 4000.0], [12.5, 75.0])
    axis = costs["0.25|trained_here"]["layout"]["xaxis"]
    assert axis["type"] == "log" and axis["ticktext"][axis["tickvals"].index(100.0)] == "0"
    assert {p["customdata"][0][0] for p in points} == {"0", "4,000", "900,000"}


def test_looks_differ_without_colour(page: Path) -> None:
    lines = [t for t in next(iter(read(page).views.values()))[""]["data"] if "name" in t]
    looks = [(t["marker"]["symbol"], t["line"]["dash"]) for t in lines]
    assert len(set(looks)) == len(looks) == 6


def test_text_of_a_record_is_escaped(bench: Bench, finished: Path, tmp_path: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["classes"] = [f"{NASTY}{k}" for k in range(10)]
        info["environment"]["device"] = NASTY + "\ud800"
        info["identity"]["base"]["name"] = NASTY

    made_up(finished, tmp_path / "runs", "odd", POOR, settings={"note": NASTY}, change=change)
    (tmp_path / "runs" / "<b>torn & 'left'").mkdir()
    (tmp_path / "runs" / "<b>torn & 'left'" / "run.json").write_text("{")
    assert bench("report", tmp_path / "runs", "--format", "html", "--out", tmp_path / "page.html").code == 1
    seen = read(tmp_path / "page.html")
    assert [t for t, _ in seen.tags].count("script") == 3 and "b" not in [t for t, _ in seen.tags if t == "nav"]
    assert [a for t, a in seen.tags if t == "img" and not str(a["src"]).startswith("data:image/png;base64,")] == []
    assert all(not k.startswith("on") for _, attrs in seen.tags for k in attrs)
    assert f"odd note={NASTY}" in seen.rows[1]
    assert f"{NASTY}\\\\ud800" in seen.text.replace('\\"', '"') and "<b>torn & 'left'" in seen.text
    curves, _, _, _, classes = seen.views.values()
    for text in (curves[""]["data"][1]["name"], classes["0"]["data"][0]["y"][0]):
        assert "&lt;img" in text and set(re.findall("<[^>]*>", text)) == {"<br>"} and "%" not in text


def test_unfinished_runs_are_listed_and_one_run_is_enough(bench: Bench, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    empty = bench("report", tmp_path / "none", "--format", "html", "--out", tmp_path / "page.html")
    assert empty.code == 2 and "no finished run" in empty.err and not (tmp_path / "page.html").exists()
    alone = bench("report", finished, "--format", "html", "--out", tmp_path / "page.html")
    assert alone.code == 0
    assert len(read(tmp_path / "page.html").rows) == 4 and "Left out" not in read(tmp_path / "page.html").text

    shutil.copytree(finished, tmp_path / "runs" / "done")
    begun = made_up(finished, tmp_path / "runs", "begun", GOOD, change=lambda info: info.update(status="started"))
    lines = (begun / "certificates.jsonl").read_text().splitlines(keepends=True)
    (begun / "certificates.jsonl").write_text("".join(lines[:3]))
    assert bench("report", tmp_path / "runs", "--format", "html", "--out", tmp_path / "page.html").code == 1
    seen = read(tmp_path / "page.html")
    assert f"{begun}: unfinished (3 of 8 images)" in seen.text and len(seen.rows) == 4


def test_pictures_are_the_images_and_the_noise_that_were_certified(finished: Path, tmp_path: Path) -> None:
    records, _ = tables.load_records(finished)
    (file,) = output.write(tables.build(records), "html", tmp_path / "page.html")
    uris = [str(a["src"]) for t, a in read(file).tags if t == "img"]
    indices = [int(i) for i in re.findall(r"image (\d+), <b>", file.read_text())]
    assert sorted(indices) == records[0].identity.indices and len(uris) == 3 * len(indices)
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))) for uri in uris]

    (plan,) = make_plans(RunOptions(**records[0].info.arguments))
    split = load_split(plan.card, "test")
    task = make_task(plan, split, torch.device("cpu"))
    for place, index in enumerate(indices):
        noisy = task.noisy(task.image(index), task.rows("estimate", index)[:2])
        expected = [split.pixels([index])[0, 0], *noisy[:, 0].clamp(0, 1).numpy()]
        for picture, pixels in zip(shown[3 * place : 3 * place + 3], expected, strict=True):
            assert np.abs(picture / 255 - pixels).max() < 0.002


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda info: info["arguments"].update(dataset="gone.toml"), "no data set card at gone.toml"),
        (lambda info: info["arguments"].update(dataset="digits"), "is not the one of these runs"),
        (lambda info: info["identity"].update(images="0" * 64), "not those of these runs"),
        (lambda info: info["identity"]["noise"].update(version="other"), "another version"),
    ],
)
def test_without_its_images_the_page_explains_why(
    finished: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], why: str
) -> None:
    records, _ = tables.load_records(made_up(finished, tmp_path, "none", GOOD, change=change))
    (file,) = output.write(tables.build(records), "html", tmp_path / "page.html")
    seen = read(file)
    assert why in seen.text and "img" not in [t for t, _ in seen.tags]


def test_runs_of_a_known_label_never_abstain(finished: Path, tmp_path: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["identity"]["procedure"]["target"] = "label"

    records, _ = tables.load_records(made_up(finished, tmp_path, "none", FAIR, change=change))
    (file,) = output.write(tables.build(records), "html", tmp_path / "page.html")
    seen = read(file)
    assert "neither predict nor abstain" in seen.text and "none: not certified" in seen.text
    assert "none: abstained" not in seen.text and len(seen.views) == 4


def test_unknown_costs_are_left_out_of_the_cost_figure(finished: Path, tmp_path: Path) -> None:
    def unknown(info: dict[str, Any]) -> None:
        info["cost"]["flops_per_vote"] = None

    for name, change in (("known", lambda info: None), ("unknown", unknown)):
        made_up(finished, tmp_path / "runs", name, FAIR, change=change)
    report = tables.build(tables.load_records(tmp_path / "runs")[0])
    (file,) = output.write(report, "html", tmp_path / "page.html")
    costs = list(read(file).views.values())[1]
    drawn = {key: [t["name"] for t in view["data"]] for key, view in costs.items() if key.startswith("0|")}
    assert drawn["0|flops_per_vote"] == ["Pareto front", "known"]
    assert drawn["0|votes"] == ["Pareto front", "known", "unknown"]


def test_an_imported_log_has_a_page(tmp_path: Path) -> None:
    """Its costs and class names are unknown."""
    log = tmp_path / "log.tsv"
    rows = ["idx\tlabel\tpredict\tradius\tcorrect\ttime", *(f"{i}\t{i}\t{i}\t0.1\t1\t0:00:01" for i in range(5))]
    log.write_text("\n".join(rows))
    record = import_log(log, LogParameters("cohen", "any-data", 0.25, 0.001, 1000), tmp_path / "runs")
    (file,) = output.write(tables.build([record], with_published=True), "html", tmp_path / "page.html")
    seen = read(file)
    assert "The costs of these runs are unknown" in seen.text
    classes = list(seen.views.values())[-1]
    assert classes["0"]["data"][0]["y"] == [f"{k} (1)" for k in range(5)]


def test_the_wheel_holds_what_the_page_is_made_of(tmp_path: Path) -> None:
    root = Path(output.__file__).parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert {"bench/report/page.css", "bench/report/page.js"} <= set(zipfile.ZipFile(wheel).namelist())


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; errors in it and requests by it fail the test."""
    complaints: list[str] = []
    tabs = []

    def call(file: Path, width: int = 1280) -> Any:
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tabs.append(tab)
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith(("data:", file.as_uri())) else complaints.append(r.url))
        tab.goto(file.as_uri())
        tab.wait_for_selector(".plot .main-svg")
        return tab

    yield call
    for tab in tabs:
        tab.close()
    assert complaints == []


# The lines and bands of a figure that are neither switched off nor hidden.
SHOWN = "f => f.querySelector('.plot').data.filter(t => (t.visible ?? true) === true).map(t => t.legendgroup)"


@needs_chromium
def test_lines_and_sigmas_are_switched_off_and_on(opened: Callable[..., Any], page: Path) -> None:
    tab = opened(page)
    figure = tab.locator("figure").first
    assert len(figure.evaluate(SHOWN)) == 12  # a line and its band for three methods of two sigmas
    buttons = [b.get_attribute("data-title") for b in figure.locator(".modebar-btn").all()]
    assert "Zoom" in buttons and not any("hare" in str(b) or "loud" in str(b) for b in buttons)  # uploads nothing
    entry = figure.locator(".legend .traces", has_text=re.compile("^good, sigma 0.25$")).locator(".legendtoggle")
    entry.click()
    tab.wait_for_function("() => document.querySelector('.plot').data.some(t => t.visible === 'legendonly')")
    assert "good, sigma 0.25" not in figure.evaluate(SHOWN) and len(figure.evaluate(SHOWN)) == 10

    boxes, parts = tab.locator(".sigmas input"), tab.locator("[data-sigma]")
    boxes.nth(1).focus()
    tab.keyboard.press("Space")
    assert {name.split("sigma ")[1] for name in figure.evaluate(SHOWN)} == {"0.25"}
    assert parts.nth(0).is_visible() and parts.nth(1).is_hidden()
    boxes.nth(1).check()
    assert len(figure.evaluate(SHOWN)) == 10 and parts.nth(1).is_visible()


@needs_chromium
def test_a_table_is_sorted_by_a_click_or_a_key(opened: Callable[..., Any], page: Path) -> None:
    tab = opened(page)
    tab.locator("summary", has_text="All columns").first.click()
    table = tab.locator("details table").first
    headings = table.locator("thead th")

    def cells(title: str) -> list[str]:
        texts = headings.all_text_contents()
        return [str(c) for c in table.locator(f"tbody tr > :nth-child({texts.index(title) + 1})").all_text_contents()]

    def sort(title: str, how: str) -> None:
        heading = headings.filter(has_text=re.compile(f"^{re.escape(title)}$"))
        if how == "click":
            heading.get_by_role("button").click()
        else:
            heading.get_by_role("button").press(how)

    assert cells("defense") == ["good", "fair (2 seeds)", "poor"]
    sort("trained here", "click")
    assert cells("trained here") == ["900,000", "4,000", "0"]
    sort("trained here", "Enter")
    assert cells("trained here") == ["0", "4,000", "900,000"] and cells("defense")[0] == "poor"
    sort("certified at r = 0.25", "Space")
    assert cells("defense") == ["good", "fair (2 seeds)", "poor"]
    sort("defense", "click")
    assert cells("defense") == ["fair (2 seeds)", "good", "poor"]
    sort("defense", "click")
    assert cells("defense") == ["poor", "good", "fair (2 seeds)"]
    states = [h.get_attribute("aria-sort") for h in headings.all()]
    assert states == ["descending"] + ["none"] * (len(states) - 1)


@needs_chromium
def test_another_cost_and_radius_are_chosen(opened: Callable[..., Any], page: Path) -> None:
    tab = opened(page)
    figure = tab.locator("figure").nth(1)
    figure.locator("select").nth(1).select_option("training time (s)")
    figure.locator("select").nth(0).select_option("0.25")
    assert figure.locator(".xtitle").text_content() == "training time (s)"
    drawn = figure.evaluate("f => f.querySelector('.plot').data.slice(1).map(t => [t.name, t.x[0], t.y[0]])")
    assert drawn == [["good", 9.0, 75.0], ["fair (2 seeds)", 3.0, 56.25], ["poor", 0.0, 12.5]]


@needs_chromium
def test_the_page_fits_a_narrow_screen_and_runs_nothing_of_a_record(
    opened: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    long = {"note": NASTY, "long": "w" * 200}
    records = []
    for sigma in (0.25, 0.5):
        run = made_up(finished, tmp_path, "odd", POOR, sigma=sigma, settings=long)
        records += tables.load_records(run)[0]
    (file,) = output.write(tables.build(records), "html", tmp_path / "page.html", [f"{NASTY}: {'w' * 200}"])
    tab = opened(file, width=360)
    tab.locator("details").last.evaluate("d => d.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.locator("table").first.evaluate("t => t.scrollWidth > t.parentElement.clientWidth")  # scrolls within
    assert tab.locator("figure svg.main-svg").first.evaluate("s => s.getBoundingClientRect().right") <= 360
    assert tab.evaluate("window.pwned") is None
    # Lines are broken anywhere a blank is, or a word is longer than a line.
    legend = "".join(tab.locator(".legendtext").first.locator("tspan").all_text_contents())
    assert legend.replace(" ", "").startswith(f"odd note={NASTY}".replace(" ", ""))
