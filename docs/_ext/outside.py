"""Text from elsewhere in the repository, such as README.md: its links and pictures, as the site has them.

Documents link to each other by their paths in the repository, so that the links work where the source is read. Some of
these paths are no pages of the site, though their text is part of one. The rules:

- A link to such a document leads to the page that has its text (``PAGES``); a link into a directory becomes its text;
  one to any other file has that file handed out with the site, which Sphinx does.
- Links of an included text are relative to where it stands, and are made relative to the page it is included in.
- ``<picture>`` becomes a picture for light and one for dark pages. A picture that was not drawn yet becomes a note, so
  that the site can be built before the plots of a race are there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bench/README.md": "measuring.md",
}
RESULTS = "performance.md"  # has this part of bench/README.md
IN_RESULTS = ("", "results")

FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1`*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|!?\[[^\[\]]*\](?:\([^()]*\))?)*)\]\((?P<target>[^()\s]+)\)")
PICTURE = re.compile(r"<picture>.*?</picture>", re.DOTALL)
IMAGE = re.compile(r"<img\b[^>]*>")


def rewrite(text: str, source: Path, page: Path) -> str:
    """Return Markdown of ``source`` that is part of ``page``, with links and pictures as the site has them."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [_prose(text[end : fence.start()], source, page), fence[0]]
        end = fence.end()
    return "".join([*parts, _prose(text[end:], source, page)])


def _prose(text: str, source: Path, page: Path) -> str:
    text = PICTURE.sub(lambda match: _picture(match[0], source, page), text)
    text = IMAGE.sub(lambda match: _image(_attribute(match[0], "src"), match[0], source, page), text)
    return LINK.sub(lambda match: _link(match, source, page), text)


def _link(match: re.Match[str], source: Path, page: Path) -> str:
    mark, text, target = match["mark"], match["text"], match["target"]
    if not mark and "](" in text:  # a picture that is a link
        text = LINK.sub(lambda inner: _link(inner, source, page), text)
    if re.match(r"[a-z]+:", target):
        return f"{mark}[{text}]({target})"
    path, _, anchor = target.partition("#")
    there = (source.parent / path).resolve() if path else source
    if mark and not there.exists():
        return f"*(not drawn yet: {text})*"
    if there.is_dir():
        return text
    there = _page(there, anchor)
    where = "" if there == page and anchor else os.path.relpath(there, page.parent)
    return f"{mark}[{text}]({where}{'#' if anchor else ''}{anchor})"


def _page(path: Path, anchor: str) -> Path:
    """Return the page that has the text of a file; the file itself if none has."""
    name = os.path.relpath(path, ROOT)
    if name == "bench/README.md" and anchor in IN_RESULTS:
        return DOCS / RESULTS
    return DOCS / PAGES[name] if name in PAGES else path


def _picture(html: str, source: Path, page: Path) -> str:
    """Return a picture of each kind of page."""
    image = IMAGE.search(html)
    if not image:
        return ""
    dark = re.search(r"<source\b[^>]*dark[^>]*>", html)
    if not dark:
        return _image(_attribute(image[0], "src"), image[0], source, page)
    light_one = _image(_attribute(image[0], "src"), image[0], source, page, "only-light")
    return light_one + _image(_attribute(dark[0], "srcset"), image[0], source, page, "only-dark")


def _image(target: str, html: str, source: Path, page: Path, kind: str = "") -> str:
    description = " ".join(_attribute(html, "alt").split())
    file = (source.parent / target).resolve()
    if not file.exists():
        return f"\n*(not drawn yet: {description or target})*\n"
    options = [f":alt: {description}"] if description else []
    options += [f":class: {kind}"] if kind else []
    return "\n".join(["", f"```{{image}} {os.path.relpath(file, page.parent)}", *options, "```", ""])


def _attribute(html: str, name: str) -> str:
    found = re.search(rf'\b{name}="([^"]*)"', html)
    return found[1] if found else ""


def _page_read(app: Sphinx, docname: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(docname))
    content[0] = rewrite(content[0], page, page)


def _include_read(app: Sphinx, relative_path: Path, _parent: str, content: list[str]) -> None:
    source = (Path(app.srcdir) / relative_path).resolve()
    if source.suffix == ".md":
        content[0] = rewrite(content[0], source, Path(app.env.doc2path(app.env.docname)))


def setup(app: Sphinx) -> dict[str, bool]:
    """Have Sphinx call this for every page, and every text that is included."""
    app.connect("source-read", _page_read)
    app.connect("include-read", _include_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
