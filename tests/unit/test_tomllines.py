"""On which line a setting stands: of any document that the standard library's parser accepts."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdist.tomllines import lines

DOCUMENT = """\
# a comment [not.a.table]
title = "a [b] = c # no comment"

[server]  # [x]
port = 3000
host."a.b" = 'x = 1'
text = \"\"\"
port = 1
[server]
\"\"\" # here it ends
list = [ # of three
  1,
  [2, { deep = 1 },
  ], "]",
]

[[analyzers]]
id = "A1"
[[analyzers]]
id = "A2"
endpoint = "http://h/"
[analyzers.headers]
key = '''
two lines'''
weight = 2026-01-02 03:04:05
[a."b c".d]
e = true
"""


def test_each_key_has_its_line():
    tomllib.loads(DOCUMENT)
    assert lines(DOCUMENT) == {
        "title": 2,
        "server": 4,
        "server.port": 5,
        "server.host": 6,
        'server.host."a.b"': 6,
        "server.text": 7,
        "server.list": 11,
        "server.list[0]": 12,
        "server.list[1]": 13,
        "server.list[1][0]": 13,
        "server.list[1][1]": 13,
        "server.list[1][1].deep": 13,
        "server.list[2]": 14,
        "analyzers": 17,
        "analyzers[0]": 17,
        "analyzers[0].id": 18,
        "analyzers[1]": 19,
        "analyzers[1].id": 20,
        "analyzers[1].endpoint": 21,
        "analyzers[1].headers": 22,
        "analyzers[1].headers.key": 23,
        "analyzers[1].headers.weight": 25,
        'a."b c".d': 26,
        'a."b c".d.e': 27,
    }


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# x", "a = ", "a = [1", "= 1", "[", '"\\U0001F600" = 1', "a = [" * 10000]
)
def test_what_cannot_be_followed_ends_it(text):
    assert set(lines(text)) <= {"a", *(f"a{'[0]' * number}" for number in range(10000))}


KEYS = st.from_regex(r"[A-Za-z0-9_-]{1,5}", fullmatch=True) | st.text("ab.[]=# \"'\\\té", min_size=1, max_size=4)
TEXTS = st.text("ab\"'\\#=[]{},. \té", max_size=8)
VALUES = st.recursive(
    st.integers(-9, 9) | st.booleans() | TEXTS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def written(value):
    """Return a value as TOML, on several lines where that is allowed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[\n" + "".join(f"# ]\n{written(each)},\n" for each in value) + "]"
    return json.dumps(value)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=3))
def test_every_key_is_found_on_its_line(table, tables):
    text = "[one]\n" + "".join(f"{json.dumps(key)} = {written(value)}\n" for key, value in table.items())
    for each in tables:
        text += "[[many]]\n" + "".join(f"{json.dumps(key)} = {written(value)}\n" for key, value in each.items())
    tomllib.loads(text)
    found, rows = lines(text), text.splitlines()
    for prefix, each in [("one", table), *((f"many[{number}]", each) for number, each in enumerate(tables))]:
        for key in each:
            bare = key if all(c.isascii() and (c.isalnum() or c in "_-") for c in key) else json.dumps(key)
            row = rows[found[f"{prefix}.{bare}"] - 1]
            assert row.startswith(f"{json.dumps(key)} = ") or json.dumps(key) in row
