"""The pages of docs/agents/: each request that they show becomes the packet behind it, and every page has one."""

from __future__ import annotations

import json
import re

import pytest
from agents import convert, packets
from test_docs import DOCS

from fastdist.protocols.table import PROTOCOLS

PAGES = sorted((DOCS / "agents").glob("*.md"))
SHOWN = re.compile(
    r"^```http\n(\w+) (\S+) HTTP/1\.1\n(.*?)\n\n(.*?)^```\n+```json\n(.*?)^```", re.MULTILINE | re.DOTALL
)
EXAMPLES = [(page.stem, *shown) for page in PAGES for shown in SHOWN.findall(page.read_text())]


def test_every_page_shows_what_arrives():
    assert {example[0] for example in EXAMPLES} == {page.stem for page in PAGES} - {"index"}
    assert len(EXAMPLES) == sum(page.read_text().count("```http\n") for page in PAGES)


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{each[0]} {each[2]}" for each in EXAMPLES])
def test_what_is_sent_becomes_what_arrives(example):
    _, method, target, lines, body, arrives = example
    headers = dict(line.split(": ", 1) for line in lines.splitlines())
    batch = convert(target, body.encode(), method=method, **{name.replace("-", "_"): headers[name] for name in headers})
    assert packets(batch) == [json.loads(arrives)]


def test_all_pages_are_in_the_table():
    text = (DOCS / "agents" / "index.md").read_text()
    assert {f"{page.stem}.md" for page in PAGES} - {"index.md"} <= set(re.findall(r"\]\((\w[\w-]*\.md)\)", text))
    (heads,) = re.findall(r"^\| \| (`/ingest`.*) \|$", text, re.MULTILINE)
    assert len(heads.split("|")) == len(PROTOCOLS)
