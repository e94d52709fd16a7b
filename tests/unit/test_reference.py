"""The reference pages are complete and true: settings, requests, commands, each with all that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from openapi_description import PATHS
from test_docs import commands

from fastdist.cli import main

ROOT = Path(__file__).parent.parent.parent
API_PAGE = (ROOT / "docs" / "api.md").read_text()
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text()


def sections(text, level):
    """Return {heading: what stands below it, up to the next of its level or above}, without backticks."""
    headings = list(re.finditer(rf"^#{{1,{level}}} (.*)$", text, re.MULTILINE))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    mark = "#" * level + " "
    return {
        heading[1].strip("`"): text[heading.end() : end]
        for heading, end in zip(headings, ends, strict=True)
        if heading[0].startswith(mark)
    }


def table(text, heading):
    """Return the rows of the table whose first column is called ``heading``, as lists of cells."""
    found = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-| ]+\|\n((?:\|.*\n?)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()] if found else []


# ----------------------------------------------------------------------------------------------------------------- API


def operations():
    return {
        (method.upper(), path): {int(status) for status in operation["responses"]}
        for path, methods in PATHS.items()
        for method, operation in methods.items()
        if method in {"get", "head", "options", "post", "patch", "delete", "put"}
    }


REQUESTS = operations()
OWN = [request for request in REQUESTS if request[0] not in {"HEAD", "OPTIONS"}]


def statuses(text):
    return {int(status) for row in table(text, "status") for status in row[0].split(",")}


IN_COMMON = statuses(sections(API_PAGE, 2)["What all have in common"])


def test_table_and_sections_are_complete():
    assert [row[0].strip("`") for row in table(API_PAGE, "request")] != []
    assert {row[0].strip("`") for row in table(API_PAGE, "request")} == {" ".join(request) for request in OWN}
    found = {heading for heading in sections(API_PAGE, 2) if re.match("[A-Z]+ /", heading)}
    assert found == {" ".join(request) for request in OWN}


@pytest.mark.parametrize("request_", OWN, ids=" ".join)
def test_section_has_each_status_and_example(request_):
    parts = API_PAGE.split(f"\n## {' '.join(request_)}\n")
    text = re.split(r"^## ", parts[1], maxsplit=1, flags=re.MULTILINE)[0]
    shown = statuses(text)
    assert shown | IN_COMMON == REQUESTS[request_]
    assert "$ curl" in text


def test_what_is_common_is_common_to_all():
    assert frozenset.intersection(*map(frozenset, REQUESTS.values())) == IN_COMMON


def test_head_and_options_match_the_page():
    for (method, path), found in REQUESTS.items():
        if method == "HEAD":
            assert found == REQUESTS["GET", path]
        if method == "OPTIONS":
            assert found == IN_COMMON | {204} | ({404} if "{" in path else set())
    getters = {path for method, path in REQUESTS if method == "GET"}
    assert getters == {path for method, path in REQUESTS if method == "HEAD"}
    assert {path for _, path in REQUESTS} == {path for method, path in REQUESTS if method == "OPTIONS"}


# ------------------------------------------------------------------------------------------------------------ commands


COMMANDS = commands()


def test_every_command_has_its_section():
    assert [heading for heading in sections(COMMANDS_PAGE, 2) if heading.startswith("fastdist ")] == [
        f"fastdist {name}" for name in COMMANDS
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_section_has_each_option_and_default(name):
    text = sections(COMMANDS_PAGE, 2)[f"fastdist {name}"]
    shown = {tuple(re.findall(r"`(-[\w-]+)", row[0])): row for row in table(text, "option")}
    options = {tuple(each.opts): each for each in COMMANDS[name].params if each.param_type_name == "option"}
    assert list(shown) == list(options)
    for names, option in options.items():
        takes_value, default = "`" in shown[names][0] and " " in shown[names][0].split("`")[1], shown[names][1]
        assert takes_value != option.is_flag
        if option.default is None or option.is_flag:
            assert "`" not in default
        else:
            assert default == f"`{option.default}`"
    usage = re.search(r"```text\n(.*)\n```", text)[1]
    arguments = [each.metavar for each in COMMANDS[name].params if each.param_type_name == "argument"]
    assert usage == " ".join(["fastdist", name, *arguments, *(["[options]"] if options else [])])


def test_options_of_the_root_are_all_there():
    shown = {row[0].strip("`") for row in table(COMMANDS_PAGE, "option of `fastdist` itself")}
    root = typer.main.get_command(main.app)
    assert shown == {opt for each in root.params for opt in each.opts}
