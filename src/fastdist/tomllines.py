"""On which line each key of a TOML document stands, which the standard library's parser does not say.

For documents that the parser has accepted; for others the result is undefined. Paths are written as problems of the
configuration have them: ``server.port``, ``analyzers[2].weight``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'  # up to two quotes belong to the text before its end
    r"|'''.*?'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
BARE = re.compile(r"[A-Za-z0-9_-]+")
ATOM = re.compile(r"[^,\]}#\r\n]+")  # a number, a date, true or false


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.found: dict[str, int] = {}  # the first line of each path
        self._lines = (0, 1)  # how far lines were counted, and how many
        self._tables: Counter[str] = Counter()  # of each list of tables

    def scan(self) -> dict[str, int]:
        prefix = ""
        while self._skip():
            if self.text.startswith("[", self.at):
                prefix = self._header()
            else:
                self._pair(prefix)
        return self.found

    def _skip(self) -> bool:
        """Pass over blanks and comments; return whether something follows."""
        match = SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.at < len(self.text)

    def _note(self, path: str, at: int) -> None:
        counted, line = self._lines
        line += self.text.count("\n", counted, at)
        self._lines = at, line
        self.found.setdefault(path, line)

    def _header(self) -> str:
        start = self.at
        several = self.text.startswith("[[", start)
        self.at += 2 if several else 1
        keys, path = self._keys(), ""
        for number, key in enumerate(keys, 1):
            path = f"{path}.{key}" if path else key
            if several and number == len(keys):
                self._tables[path] += 1
            if count := self._tables[path]:
                path = f"{path}[{count - 1}]"
        self._note(path.rpartition("[")[0] if several else path, start)
        self._note(path, start)
        self.at += 2 if several else 1
        return path

    def _keys(self) -> list[str]:
        """Return the parts of a dotted key; what follows it is next."""
        keys = []
        while True:
            self._skip()
            if match := BARE.match(self.text, self.at):
                keys.append(match[0])
            elif match := STRING.match(self.text, self.at):
                quoted = match[0]
                keys.append(shown(quoted[1:-1] if quoted.startswith("'") else json.loads(quoted)))
            else:
                raise ValueError(f"no key at {self.at}")
            self.at = match.end()
            self._skip()
            if not self.text.startswith(".", self.at):
                return keys
            self.at += 1

    def _pair(self, prefix: str) -> None:
        """Pass over ``key = value``."""
        self._skip()
        start = self.at
        path = prefix
        for key in self._keys():
            path = f"{path}.{key}" if path else key
            self._note(path, start)
        self.at += 1  # the sign =
        self._value(path)

    def _value(self, path: str) -> None:
        self._skip()
        opening = self.text[self.at : self.at + 1]
        if opening == "[":
            for number, _ in enumerate(self._elements("]")):
                self._note(f"{path}[{number}]", self.at)
                self._value(f"{path}[{number}]")
        elif opening == "{":
            for _ in self._elements("}"):
                self._pair(path)
        else:
            match = STRING.match(self.text, self.at) or ATOM.match(self.text, self.at)
            if match is None:
                raise ValueError(f"no value at {self.at}")
            self.at = match.end()

    def _elements(self, end: str) -> Iterator[None]:
        """Be at each element of a list or an inline table, which the caller passes over, and then behind its end."""
        self.at += 1
        while self._skip() and not self.text.startswith(end, self.at):
            yield
            self._skip()
            self.at += self.text.startswith(",", self.at)
        self.at += 1


def shown(key: str) -> str:
    """Return a key as problems show it: quoted unless it is a bare one, so that a problem stays on its line."""
    return key if re.fullmatch("[A-Za-z0-9_-]{1,60}", key) else json.dumps(key[:60])


def lines(text: str) -> dict[str, int]:
    """Return {path: line}; of a document that cannot be followed, what was found up to there."""
    scanner = _Scanner(text)
    try:
        return scanner.scan()
    except (ValueError, RecursionError):
        return scanner.found
