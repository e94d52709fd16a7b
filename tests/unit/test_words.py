"""Names and prose are in the field's words: CONTRIBUTING.md has the glossary."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# By what they contain, in lower case, which is looked for first: patterns alone take ten times as long.
NOT_OURS = {
    "undertaker": r"undertaker",
    "bur": r"\bbur(y|ied|ies)\b",
    "of life": r"\bsigns? of life\b",
    " of the ": r"\bturns? of the (event )?loop\b",
    "roster": r"\broster\b",
    "who comes": r"\bwho comes\b",
    "lest": r"\blest\b",
    "anew": r"\banew\b",
    "is none": r"(?-i:\bis none\b)",
    "nobody": r"\bnobody\b",
    "whoever": r"\bwhoever\b",
    "complain": r"\bcomplain",
    "goodbye": r"\bgoodbye\b",
    "hopeless": r"\bhopeless\b",
    "keeper": r"\bkeeper\b",
    "letter": r"(?<!dead[ _-])(?<!dead)\bletters?\b(?!-spacing)",
    "st_": r"(?-i:\b_?(MOST|LONGEST|SHORTEST|LARGEST|SMALLEST|LEAST)_)",
    "somebody": r"(?<!\")somebody",
    "ybody": r"anybody|everybody",
    "who ": r"\bwho (was|got|has)\b",
    "hear": r"\bhears?\b",
    "taken over": r"taken over",
    "sending": r"\bsendings\b|\b(a|each|first|last|next|per) sending\b",
}
PATTERNS = [(part, re.compile(pattern, re.IGNORECASE)) for part, pattern in NOT_OURS.items()]
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
        words = text(path)
        lower = words.lower()
        for pattern in (pattern for part, pattern in PATTERNS if part in lower):
            lines = enumerate(words.splitlines(), 1)
            found += [f"{path.relative_to(ROOT)}:{number}: {line}" for number, line in lines if pattern.search(line)]
    assert not found


def test_names_of_tests_are_short():
    names = [
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    assert [name for name in names if len(name) > 40] == []


def test_names_of_test_files_differ():
    """Two of one name cannot be imported in one run."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
