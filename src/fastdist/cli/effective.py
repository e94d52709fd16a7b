"""The configuration in force, for a person: as TOML that can be read again, with where each value comes from.

Tokens are masked. Warnings beyond those of a start are for who asks for a check: some concern the defaults as well.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import msgspec

from fastdist.config import Analyzer, Config, settings
from fastdist.config import warnings as config_warnings
from fastdist.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.config import Loaded, Setting

MASK = "********"


def as_toml(loaded: Loaded, *, changed: bool = False) -> str:
    """Return the configuration as TOML; ``changed``: only what is not a default. Comments name the origins."""
    lines = [f"# fastdist, {_summary(loaded)}"]
    section = ""
    for setting in settings(loaded):
        if changed and setting.origin == "default":
            continue
        if setting.path == "analyzers":
            lines += _analyzers(setting)
            continue
        name, _, key = setting.path.partition(".")
        if name != section:
            lines += ["", f"[{name}]"]
            section = name
        lines.append(_commented(f"{key} = {_value(setting)}", _origin(setting)))
    return "\n".join(lines) + "\n"


def warnings(config: Config) -> Iterator[str]:
    """Yield what is allowed but may not be what was meant, each on one line that begins with its path."""
    yield from config_warnings(config)
    workers = config.server.workers or min(256, len(os.sched_getaffinity(0)))
    largest = config.queue.capacity // workers // 2
    if largest < config.server.max_body:
        yield (
            f"server.max_body: packets over {format_size(largest)} are answered 413 all the same, since one may take "
            f"half of a worker's part of queue.capacity at most ({format_size(config.queue.capacity)} for {workers})"
        )
    first: dict[str, int] = {}
    for index, analyzer in enumerate(config.analyzers):
        if first.setdefault(analyzer.endpoint, index) != index:
            yield f"analyzers[{index}].endpoint: the same as analyzers[{first[analyzer.endpoint]}].endpoint"
    if config.delivery.mode == "batch" and config.server.validation == "none":
        yield "server.validation: with none, a body that is not JSON breaks the batches (delivery.mode) it is sent in"


def _summary(loaded: Loaded) -> str:
    set_by_hand = sum(origin != "default" for origin in loaded.sources.values())
    read = f"{loaded.path} and" if loaded.path else "no file, only"
    return f"{read} the environment; {set_by_hand} of {len(loaded.sources)} settings set there or by options"


def _analyzers(setting: Setting) -> Iterator[str]:
    for analyzer in setting.value:
        yield ""
        yield _commented("[[analyzers]]", _origin(setting))
        for field in msgspec.structs.fields(Analyzer):
            yield f"{field.name} = {_written(getattr(analyzer, field.name), field.type)}"


def _origin(setting: Setting) -> str:
    return setting.origin + (f"; {len(setting.value)}, masked" if setting.secret and setting.value else "")


def _commented(line: str, comment: str) -> str:
    return f"{line:<39} # {comment}"


def _value(setting: Setting) -> str:
    return _written([MASK] * len(setting.value) if setting.secret else setting.value, setting.kind)


def _written(value: Any, kind: Any) -> str:
    """Return a value as TOML has it, in the unit that is the easiest to read."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(item, str) for item in value)}]"
    show = (get_args(kind)[1].extra or {}).get("show") if get_origin(kind) is Annotated else None
    value = show(value) if show else value
    # Control characters, where TOML and JSON strings differ, cannot be in a setting.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
