"""Folders say what may import what: the rules between packages, and no circles between modules."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastdist

ROOT = Path(fastdist.__file__).parent
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
SHARED = {"root", "_core"}  # root: the modules that lie in no package
RULES = {
    "root": SHARED,
    "net": SHARED,
    "shm": SHARED,
    "storage": SHARED,
    "protocols": SHARED | {"http.responses"},
    "http": SHARED | {"shm"},
    "worker": SHARED | {"net", "shm", "storage", "protocols", "http"},
    "supervisor": SHARED | {"net", "shm", "storage"},
    "client": SHARED | {"storage", "http.models", "http.responses"},
    "cli": SHARED | {"net", "storage", "supervisor", "client"},
}


def imports(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert not isinstance(node, ast.Import) or not any(name.name.startswith("fastdist") for name in node.names)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fastdist":
            for name in node.names:
                full = [*node.module.split(".")[1:], name.name]
                yield next(
                    (".".join(full[:n]) for n in (2, 1) if ".".join(full[:n]) in {*MODULES, "_core"}), "__init__"
                )


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_as_its_package_may(module):
    package = module.split(".")[0] if "." in module else "root"
    for name in imports(module):
        other = name.split(".")[0] if "." in name or name == "_core" else "root"
        assert {name, other} & {package, *RULES[package]} or module == "__main__", f"{module} imports {name}"


def test_no_modules_import_in_a_circle():
    TopologicalSorter({module: set(imports(module)) for module in MODULES}).prepare()


@pytest.mark.parametrize("path", [ROOT / "_core.pyx", *sorted((ROOT / "core").iterdir())], ids=lambda path: path.name)
def test_the_core_imports_nothing_of_ours(path):
    assert not re.search(r"^\s*(from\s+|c?import\s+)(fastdist|\.)", path.read_text(), re.MULTILINE)


def test_all_core_parts_are_included_once():
    included = re.findall(r'^include "core/(.*)"$', (ROOT / "_core.pyx").read_text(), re.MULTILINE)
    assert sorted(included) == sorted(path.name for path in (ROOT / "core").glob("*.pxi"))
