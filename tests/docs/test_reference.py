"""docs/reference/ is what the code gives, and the commands that pages show exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import docs_reference
import pytest
import typer.main
from docs_links import ROOT, prose

from bench import plugins
from bench.cli.app import app

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group


@pytest.mark.parametrize("name", docs_reference.WRITERS)
def test_the_page_is_up_to_date(name: str) -> None:
    assert (docs_reference.PAGES / name).read_text() == docs_reference.WRITERS[name](), "run make reference"


def test_every_command_option_and_defense_is_there() -> None:
    commands = (docs_reference.PAGES / "cli.md").read_text()
    for name, command in COMMANDS.items():
        section = commands.partition(f"## bench {name}\n")[2].partition("\n## ")[0]
        flags = {flag for p in command.params if p.name != "help" for flag in p.opts if flag.startswith("--")}
        assert section and flags == set(re.findall(r"^\| `(--[\w-]+)", section, re.MULTILINE)), name
    settings = (docs_reference.PAGES / "settings.md").read_text()
    assert re.findall(r"^## (.*)$", settings, re.MULTILINE) == plugins.names()


def test_a_default_for_each_preset_is_written_once() -> None:
    assert docs_reference._by_preset({"quick": 1, "paper": 1}) == "`1`"
    assert docs_reference._by_preset({"quick": 1.5, "standard": 2, "paper": 1.5}) == "quick, paper `1.5`; standard `2`"


def typed(page: Path) -> list[list[str]]:
    """Return the words of each command ``bench ...`` in a page's indented blocks."""
    lines = [line for line, is_prose in prose(page.read_text(encoding="utf-8")) if not is_prose]
    return [shlex.split(line, comments=True) for line in lines if re.match(r" {4,}bench [a-z]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda f: str(f.relative_to(ROOT)))
def test_commands_in_pages_have_these_names_and_options(page: Path) -> None:
    for _, name, *words in typed(page):
        if name.isupper():
            continue  # stands for any
        assert name in COMMANDS, name
        known = {flag for p in COMMANDS[name].params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known, (name, used - known)


def test_many_commands_are_checked() -> None:
    assert sum(len(typed(page)) for page in PAGES) > 60
