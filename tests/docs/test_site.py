"""The site builds without a warning, its own links work, and it asks no other server for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from docs_links import ROOT

pytestmark = pytest.mark.slow
for module in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
    pytest.importorskip(module, reason="the site needs certbench[docs]")


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", source, out]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = build(ROOT / "docs", out)
    assert built.returncode == 0, built.stderr
    return out


class Page(HTMLParser):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {v for v in (values.get("id"),) if v}
        if tag == "a" and (target := values.get("href")):
            self.links.append(target)
        elif target := values.get("src") or (values.get("href") if tag == "link" else None):
            self.loads.append(target)


def test_links_between_pages_work(site: Path) -> None:
    pages = {file: Page(file) for file in site.rglob("*.html")}
    assert len(pages) > 25
    checked = 0
    for file, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            there = (file.parent / path).resolve() if path else file
            assert there.exists(), (file.name, link)
            if anchor and there in pages:
                assert anchor in pages[there].ids, (file.name, link)
            checked += 1
    assert checked > 1000


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    for file in site.rglob("*.html"):
        loads = Page(file).loads
        assert loads and not [one for one in loads if re.match(r"(https?:)?//", one)], file.name


def test_pages_of_other_files_have_their_text(site: Path) -> None:
    assert "Keep a Changelog" in (site / "changelog.html").read_text()
    assert "The layer rule" in (site / "contributing.html").read_text()
    assert "class bench.interface.Defense" in re.sub("<.*?>", "", (site / "reference" / "api.html").read_text())


@pytest.mark.parametrize("link", ["missing.md", "faq.md#no-such-heading"])
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, link: str) -> None:
    """With the settings of the site, but two pages."""
    (tmp_path / "conf.py").write_text(
        f"exec(compile(open({str(ROOT / 'docs' / 'conf.py')!r}).read(), {str(ROOT / 'docs' / 'conf.py')!r}, 'exec'), "
        f"globals() | {{'__file__': {str(ROOT / 'docs' / 'conf.py')!r}}}, g := {{}})\n"
        "globals().update({k: v for k, v in g.items() if k != 'setup'})\n"
    )
    (tmp_path / "faq.md").write_text("# Questions\n")
    (tmp_path / "index.md").write_text(f"# Top\n\n```{{toctree}}\nfaq\n```\n\n[a]({link})\n")
    built = build(tmp_path, tmp_path / "out")
    assert built.returncode == 1 and link.partition("#")[2] in built.stderr
    (tmp_path / "index.md").write_text("# Top\n\n```{toctree}\nfaq\n```\n\n[a](faq.md#questions)\n")
    assert build(tmp_path, tmp_path / "out").returncode == 0
