"""The configuration in force, for a person: as TOML that can be read again, with where each value comes from.

Tokens, passwords, the values of headers and the queries of URLs are masked. Warnings beyond those of a start are for
``check`` only: some concern the defaults as well.
"""

from __future__ import annotations

import json
import re
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fastdist.config import batches
from fastdist.config import warnings as config_warnings
from fastdist.config_rules import usable_cores
from fastdist.facts import SETTINGS, fields
from fastdist.settings import Analyzer
from fastdist.units import format_size, without_query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.config import Loaded
    from fastdist.facts import Facts
    from fastdist.settings import Config

MASK = "********"


def as_toml(loaded: Loaded, *, changed: bool = False) -> str:
    """Return the configuration as TOML; ``changed``: only what is not a default. Comments name the origins."""
    lines = [f"# fastdist, {_summary(loaded)}"]
    section = ""
    for path, about in SETTINGS.items():
        value, origin = attrgetter(path)(loaded.config), loaded.sources[path]
        if changed and origin == "default":
            continue
        if path == "analyzers":
            for analyzer in value:
                lines += ["", _commented("[[analyzers]]", origin), *_analyzer(analyzer)]
            continue
        name, _, key = path.partition(".")
        if name != section:
            lines += ["", f"[{name}]"]
            section = name
        if about.secret and value and isinstance(value, str):
            value, origin = MASK, f"{origin}; masked"
        elif about.secret and value:
            value, origin = (MASK,) * len(value), f"{origin}; {len(value)}, masked"
        lines.append(_commented(f"{key} = {written(value, about)}", origin))
    return "\n".join(lines) + "\n"


def _analyzer(analyzer: Analyzer) -> Iterator[str]:
    for key, about in fields(Analyzer).items():
        value = getattr(analyzer, key)
        if value not in (None, "", ()) and key != "headers":
            yield f"{key} = {written(without_query(value) if about.type.endswith('URL') else value, about)}"
    if analyzer.headers:
        yield "[analyzers.headers]"
    for header in analyzer.headers:
        name = header.name if re.fullmatch("[A-Za-z0-9_-]+", header.name) else json.dumps(header.name)
        yield f"{name} = {header.source or json.dumps(MASK)}"


def written(value: Any, about: Facts) -> str:
    """Return the value of a setting as TOML has it, in the unit that is the easiest to read."""
    if about.type == "table":
        return str(value)  # an example, which is TOML
    # Control characters, where TOML and JSON strings differ, cannot be in a setting.
    value = about.show(value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def warnings(config: Config) -> Iterator[str]:
    """Yield what is allowed but may not be what was meant, each on one line that begins with its path."""
    yield from config_warnings(config)
    workers = config.server.workers or usable_cores()
    largest = config.queue.capacity // workers // 2
    if config.queue.backend == "ring" and largest < config.server.max_body:
        yield (
            f"server.max_body: packets over {format_size(largest)} are answered 413 all the same, since one may take "
            f"half of a worker's part of queue.capacity at most ({format_size(config.queue.capacity)} for {workers})"
        )
    if config.queue.backend == "jetstream" and config.jetstream.max_bytes <= config.server.max_body:
        yield (
            "server.max_body: packets that jetstream.max_bytes has no room for "
            f"({format_size(config.jetstream.max_bytes)}) are answered 413 all the same, however empty the stream is"
        )
    first: dict[str, int] = {}
    for index, analyzer in enumerate(config.analyzers):
        if first.setdefault(analyzer.endpoint, index) != index:
            yield f"analyzers[{index}].endpoint: the same as analyzers[{first[analyzer.endpoint]}].endpoint"
    for index, network in enumerate(config.server.trusted_proxies):
        if network.endswith("/0"):
            yield f"server.trusted_proxies[{index}]: every client is in it, and may say that it is another"
    if batches(config) and config.server.validation == "none":
        yield "server.validation: with none, a body that is not JSON breaks the batches (mode) it is sent in"


def _summary(loaded: Loaded) -> str:
    set_by_hand = sum(origin != "default" for origin in loaded.sources.values())
    read = f"{loaded.path} and" if loaded.path else "no file, only"
    return f"{read} the environment; {set_by_hand} of {len(loaded.sources)} settings set there or by options"


def _commented(line: str, comment: str) -> str:
    return f"{line:<39} # {comment}"
