"""Sphinx's settings for `make docs`."""

project = "Regrow"
author = "The Regrow authors"
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = "Regrow"
# Headings are linked to by their words, as GitHub does it.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build"]
