"""The Dockerfile as its stages, and what each of them would see of the source tree."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Instruction:
    """One instruction: its word, its flags (``--from=build``), and the rest, as text and (exec form) as a list."""

    word: str
    flags: dict[str, str]
    text: str

    @property
    def words(self) -> list[str] | None:
        """The exec form; None if it is the shell form."""
        return json.loads(self.text) if self.text.startswith("[") else None


@dataclass
class Stage:
    """``FROM image AS name``, and all that follows until the next."""

    image: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, word: str) -> list[Instruction]:
        return [each for each in self.instructions if each.word == word]


def instructions(text: str) -> list[Instruction]:
    """Return the instructions of a Dockerfile; comments and continued lines are dealt with, heredocs are not."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*#", line)]
    logical = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    found = []
    for line in filter(str.strip, logical):
        word, _, rest = line.strip().partition(" ")
        flags: dict[str, str] = {}
        while match := re.match(r"\s*--([a-z-]+)=(\S+)\s+", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        found.append(Instruction(word.upper(), flags, re.sub(r"\s+", " ", rest).strip()))
    return found


def stages(path: Path = ROOT / "Dockerfile") -> dict[str, Stage]:
    """Return the stages by name, in the order of the file."""
    found: dict[str, Stage] = {}
    for each in instructions(path.read_text()):
        if each.word == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", each.text)
            assert match, f"a stage without a name: {each.text}"
            current = found[match[2]] = Stage(match[1], match[2])
        else:
            current.instructions.append(each)
    return found


def lineage(name: str) -> list[Stage]:
    """Return the stages that an image is made of, from the one on another's image to the one asked for."""
    known = stages()
    chain = [known[name]]
    while chain[0].image in known:
        chain.insert(0, known[chain[0].image])
    return chain


def setting(name: str, word: str) -> Instruction | None:
    """Return the last of an image's instructions of this kind, which is the one in force."""
    found = [each for stage in lineage(name) for each in stage.all(word)]
    return found[-1] if found else None


def environment(name: str) -> dict[str, str]:
    """Return the variables an image sets, with ``$PATH`` left as it is."""
    pairs: dict[str, str] = {}
    for stage in lineage(name):
        for each in stage.all("ENV"):
            pairs |= {
                key: quoted or plain for key, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', each.text)
            }
    return pairs


def context() -> list[str]:
    """Return the files that .dockerignore lets into the build, as paths from the root of the source tree."""
    rules = [
        (not line.startswith("!"), _pattern(line.removeprefix("!")))
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]

    def wanted(path: str) -> bool:
        parts = path.split("/")
        ignored = False
        for ignore, pattern in rules:  # the last that fits a file, or a folder above it, decides
            if any(pattern.fullmatch("/".join(parts[:length])) for length in range(1, len(parts) + 1)):
                ignored = ignore
        return not ignored

    tops = [top for top in ROOT.iterdir() if top.name not in {".git", ".venv"}]  # "*" ignores their thousands anyway
    files = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    return sorted(name for path in files if wanted(name := path.relative_to(ROOT).as_posix()))


def _pattern(text: str) -> re.Pattern[str]:
    """Return a pattern of .dockerignore: * and ? within a name, ** for any number of folders, [] for one of some."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]*\]|.", text.strip("/"))
    return re.compile("".join(meanings.get(part, part if part[0] == "[" else re.escape(part)) for part in parts))
