"""Links of the pages in docs/, which work on GitHub and on the site that docs/conf.py makes of them.

On the site a link that leaves docs/ leads to the page made of that file, or to the file in the repository. The table of
contents is made of the lists of links in index.md.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/certbench/certbench"
# Pages whose text on the site is that of another file: on GitHub they only link to it.
COPIES = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
PICTURES = (".svg", ".png")

_FENCE = re.compile(r"^\s*(```|~~~)")
_CODE = re.compile(r"(`+).+?\1")
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^()\s]+)(\))")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def prose(markdown: str) -> list[tuple[str, bool]]:
    """Return the lines of a text, each with whether it is prose rather than code."""
    found, fenced, before, code = [], False, "", False
    for line in markdown.split("\n"):
        fence = _FENCE.match(line) is not None
        # An indented block begins after an empty line; below a list it is a part of an entry.
        code = line.startswith("    ") and (code or not before.strip()) and not line.lstrip().startswith(("- ", "* "))
        found.append((line, not (fenced or fence or code)))
        fenced ^= fence
        before = line
    return found


def replace_links(markdown: str, change: Callable[[str], str]) -> str:
    """Return the text with the relative target of each link and picture replaced."""

    def replaced(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        return found[0] if _ADDRESS.match(target) else f"{before}{change(target)}{after}"

    blocks = []
    for is_prose, lines in itertools.groupby(prose(markdown), key=lambda one: one[1]):
        text = "\n".join(line for line, _ in lines)  # the words of a link may go on in the next line
        spans = [m.span() for m in _CODE.finditer(text)] if is_prose else []
        parts, at = [], 0
        for found in _LINK.finditer(text) if is_prose else ():
            if not any(a < found.start() and found.end() < b for a, b in spans):  # else an example in code
                parts += [text[at : found.start()], replaced(found)]
                at = found.end()
        blocks.append("".join([*parts, text[at:]]))
    return "\n".join(blocks)


def links(markdown: str) -> list[str]:
    """Return the relative targets of links and pictures, in their order."""
    found: list[str] = []

    def note(target: str) -> str:
        found.append(target)
        return target

    replace_links(markdown, note)
    return found


def anchors(markdown: str) -> list[str]:
    """Return the anchors that GitHub gives to the headings of a text; a repeated heading gets a number."""
    seen: dict[str, int] = {}
    found = []
    for line, is_prose in prose(markdown):
        if is_prose and (heading := re.match(r"#{1,6} +(.*?)\s*$", line)):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1].replace("`", "")).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            found.append(f"{slug}-{seen[slug]}" if slug in seen else slug)
            seen[slug] = seen.get(slug, 0) + 1
    return found


def on_site(target: str, file: str, page: str) -> str:
    """Return a link of a file of the repository as its page has it.

    Args:
        target: The link, relative to the file, or an anchor in it.
        file: Path of the file in the repository.
        page: Path of its page in docs/.
    """
    path, hash_, anchor = target.partition("#")
    if not path:
        return target
    there = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
    copy = next((f"docs/{name}.md" for name, copied in COPIES.items() if copied == there), there)
    if copy.endswith(PICTURES) or (copy.startswith("docs/") and copy.endswith(".md")):
        return posixpath.relpath(copy, posixpath.dirname(f"docs/{page}")) + hash_ + anchor
    return f"{REPOSITORY}/{'tree' if (ROOT / there).is_dir() else 'blob'}/main/{there}{hash_}{anchor}"


def contents(index: str) -> str:
    """Return directives for the table of contents: a caption for each heading of index.md that lists pages."""
    parts: dict[str, list[str]] = {}
    caption = ""
    for line in index.splitlines():
        if heading := re.match(r"## +(.*)", line):
            caption = heading[1]
        elif entry := re.match(r"- \[[^\]]*\]\(([\w/-]+)\.md\)", line):
            parts.setdefault(caption, []).append(entry[1])
    blocks = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])
        for caption, pages in parts.items()
    ]
    return "\n\n".join(blocks)


def on_read(_app: Sphinx, name: str, source: list[str]) -> None:
    """Change the text of a page, before it is parsed, to the one that the site needs."""
    file = COPIES.get(name, f"docs/{name}.md")
    text = (ROOT / file).read_text(encoding="utf-8")
    source[0] = replace_links(text, lambda target: on_site(target, file, f"{name}.md"))
    if name == "index":
        source[0] += f"\n\n{contents(text)}\n"
