"""How the documentation is made into a site: ``make docs`` builds it into build/docs.

The pages are plain Markdown that is readable where the source is, too; MyST's directives are for what Markdown cannot
do: the order of the pages, and texts that stand elsewhere in the repository (see ``_ext/outside.py``).
"""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]

from fastdist import __version__  # noqa: E402

project = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
release = version = __version__
copyright = author  # noqa: A001  (Sphinx calls it that)

extensions = ["myst_parser", "outside"]
exclude_patterns = ["_ext"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_heading_anchors = 4  # with the names that forges give them
nitpicky = True

html_theme = "furo"
html_title = f"{project} {version}"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "source_view_link": "",
    "top_of_page_buttons": [],
    "navigation_with_keys": True,
}
pygments_style = "default"
pygments_dark_style = "monokai"
