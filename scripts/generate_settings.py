"""Write what follows from the settings: ``fastdist.example.toml``, and the reference in ``docs/settings.md``.

All of the example is made from ``fastdist.settings``, and of the page what stands below MARK.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from msgspec import NODEFAULT
from msgspec.structs import asdict

from fastdist.cli.effective import written
from fastdist.facts import FACTS, Facts
from fastdist.settings import Config

ROOT = Path(__file__).parent.parent
EXAMPLE, PAGE = ROOT / "fastdist.example.toml", ROOT / "docs" / "settings.md"
MARK = "<!-- What follows is made by `make generated` from src/fastdist/settings.py. -->\n"
SECTIONS = asdict(Config())  # name -> defaults: a struct, or several of them
UNSET = (None, "", ())  # in an analyzer: left out in the example
COMMENTS, WIDTH = 31, 120  # columns of the example

HEAD = """\
# Every setting of fastdist, with its default. Copy what you change; what is left out has the default anyway.
# Check a file with `fastdist check FILE`, run with `fastdist serve --config FILE`.
#
# Durations and sizes are numbers (seconds, bytes) or strings with a unit: us ms s m h d, B KB KiB MB MiB GB GiB TB TiB.
# What is no list can also come from the environment: FASTDIST_<SECTION>__<KEY>, as in FASTDIST_QUEUE__DURABILITY=fsync.
# {live} change on SIGHUP or POST /admin/reload; the other sections need a restart.
# docs/settings.md describes each setting. This file is made by `make generated` from src/fastdist/settings.py.
"""


def documents() -> dict[Path, str]:
    """Return the content of each generated file."""
    by_hand = PAGE.read_text().partition(MARK)[0]
    return {EXAMPLE: example(), PAGE: by_hand + MARK + reference()}


def example() -> str:
    """Return a configuration file that has every setting with its default, and what it is for."""
    live = [_header(name) for name in SECTIONS if all(about.changes != "restart" for _, about in _settings(name))]
    blocks = [HEAD.format(live=f"{', '.join(live[:-1])} and {live[-1]}")]
    for name in SECTIONS:
        first, *others = _structs(name)
        lines = [_explained(key, getattr(first, key), about) for key, about in _settings(name)]
        blocks.append("\n".join([_header(name), *lines, ""]))
        for other in others:
            values = {key: (getattr(other, key), about) for key, about in _settings(name)}
            lines = [f"{key} = {written(value, about)}" for key, (value, about) in values.items() if value not in UNSET]
            blocks.append("\n".join([_header(name), *lines, ""]))
    return "\n".join(blocks)


def reference() -> str:
    """Return the Markdown of every section with its settings."""
    parts = []
    for name, default in SECTIONS.items():
        parts += [f"## `{_header(name)}`", str(inspect.getdoc(type(_structs(name)[0])))]
        if isinstance(default, tuple):
            rows = [f"| `{each.id}` | `{each.endpoint}` | {each.weight} |" for each in default]
            parts += ["Without any there are these:", _table("id", "endpoint", "weight", rows)]
        for key, about in _settings(name):
            unset = _default(key, about)
            row = f"| {_type(about)} | {unset} | {_range(about)} | {about.changes} |"
            parts += [f"### `{_prefix(name)}{key}`", _table("type", "default", "range", "changes on", [row])]
            parts.append(inspect.cleandoc(about.description))
            if about.examples and about.default is not NODEFAULT:
                parts.append(f"Example: `{key} = {written(about.examples[0], about)}`")
    return "\n\n".join(["", *parts]).removeprefix("\n") + "\n"


def _structs(name: str) -> tuple[Any, ...]:
    """Return the default of a section as a tuple."""
    default = SECTIONS[name]
    return default if isinstance(default, tuple) else (default,)


def _prefix(name: str) -> str:
    return f"{name}[]." if isinstance(SECTIONS[name], tuple) else f"{name}."


def _header(name: str) -> str:
    return f"[[{name}]]" if isinstance(SECTIONS[name], tuple) else f"[{name}]"


def _settings(name: str) -> list[tuple[str, Facts]]:
    """Return key and facts of every setting of a section."""
    prefix = _prefix(name)
    return [(path.removeprefix(prefix), about) for path, about in FACTS.items() if path.startswith(prefix)]


def _default(key: str, about: Facts) -> str:
    if about.default is NODEFAULT:
        return "required"
    if about.default is None:
        return f"[`delivery.{key}`](#delivery{key})"
    return "none" if about.type == "table" else f"`{written(about.default, about)}`"


def _explained(key: str, value: object, about: Facts) -> str:
    """Return the lines of a setting in the example: as a comment where nothing is set."""
    if value is None or (about.type == "table" and not value):
        return _explained(f"# {key}", about.examples[0], about)
    such_as = f"; such as {written(about.examples[0], about)}" if about.examples and not value else ""
    comment = textwrap.wrap(about.summary + such_as, WIDTH - COMMENTS - 2, break_on_hyphens=False)
    return f"{f'{key} = {written(value, about)}':<{COMMENTS - 1}} # " + f"\n{' ' * COMMENTS}# ".join(comment)


def _table(*cells: Any) -> str:
    *head, rows = cells
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def _words(kind: Any) -> tuple[str, ...]:
    """Return the words of which a setting is one, or a list; none if it is something else."""
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) is Literal else ()


def _type(about: Facts) -> str:
    if _words(about.base):
        return "list of" if get_origin(about.base) is tuple else "one of"
    return about.type or ("text" if about.base is str else "number")


def _range(about: Facts) -> str:
    if words := _words(about.base):
        return ", ".join(f"`{word}`" for word in words)
    if about.ge is None:
        return about.range
    least = about.show(about.ge)
    return f"{least} or more" if about.le is None else f"{least} to {about.show(about.le)}"


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
