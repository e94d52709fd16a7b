"""Names and prose are in the field's words: CONTRIBUTING.md has the glossary."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_OURS = re.compile(
    r"undertaker|\bbur(y|ied|ies)\b|\bsigns? of life\b|\bturns? of the (event )?loop\b|\broster\b|\bwho comes\b"
    r"|\blest\b|\banew\b|\bis none\b|\bnobody\b|\bwhoever\b|(?<!dead[ _-])(?<!dead)\bletters?\b(?!-spacing)|\bcomplain"
    r"|\bgoodbye\b|\bhopeless\b|\bkeeper\b|(?-i:\b_?(MOST|LONGEST|SHORTEST|LARGEST|SMALLEST|LEAST)_)",
    re.IGNORECASE,
)
KINDS = {".py", ".pyx", ".pxi", ".pyi", ".h", ".js", ".html"}
SOURCES = sorted(path for path in (ROOT / "src").rglob("*") if path.suffix in KINDS)
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", SOURCES + PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_the_glossary(path):
    found = [f"{n}: {line}" for n, line in enumerate(path.read_text().splitlines(), 1) if NOT_OURS.search(line)]
    assert not [line for line in found if "is None" not in line]


def test_names_of_tests_are_short():
    names = [
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    assert [name for name in names if len(name) > 45] == []
