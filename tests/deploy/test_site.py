"""The documentation is built without a warning, and what came out is whole: pages, links, anchors, pictures."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from dockerfile import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))
LOADED = {"link": "href", "script": "src", "img": "src", "source": "srcset", "iframe": "src", "object": "data"}


class Page(HTMLParser):
    """What a page links to, what it loads, and what in it can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.ids.add(named.get("id"))
        if tag == "a" and named.get("href"):
            self.links.append(named["href"])
        if tag in LOADED and named.get(LOADED[tag]):
            self.loaded.append(named[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    recipe = re.search(r"^docs: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    (command,) = re.findall(r"-m sphinx (.*)", recipe)
    assert "--fail-on-warning" in command
    words = command.replace("build/doctrees", str(folder / "doctrees")).replace("build/docs", str(folder / "html"))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_in_the_contents(pages):
    listed = {urlsplit(link).path for link in pages["index.html"].links}
    assert {f"{name}.html" for name in PAGES} - listed - {"index.html"} == set()


def test_links_and_anchors_lead_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = (site / name).parent / unquote(parts.path) if parts.path else site / name
            target = there.resolve().relative_to(site.resolve()).as_posix()
            ids = pages[target].ids if target in pages else set()
            if not there.exists() or (parts.fragment and unquote(parts.fragment) not in ids):
                broken.append((name, link))
    assert broken == []


def test_site_loads_only_its_own_files(site, pages):
    for name, page in pages.items():
        for source in page.loaded:
            parts = urlsplit(source)
            assert not parts.netloc, (name, source)
            assert parts.scheme in {"", "data"}, (name, source)
            assert parts.scheme or ((site / name).parent / unquote(parts.path)).exists(), (name, source)
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", path.read_text()), path


def test_site_includes_the_shared_texts(site):
    for document, page in (
        ("CHANGELOG.md", "changelog"),
        ("CONTRIBUTING.md", "contributing"),
        ("SECURITY.md", "security"),
        ("bench/README.md", "measuring"),
    ):
        title = re.search(r"^# (.*)$", (ROOT / document).read_text(), re.MULTILINE)[1]
        assert f"<h1>{title}" in (site / f"{page}.html").read_text()
    results = Page(site / "performance.html").ids
    assert "results" in results
    assert "results" not in Page(site / "measuring.html").ids
    assert "how-it-compares-in-kind" in Page(site / "index.html").ids


# -------------------------------------------------------------------------------------------- texts from outside, alone


@pytest.fixture(scope="module")
def outside():
    spec = importlib.util.spec_from_file_location("outside", DOCS / "_ext" / "outside.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("see [that](../SECURITY.md#fuzzing)", "see [that](security.md#fuzzing)"),
        ("see [that](architecture.md#health)", "see [that](architecture.md#health)"),
        ("see [all](../deploy/systemd)", "see all"),
        ("see [there](https://example.org/a)", "see [there](https://example.org/a)"),
        ("`code` [results](../bench/README.md#results)", "`code` [results](performance.md#results)"),
        ("[how](../bench/README.md#the-race)", "[how](measuring.md#the-race)"),
        ("```sh\n[left](../SECURITY.md)\n```", "```sh\n[left](../SECURITY.md)\n```"),
    ],
)
def test_outgoing_links_lead_to_its_pages(outside, text, becomes):
    page = DOCS / "operations.md"
    assert outside.rewrite(text, page, page) == becomes


def test_included_links_are_relative_to_page(outside):
    source, page = ROOT / "bench" / "README.md", DOCS / "performance.md"
    assert outside.rewrite("[x](#results)", source, page) == "[x](#results)"
    assert outside.rewrite("[x](#the-race)", source, page) == "[x](measuring.md#the-race)"
    assert outside.rewrite("[x](express/app.js)", source, page) == "[x](../bench/express/app.js)"
    assert outside.rewrite("![x](../docs/top.svg)", source, page) == "![x](top.svg)"


def test_missing_picture_becomes_a_note(outside):
    source, page = ROOT / "bench" / "README.md", DOCS / "performance.md"
    assert "not drawn yet: the race" in outside.rewrite("![the race](../docs/not-there.svg)", source, page)
    html = (
        '<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="../docs/{dark}.svg">\n'
        '  <img alt="the race" src="../docs/{light}.svg">\n</picture>'
    )
    made = outside.rewrite(html.format(dark="not-there", light="not-there"), source, page)
    assert "not drawn yet: the race" in made
    assert "<" not in made
    made = outside.rewrite(html.format(dark="send", light="top"), source, page)
    assert "```{image} top.svg\n:alt: the race\n:class: only-light\n```" in made
    assert "```{image} send.svg\n:alt: the race\n:class: only-dark\n```" in made
