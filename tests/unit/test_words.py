"""Names and prose are in the field's words: CONTRIBUTING.md has the glossary."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_OURS = re.compile(
    r"undertaker|\bbur(y|ied|ies)\b|\bsigns? of life\b|\bturns? of the (event )?loop\b|\broster\b|\bwho comes\b"
    r"|\blest\b|\banew\b|(?-i:\bis none\b)|\bnobody\b|\bwhoever\b|\bcomplain|\bgoodbye\b|\bhopeless\b|\bkeeper\b"
    r"|(?<!dead[ _-])(?<!dead)\bletters?\b(?!-spacing)|(?-i:\b_?(MOST|LONGEST|SHORTEST|LARGEST|SMALLEST|LEAST)_)"
    r"|(?<!\")somebody|anybody|everybody|\bwho (was|got|has)\b|\bhears?\b|taken over|\bsendings\b"
    r"|\b(a|each|first|last|next|per) sending\b",
    re.IGNORECASE,
)
FOLDERS = ("src", "docs", "tests", "bench", "deploy", "fuzz", "mock_analyzers", "scripts")
NAMES = re.compile(r".*\.(py|pyx|pxi|pyi|h|c|js|html|css|md|sh|toml|ya?ml|json)|Makefile|Dockerfile")
NOT_READ = {ROOT / "src/fastdist/_core.c", ROOT / "fuzz/core.c", Path(__file__)}  # written by Cython; the list itself


def files():
    """Return all files with words of ours."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if NAMES.fullmatch(path.name)]
    found += [path for path in ROOT.iterdir() if NAMES.fullmatch(path.name)]
    return [path for path in found if path not in NOT_READ and "node_modules" not in path.parts]


def text(path):
    """Return what is to be read of a file: all but the glossary."""
    return path.read_text().partition("\n## Words\n")[0] if path.name == "CONTRIBUTING.md" else path.read_text()


def test_words_are_those_of_the_glossary():
    found = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        lines = enumerate(text(path).splitlines(), 1)
        found += [f"{name}:{number}: {line.strip()}" for number, line in lines if NOT_OURS.search(line)]
    assert not found


def test_names_of_tests_are_short():
    names = [
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    assert [name for name in names if len(name) > 40] == []
