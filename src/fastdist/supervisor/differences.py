"""What differs between two configurations, for a person: settings with their values before and after.

Secrets are never shown: of tokens their number, of other settings that are no single value that they have changed, of a
URL no query.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

from fastdist.facts import FACTS, SETTINGS
from fastdist.net import tls
from fastdist.units import without_query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.ipc import Pair
    from fastdist.settings import Analyzer, Config


class Difference(msgspec.Struct, frozen=True):
    """A setting, with its values as text; None: it is not there. An analyzer's is ``analyzers[A2].weight``."""

    setting: str
    before: str | None
    after: str | None


def differences(old: Config, new: Config, pairs: tuple[Pair | None, Pair | None] = (None, None)) -> list[Difference]:
    """Return what differs; ``pairs``: certificate and key before and after."""
    found: list[Difference] = []
    for path in SETTINGS:
        if path == "analyzers":
            found += _of_analyzers(old, new)
        elif attrgetter(path)(old) != attrgetter(path)(new):
            found.append(Difference(path, _shown(path, attrgetter(path)(old)), _shown(path, attrgetter(path)(new))))
    if pairs[0] != pairs[1] and not any(each.setting.startswith("security.tls_") for each in found):
        found.append(Difference("security.tls_cert", _dates(pairs[0]), _dates(pairs[1])))  # the files were renewed
    return found


def _of_analyzers(old: Config, new: Config) -> Iterator[Difference]:
    before = {analyzer.id: analyzer for analyzer in old.analyzers}
    after = {analyzer.id: analyzer for analyzer in new.analyzers}
    for name in dict.fromkeys([*before, *after]):
        one, other = before.get(name), after.get(name)
        if one is None or other is None:
            yield Difference(f"analyzers[{name}]", _in_short(one), _in_short(other))
            continue
        if one.tls != other.tls:
            yield Difference(f"analyzers[{name}].tls", "files", "files renewed")
        for member in one.__struct_fields__:
            values = getattr(one, member), getattr(other, member)
            if values[0] != values[1] and member != "tls":
                path = f"analyzers[].{member}"
                yield Difference(f"analyzers[{name}].{member}", *(_shown(path, value) for value in values))


def _in_short(analyzer: Analyzer | None) -> str | None:
    if analyzer is None:
        return None
    return f"{_shown('analyzers[].endpoint', analyzer.endpoint)}, weight {analyzer.weight:g}"


def _shown(path: str, value: Any) -> str:
    about = FACTS[path]
    if about.secret:
        return f"{len(value)} set" if isinstance(value, tuple) else "set" if value else "not set"
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "none"
    if not isinstance(value, (str, int, float)):
        return "set" if value else "not set"
    text = str(about.show(value))
    return without_query(text) if path.endswith((".endpoint", ".health")) else text


def _dates(pair: Pair | None) -> str | None:
    ends = tls.validity(pair.certificate)[1] if pair is not None else None
    return f"valid until {ends:%Y-%m-%d %H:%M:%S} UTC" if ends is not None else None
