"""Links of the documentation lead somewhere, on GitHub and on the site; the table of contents has every page."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import docs_links
import pytest
from docs_links import ROOT, anchors, links, on_site

DOCS = sorted((ROOT / "docs").rglob("*.md"))
TOP = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]


def test_there_are_pages() -> None:
    assert len(DOCS) > 20 and all(file.is_file() for file in TOP)


@pytest.mark.parametrize("file", [*DOCS, *TOP], ids=lambda f: str(f.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(file: Path) -> None:
    for target in links(file.read_text(encoding="utf-8")):
        path, _, anchor = unquote(target).partition("#")
        there = file.parent / path if path else file
        assert there.resolve().is_relative_to(ROOT) and there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def test_links_are_found_outside_of_code_only() -> None:
    text = "[a](b.md#c) ![d](e.svg)\n\n    [no](code.md)\n\n```\n[no](fence.md)\n```\n`[no](x.md)` [f](g)"
    assert links(text) == ["b.md#c", "e.svg", "g"]
    assert links("[a](https://b.c) [mail](mailto:d) [two\nlines](e.md)") == ["e.md"]


def test_anchors_are_those_of_github() -> None:
    """As GitHub renders these headings."""
    text = "# A `--b C` (d, e)\n## Why is r = .75 a dash?\n## On [x](y.md)\n## `[source]`\n## same\n## same\n\n    # no"
    assert anchors(text) == ["a---b-c-d-e", "why-is-r--75-a-dash", "on-x", "source", "same", "same-1"]


@pytest.mark.parametrize(
    ("target", "file", "page", "expected"),
    [
        ("data.md#splits", "docs/faq.md", "faq.md", "data.md#splits"),
        ("../data.md", "docs/reference/cli.md", "reference/cli.md", "../data.md"),
        ("../CHANGELOG.md", "docs/faq.md", "faq.md", "changelog.md"),
        ("docs/faq.md", "CHANGELOG.md", "changelog.md", "faq.md"),
        ("../reports/soak/memory.png", "docs/scale.md", "scale.md", "../reports/soak/memory.png"),
        ("#x", "docs/faq.md", "faq.md", "#x"),
        ("../README.md#use", "docs/faq.md", "faq.md", f"{docs_links.REPOSITORY}/blob/main/README.md#use"),
        ("../tests/smoothing", "docs/faq.md", "faq.md", f"{docs_links.REPOSITORY}/tree/main/tests/smoothing"),
        ("certbench.slurm", "docs/slurm.md", "slurm.md", f"{docs_links.REPOSITORY}/blob/main/docs/certbench.slurm"),
    ],
)
def test_links_that_leave_docs_lead_to_the_repository(target: str, file: str, page: str, expected: str) -> None:
    assert on_site(target, file, page) == expected


def test_the_table_of_contents_has_every_page_once() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    blocks = docs_links.contents(index).split("```{toctree}")[1:]
    pages = [line for block in blocks for line in block.splitlines() if line and line[0] not in ":`"]
    assert sorted(pages) == sorted(str(f.relative_to(ROOT / "docs"))[:-3] for f in DOCS if f.name != "index.md")
    captions = [line for block in blocks for line in block.splitlines() if line.startswith(":caption:")]
    assert captions == [f":caption: {c}" for c in ("Start", "Use", "Understand", "Reference", "Project")]


@pytest.mark.parametrize("file", [*DOCS, *TOP], ids=lambda f: str(f.relative_to(ROOT)))
def test_the_page_has_one_title(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    titles = [line for line, is_prose in docs_links.prose(text) if is_prose and line.startswith("# ")]
    assert len(titles) == 1 and text.startswith(titles[0])
