"""The dashboard's files: what is served, how, and that they keep to the policy they are served with."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import orjson
import pytest

import fastdist
from fastdist._core import RequestHead
from fastdist.http import static, stats
from fastdist.http.api import Api
from fastdist.settings import Config
from fastdist.shm.block import SharedBlock
from fastdist.shm.snapshot import Snapshot

FOLDER = Path(fastdist.__file__).parent / "http" / "dashboard"
PATHS = {"/" if file.name == "index.html" else f"/dashboard/{file.name}": file for file in sorted(FOLDER.iterdir())}
INDEX = (FOLDER / "index.html").read_text()
TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


@pytest.fixture(scope="module")
def snapshot():
    block = SharedBlock.create(1, 8)
    os.close(block.fd)  # the mapping stays
    return Snapshot(block, Config(), dict(enumerate(Config().analyzers)), "1")


@pytest.fixture(scope="module")
def api(snapshot):
    return Api(lambda: snapshot)


def ask(api, method, path, **headers):
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode()
    return api.respond(method, path, RequestHead(head).fields, b"")


def headers_of(response):
    lines = response.headers.decode().split("\r\n")
    assert lines.pop() == ""
    return dict(line.split(": ", 1) for line in lines)


# ---- serving


@pytest.mark.parametrize("path", PATHS)
def test_every_file_is_served_as_what_it_is(api, path):
    response = ask(api, "GET", path)
    headers = headers_of(response)
    kind, _, charset = headers["Content-Type"].partition("; ")
    assert response.status == 200
    assert response.body == PATHS[path].read_bytes()
    assert kind == TYPES[PATHS[path].suffix]
    assert charset == ("charset=utf-8" if kind.startswith("text/") else "")
    assert dict(each.split(" ", 1) for each in headers["Content-Security-Policy"].split("; ")) == POLICY
    assert headers["Cache-Control"] == "no-cache"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_nothing_else_is_served():
    assert static.pages().keys() == PATHS.keys()


@pytest.mark.parametrize("path", PATHS)
def test_files_can_be_looked_at_and_no_more(api, path):
    assert ask(api, "HEAD", path) == ask(api, "GET", path)  # who writes it leaves the body out
    assert headers_of(ask(api, "OPTIONS", path))["Allow"] == "GET, HEAD, OPTIONS"
    for method in ("POST", "PUT", "DELETE"):
        response = ask(api, method, path)
        assert response.status == 405
        assert headers_of(response)["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        "/dashboard",
        "/dashboard/",
        "/dashboard/nothing.js",
        "/dashboard/index.html",
        "/dashboard/{file}",
        "/dashboard/../api.py",
        "/dashboard/%2e%2e/api.py",
        "/dashboard//app.js",
        "/dashboard/app.js/",
        "/index.html",
        "//",
    ],
)
def test_nothing_is_at_any_other_path(api, method, path):
    response = ask(api, method, path)
    assert response.status == 404
    assert orjson.loads(response.body)["status"] == 404


def test_the_query_is_no_part_of_a_file(api):
    assert ask(api, "GET", "/?x=/dashboard/app.js") == ask(api, "GET", "/")


@pytest.mark.parametrize("path", PATHS)
def test_cached_page_is_not_sent_again(api, path):
    fresh = ask(api, "GET", path)
    tag = headers_of(fresh)["ETag"]
    assert re.fullmatch('"[0-9a-f]{32}"', tag)
    for held in (tag, f"W/{tag}", f'"other", {tag}', f'"a" , W/"b",\t{tag}', "*"):
        for method in ("GET", "HEAD"):
            response = ask(api, method, path, If_None_Match=held)
            assert (response.status, response.body) == (304, b"")
            assert response.headers == fresh.headers
    for other in ('"other"', tag.strip('"'), f"{tag[:-1]}0", "", "W/*", '"*"'):
        assert ask(api, "GET", path, If_None_Match=other) == fresh


def test_different_files_differ_in_tags():
    tags = {page.etag for page in static.pages().values()}
    assert len(tags) == len(PATHS)


# ---- what they are made of


class Elements(HTMLParser):
    """All elements of a page: (name, attributes, text directly within)."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))

    def handle_data(self, data):
        if self.found:
            self.found[-1][2].append(data)


ELEMENTS = Elements(INDEX).found


def test_the_page_has_nothing_inline():
    for tag, attributes, text in ELEMENTS:
        assert tag != "style"
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "script" or not "".join(text).strip()


def test_everything_the_page_names_is_there():
    links = [value for _, attributes, _ in ELEMENTS for name, value in attributes.items() if name in ("src", "href")]
    views = {"health", "ready", "stats", "queue", "analyzers", "dead-letters", "metrics", "openapi.json"}
    ids = {attributes["id"] for _, attributes, _ in ELEMENTS if "id" in attributes}
    assert len(links) > 10
    for link in links:
        # Relative, so that the page also works behind a proxy that has it below a path.
        assert link in views or f"/{link}" in PATHS or link.removeprefix("#") in ids, link


@pytest.mark.parametrize("path", [path for path in PATHS if path.endswith(".js")])
def test_script_imports_exist_and_no_markup(path):
    source = PATHS[path].read_text()
    imported = re.findall(r'\bfrom "(.+?)"', source)
    assert len(imported) == len(re.findall(r"^import\b", source, re.MULTILINE))
    assert {f"/dashboard/{name.removeprefix('./')}" for name in imported} <= PATHS.keys()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|import\(", source
    )


@pytest.mark.parametrize("path", PATHS)
def test_nothing_comes_from_elsewhere(path):
    text = PATHS[path].read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"(?<![\\/:])//\w|https?://|@import|url\(", re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE))


def test_the_figures_the_page_shows_exist(snapshot):
    documents = {
        "health": msgspec.to_builtins(stats.health(snapshot)),
        "stats": msgspec.to_builtins(stats.stats(snapshot)),
        "queue": msgspec.to_builtins(stats.queue(snapshot)),
    }
    formats = set(re.findall(r"^export (?:const|function) (\w+)", (FOLDER / "format.js").read_text(), re.MULTILINE))
    shown = [attributes for _, attributes, _ in ELEMENTS if "data-figure" in attributes]
    assert len(shown) > 25
    for attributes in shown:
        name, _, path = attributes["data-figure"].partition(":")
        value = documents[name]
        for key in path.split("."):
            assert key in value, attributes
            value = value[key]
        assert attributes.get("data-as", "count") in formats


def test_every_packet_count_is_shown(snapshot):
    shown = {attributes.get("data-figure") for _, attributes, _ in ELEMENTS}
    assert {f"stats:packets.{name}" for name in msgspec.to_builtins(stats.stats(snapshot).packets)} <= shown


def test_no_script_is_too_long_to_read():
    for path, file in PATHS.items():
        assert not path.endswith(".js") or len(file.read_text().splitlines()) <= 500
