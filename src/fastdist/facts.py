"""What the annotations in ``settings`` say of each setting: its type, bounds, default, and when it takes effect."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import msgspec
from msgspec import NODEFAULT

from fastdist.settings import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts in the annotation of a setting, and its default."""

    base: Any  # a struct, a tuple of something, a Literal, or int, float or str
    default: Any = NODEFAULT
    description: str = ""  # Markdown; the first line is a summary
    examples: list[Any] = field(default_factory=list)
    ge: float | None = None
    le: float | None = None
    pattern: str = ""
    type: str = ""  # as the documentation names it
    range: str = ""  # in words, where there are no bounds
    refusal: str = ""  # the error for text that the pattern does not match
    why: str = ""  # added to the error about the upper bound
    parse: Callable[[Any], Any] | None = None  # raises ValueError
    check: Callable[[Any], object] | None = None  # the same, of a value that stays as it is written
    show: Callable[[Any], Any] = lambda value: value  # the inverse of ``parse``, easy to read
    secret: bool = False  # to be masked
    internal: bool = False  # no setting: what has become of some
    changes: str = "restart"  # when a new value takes effect: "restart" or "reload"

    @property
    def summary(self) -> str:
        """The first line of the description, as plain text without its full stop."""
        return self.description.partition("\n")[0].removesuffix(".").replace("`", "")


def facts(kind: Any, **known: Any) -> Facts:
    """Return what an annotation says: later ``Meta`` override earlier ones, and all of them what is ``known``."""
    base, *metas = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if NoneType in get_args(base):  # None: what is left out is as another setting says
        inner = get_args(base)[0]
        base, *others = get_args(inner) if get_origin(inner) is Annotated else (inner,)
        metas = [*others, *metas]
    if get_origin(base) is tuple:
        item = facts(get_args(base)[0])
        known |= {"type": f"list of {item.type}", "range": item.range, "secret": item.secret}
    for meta in metas:
        given = {name: getattr(meta, name) for name in ("description", "examples", "ge", "le", "pattern")}
        known |= {name: value for name, value in given.items() if value is not None} | (meta.extra or {})
    return Facts(base=base, **known)


@cache
def fields(struct: Any) -> dict[str, Facts]:
    """Return the settings in a struct, by name."""
    each = {info.name: facts(info.type, default=info.default) for info in msgspec.structs.fields(struct)}
    return {name: about for name, about in each.items() if not about.internal}


def _all_facts() -> Iterator[tuple[str, Facts]]:
    for section in msgspec.structs.fields(Config):
        of_section, prefix = facts(section.type, default=section.default), section.name
        struct = of_section.base
        if get_origin(struct) is tuple:
            yield prefix, of_section
            struct, prefix = get_args(struct)[0], f"{prefix}[]"
        for name, about in fields(struct).items():
            live = about.changes == "restart" and of_section.changes == "reload"
            yield f"{prefix}.{name}", dataclasses.replace(about, changes="reload") if live else about


# By dotted path, with those of an analyzer as ``analyzers[].id``. The analyzers are one setting, as every list is.
FACTS = dict(_all_facts())
SETTINGS = {path: about for path, about in FACTS.items() if "[" not in path}
