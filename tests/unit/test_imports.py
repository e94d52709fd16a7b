"""Modules stand in an order, each imports only from those above it: no cycles, and a reader can start at the top."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fastdist

PACKAGE = Path(fastdist.__file__).parent
ORDER = [
    "early",
    "errors",
    "logs",
    "units",
    "tomlfile",
    "config",
    "_core",
    "timeouts",
    "names",
    "sockets",
    "tls",
    "packet",
    "shared",
    "shares",
    "histograms",
    "snapshot",
    "filelocks",
    "deadletters",
    "queuefiles",
    "queueview",
    "sync",
    "takeover",
    "deadletter_writer",
    "upkeep",
    "forward",
    "probation",
    "outcomes",
    "dispatch",
    "health",
    "stats",
    "metrics",
    "control",
    "admin",
    "pages",
    "api",
    "ingest",
    "worker",
    "keeper",
    "changes",
    "systemd",
    "supervisor",
    "posting",
    "replay",
    "console",
    "lines",
    "packing",
    "offsets",
    "rotation",
    "logfile",
    "sending",
    "sendview",
    "observed",
    "topview",
    "watching",
    "effective",
    "commands",
    "clients",
    "cli",
    "__main__",
]
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
CORE = [PACKAGE / "_core.pyx", PACKAGE / "_core.pyi", *sorted((PACKAGE / "core").iterdir())]


def outside_functions(node):
    """Yield a module's nodes but for what stands in functions, which is only run when all modules are there."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from outside_functions(child)


def imported_by(source, package="fastdist"):
    """Return the dotted names a module's text imports, what it takes from a package included."""
    names = set()
    for node in outside_functions(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            module = base if node.level else node.module
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def cimported_by(source):
    """Return the dotted modules that Cython source imports or cimports, wherever it does."""
    found = re.findall(r"^\s*(?:from\s+([\w.]+)\s+c?import\b|c?import\s+(.+))", source, re.MULTILINE)
    return {name.split(" as ")[0].strip() for module, several in found for name in [module, *several.split(",")]} - {""}


def own_modules(names):
    """Return which of our modules are meant by these dotted names."""
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "fastdist" and len(part) > 1 and part[1] in ORDER}


def test_the_reader_of_imports_finds_what_it_should():
    source = """
import os, fastdist.shared
from fastdist import config, __version__
from . import units
from ._core import PacketRing
if TYPE_CHECKING:
    from fastdist.worker import Worker
class Late:
    try:
        from fastdist.api import Api
    except ImportError:
        pass
    def method(self):
        from fastdist import supervisor
"""
    assert own_modules(imported_by(source)) == {"shared", "config", "units", "_core", "worker", "api"}
    cython = "from fastdist._core cimport mix\ncimport fastdist.shared as s, os\n    from a.b import c\nfrom . import d"
    assert cimported_by(cython) == {"fastdist._core", "fastdist.shared", "os", "a.b", "."}


def test_every_module_has_its_place():
    assert {path.stem for path in MODULES} | {"_core"} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_those_above_it(path):
    above = set(ORDER[: ORDER.index(path.stem)])
    assert own_modules(imported_by(path.read_text())) - above == set()


def test_the_package_itself_imports_none_of_its_modules():
    assert own_modules(imported_by((PACKAGE / "__init__.py").read_text())) == set()


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_nothing_of_ours(path):
    names = cimported_by(path.read_text())
    assert not {name for name in names if name.startswith(("fastdist", "."))}


def test_all_parts_of_the_core_are_included_once_and_there():
    included = re.findall(r'^include "(.*)"$', (PACKAGE / "_core.pyx").read_text(), re.MULTILINE)
    parts = {path for path in (PACKAGE / "core").iterdir() if path.suffix == ".pxi"}
    assert {PACKAGE / name for name in included} == parts
    assert len(included) == len(parts)
    assert not any(re.search(r"^include ", path.read_text(), re.MULTILINE) for path in parts)
