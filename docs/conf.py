"""The documentation site: make docs.

Pages are docs/*.md, which also read well on GitHub; scripts/docs_links.py makes their links work in both. The table of
contents is that of index.md.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import docs_links  # noqa: E402

from bench import __version__  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "certbench"
author = copyright = "The certbench authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_site"]
nitpicky = True
highlight_language = "none"  # of indented blocks, which are commands
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Types of other packages, whose documentation is not looked up: a build needs no network.
nitpick_ignore_regex = [("py:class", r"(torch|pathlib|contextlib|collections|t)\..*")]

html_theme = "furo"
html_title = f"certbench {version}"
html_theme_options = {
    "source_repository": docs_links.REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}


def setup(app: "Sphinx") -> None:
    """Change the text of pages before they are parsed."""
    app.connect("source-read", docs_links.on_read)
