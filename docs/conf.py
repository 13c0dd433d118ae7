"""How Sphinx builds these pages: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

from focalops import __version__  # noqa: E402

project = "focalops"
author = "the focalops contributors"
copyright = author
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "myst_parser",
]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = f"focalops {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes, dtypes, ranges
napoleon_numpy_docstring = False
# "Returns: int64 (B, N) -- the index", in the order in which it is written.
napoleon_use_rtype = False
maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3


# The tables of the studies' records are pages here; in the repository they lie beside the records.
STUDY = re.compile(r"\]\(\.\./benchmarks/results/study/(\S+?\.md)\)")


def link_studies(app, name: str, source: list[str]) -> None:
    source[0] = STUDY.sub(r"](_generated/study/\1)", source[0])


def setup(app) -> None:
    app.connect("builder-inited", lambda app: generate.all_of(HERE / "_generated"))
    app.connect("source-read", link_studies)
