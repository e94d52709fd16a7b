"""The documentation agrees with the code: settings, paths, commands, modules, links."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

import msgspec
import pytest
import typer
from stream_exposition import stream_exposition

import fastdist
from fastdist import config, facts
from fastdist._core import FIELDS
from fastdist.cli import main
from fastdist.http.api import Api
from fastdist.protocols.table import PROTOCOLS
from fastdist.settings import Config

ROOT = Path(__file__).parent.parent.parent
PACKAGE = Path(fastdist.__file__).parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
EXAMPLE = ROOT / "fastdist.example.toml"
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "bench" / "README.md"])
NAMES = {path: path.relative_to(ROOT).as_posix() for path in DOCUMENTS}


def rows(text, heading):
    """Return the rows of the table whose first column is called ``heading``, as lists of cells."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, f"no table of {heading}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


FENCED = re.compile(r"^ *```[^`\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def code(text):
    """Return all code of a document: what stands between fences, and in backticks."""
    return "\n".join([*FENCED.findall(text), *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))])


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_variables_that_are_named_exist():
    known = config._VARIABLES.keys() | {"FASTDIST_CONFIG", "FASTDIST_TOKEN", "FASTDIST_BUILD", "FASTDIST_CHAOS"}
    known |= {Config().jetstream.dead_stream, Config().jetstream.bucket}  # which look like some
    for document in DOCUMENTS:
        named = re.findall(r"\b(?:PORT|WORKER_COUNT|FASTDIST_\w+)\b", document.read_text())
        assert {name for name in named if not name.endswith("__")} <= known, NAMES[document]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_the_settings_that_are_named_exist(document):
    sections = "|".join(field.name for field in msgspec.structs.fields(Config) if field.name != "analyzers")
    named = re.findall(rf"`((?:{sections})\.\w+)`", document.read_text())
    modules = {path.name for path in PACKAGE.iterdir()}
    assert set(named) - modules <= set(facts.SETTINGS)


# ----------------------------------------------------------------------------------------------- API, metrics, commands


def routes():
    api = Api(lambda: None)
    agents = {route.path: route.methods for protocol in PROTOCOLS for route in protocol.routes}
    return {
        f"{method} {path}"
        for table in (api.routes, api.ELSEWHERE, agents)
        for path, methods in table.items()
        for method in methods
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_the_requests_that_are_named_exist(document):
    named = re.findall(
        r"\b(GET|POST|PATCH|PUT|DELETE) (/(?!control|analyze\b)[\w/{}-]*(?:\.json)?)", document.read_text()
    )
    assert {f"{method} {path}" for method, path in named} <= routes()


def test_the_metrics_that_are_named_exist():
    names = set(re.findall(r"^(?:# TYPE )?(fastdist_\w+)", stream_exposition(), re.MULTILINE))
    beginnings = {name[: at + 1] for name in names for at, character in enumerate(name) if character == "_"}
    for document in DOCUMENTS:
        named = re.findall(r"\bfastdist_[a-z_]+\b", document.read_text())
        assert set(named) <= names | beginnings, NAMES[document]  # fastdist_queue_*: all of these


def test_excerpt_has_the_counters_of_stats():
    shown = re.search(r'"packets": \{(.*?)\}', README, re.DOTALL)
    assert shown
    known = {"received", "rejected", "delivered", "queued", "inFlight", "deadLettered", *FIELDS}
    assert set(re.findall(r'"(\w+)":', shown[1])) <= known


def commands():
    """Return {"queue verify": command} of the command line."""
    found = {}
    for name, command in typer.main.get_command(main.app).commands.items():
        within = getattr(command, "commands", None)
        found |= {f"{name} {sub}": each for sub, each in within.items()} if within else {name: command}
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_named_commands_and_options_exist(document):
    known = commands()
    groups = {name.split()[0] for name in known if " " in name}
    for line in code(document.read_text()).splitlines():
        used = re.search(r"(?:^|/|\s)fastdist ([a-z].*)", line.split("#")[0])
        if not used:
            continue
        words = used[1].split()
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
        assert name or (len(words) == 1 and words[0] in groups), line
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert not name or options <= {option for parameter in known[name].params for option in parameter.opts}, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_named_targets_of_make_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^([a-z][\w -]*):", makefile, re.MULTILINE) for name in line.split()}
    assert set(re.findall(r"\bmake ([a-z]\w*)", code(document.read_text()))) <= targets


# -------------------------------------------------------------------------------------------- modules, packages, links


def test_every_package_of_ours_is_described():
    described = {row[0].strip("`/") for row in rows(ARCHITECTURE, "`src/fastdist`")[2:]}
    assert described == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_every_part_of_the_core_is_described():
    described = [row[0].strip("`") for row in rows(ARCHITECTURE, "part of the core")]
    assert described == re.findall(r'^include "(.*)"$', (PACKAGE / "_core.pyx").read_text(), re.MULTILINE)


def test_each_required_package_has_a_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [entry for group in project["dependency-groups"].values() for entry in group if isinstance(entry, str)]
    extras = chain(*project["project"]["optional-dependencies"].values())
    needed = [*project["project"]["dependencies"], *extras, *groups, *project["build-system"]["requires"]]
    tables = [rows(ARCHITECTURE, heading) for heading in ("at run time", "to build and test", "to measure")]
    explained = {name for row in chain(*tables) for name in re.findall(r"`([\w.-]+)`", row[0])}
    assert {re.split(r"[<>=~ \[]", entry)[0] for entry in needed} == explained


def slug(heading):
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


def anchors(document):
    return {slug(heading) for heading in re.findall(r"^#+ (.*)", document.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_links_lead_somewhere(document):
    text = FENCED.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES.get)
def test_the_modules_that_are_named_exist(document):
    named = set(re.findall(r"\btests/[\w/]+\.py\b|(?<=`)[\w/]+\.py(?=`)", document.read_text()))
    gone = {name for name in named if not (ROOT / name).exists() and not (PACKAGE / name).exists()}
    if document.name == "architecture.md":
        assert not gone
    else:  # tests and benchmarks go by their names
        files = {path.name for folder in ("src", "tests", "bench") for path in (ROOT / folder).rglob("*.py")}
        assert gone <= files | {"analyzer.py"}  # one that quickstart.md has its readers write


def test_docs_name_nothing_of_one_machine():
    for document in [*DOCUMENTS, EXAMPLE]:
        assert not re.search(r"(?<![\w.:])/(?:home|root|work|tmp)/", document.read_text()), document
