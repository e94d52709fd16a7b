"""The reference pages are complete and true: settings, requests, commands, each with all that the code has."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import msgspec
import pytest
import typer
from test_docs import commands

import fastdist
from fastdist import config
from fastdist.cli import main
from fastdist.config import Config

ROOT = Path(__file__).parent.parent.parent
SETTINGS_PAGE = (ROOT / "docs" / "settings.md").read_text()
API_PAGE = (ROOT / "docs" / "api.md").read_text()
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text()
DESCRIPTION = json.loads((Path(fastdist.__file__).parent / "http" / "openapi.json").read_text())


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


# ------------------------------------------------------------------------------------------------------------ settings


def settings():
    """Return {path: its annotation} of every setting, those of an analyzer as ``analyzers[].key``, in order."""
    found = {}
    for section in msgspec.structs.fields(Config):
        prefix, kind = ("analyzers[]", config.Analyzer) if section.name == "analyzers" else (section.name, section.type)
        found |= {f"{prefix}.{field.name}": field.type for field in msgspec.structs.fields(kind)}
    return found


KINDS = settings()
SETTINGS = {path: table(text, "type")[0] for path, text in sections(SETTINGS_PAGE, 3).items()}


def meta(path):
    kind = KINDS[path]
    return get_args(kind)[1] if hasattr(kind, "__metadata__") else msgspec.Meta()


def test_every_setting_has_its_section_in_order():
    assert list(SETTINGS) == list(KINDS)


def test_the_defaults_are_those_of_the_code(tmp_path):
    defaults = {path: cells[1] for path, cells in SETTINGS.items() if not path.startswith("analyzers")}
    (tmp_path / "page.toml").write_text("".join(f"{path} = {cell.strip('`')}\n" for path, cell in defaults.items()))
    loaded = config.load(tmp_path / "page.toml", {}, {})
    assert loaded.config == Config()
    assert all(origin.startswith("file") for path, origin in loaded.sources.items() if path != "analyzers")
    for field in msgspec.structs.fields(config.Analyzer):
        shown = SETTINGS[f"analyzers[].{field.name}"][1]
        assert shown == ("required" if field.required else f'`"{field.default}"`')


@pytest.mark.parametrize("path", KINDS)
def test_the_type_is_that_of_the_setting(path):
    shown, kind = SETTINGS[path][0], KINDS[path]
    if get_origin(kind) is Literal:
        assert shown == "one of"
    elif get_origin(kind) is tuple:
        assert shown.startswith("list of")
    else:
        base = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
        units = {config.units.format_duration: "duration", config.units.format_size: "size"}
        unit = units.get((meta(path).extra or {}).get("show")) or ("number" if base in {int, float} else None)
        assert shown.split(",")[0] == unit if unit else shown in {"text", "URL", "path", "path or URL", "address"}


@pytest.mark.parametrize("path", KINDS)
def test_the_range_is_that_of_the_setting(path):
    shown, bounds = SETTINGS[path][2], meta(path)
    if get_origin(KINDS[path]) is Literal:
        assert re.findall(r"`(\w+)`", shown) == list(get_args(KINDS[path]))
    elif bounds.ge is not None:
        show = (bounds.extra or {}).get("show", str)
        least, most = show(bounds.ge), None if bounds.le is None else show(bounds.le)
        assert shown == (f"{least} or more" if most is None else f"{least} to {most}")
    else:
        assert shown


def changed(path):
    """Return a configuration in which the setting has another value than by default."""
    section, _, key = path.partition(".")
    if section == "analyzers[]":
        other = {"weight": 7.0, "id": "other", "endpoint": "http://127.0.0.1:1/", "health": "/other"}[key]
        first = msgspec.structs.replace(Config().analyzers[0], **{key: other})
        return msgspec.structs.replace(Config(), analyzers=(first, *Config().analyzers[1:]))
    before = getattr(getattr(Config(), section), key)
    values = {float: math.nan, int: -1, str: "other", tuple: ("other",)}
    after = msgspec.structs.replace(getattr(Config(), section), **{key: values[type(before)]})
    return msgspec.structs.replace(Config(), **{section: after})


@pytest.mark.parametrize("path", KINDS)
def test_what_a_change_takes_is_what_a_reload_says(path):
    needs_restart = path in config.reloadable(Config(), changed(path))
    shown = SETTINGS[path][3]
    if path in {"security.tls_cert", "security.tls_key"}:  # see Changes.take_over
        assert not needs_restart
        assert shown == "reload; on or off: restart"
    else:
        assert shown == ("restart" if needs_restart else "reload")


def test_every_setting_is_explained():
    for path, text in sections(SETTINGS_PAGE, 3).items():
        assert len(text.split("\n\n", 2)[2].split()) >= 5, path


# ----------------------------------------------------------------------------------------------------------------- API


def operations():
    return {
        (method.upper(), path): {int(status) for status in operation["responses"]}
        for path, methods in DESCRIPTION["paths"].items()
        for method, operation in methods.items()
        if method in {"get", "head", "options", "post", "patch", "delete", "put"}
    }


REQUESTS = operations()
OWN = [request for request in REQUESTS if request[0] not in {"HEAD", "OPTIONS"}]


def statuses(text):
    return {int(status) for row in table(text, "status") for status in row[0].split(",")}


IN_COMMON = statuses(sections(API_PAGE, 2)["What all have in common"])


def test_the_table_and_the_sections_have_every_request():
    assert [row[0].strip("`") for row in table(API_PAGE, "request")] != []
    assert {row[0].strip("`") for row in table(API_PAGE, "request")} == {" ".join(request) for request in OWN}
    found = {heading for heading in sections(API_PAGE, 2) if re.match("[A-Z]+ /", heading)}
    assert found == {" ".join(request) for request in OWN}


@pytest.mark.parametrize("request_", OWN, ids=" ".join)
def test_a_section_has_every_status_and_an_example(request_):
    parts = API_PAGE.split(f"\n## {' '.join(request_)}\n")
    text = re.split(r"^## ", parts[1], maxsplit=1, flags=re.MULTILINE)[0]
    shown = statuses(text)
    assert shown | IN_COMMON == REQUESTS[request_]
    assert "$ curl" in text


def test_what_is_common_is_common_to_all():
    assert frozenset.intersection(*map(frozenset, REQUESTS.values())) == IN_COMMON


def test_head_and_options_are_as_the_page_says():
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
def test_a_section_has_every_option_with_its_default(name):
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


def test_the_options_of_the_root_are_all_there():
    shown = {row[0].strip("`") for row in table(COMMANDS_PAGE, "option of `fastdist` itself")}
    root = typer.main.get_command(main.app)
    assert shown == {opt for each in root.params for opt in each.opts}
