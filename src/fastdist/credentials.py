"""Credentials that a configuration names: headers for analyzers, and files of tokens.

- What is read here is read by the supervisor, at a start and by each reload; workers get the values.
- A ``ValueError`` says what is wrong and never shows a value.
"""

from __future__ import annotations

import json
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdist import tomlfile
from fastdist.settings import Header

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_VALUE = 8192  # bytes; servers take no longer heads
FRESH = 2.0  # seconds since it was written to; clocks may differ a little
MAX_SHOWN = 200  # characters of a path
NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}", re.ASCII)  # a token of RFC 9110
VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")
TOKEN = re.compile(rb"[!-~]+")

_OWN = "fastdist itself sends it with each request"
_CHECKS = "fastdist itself sends it with each health check"
_CONNECTION = "it is about the connection, which fastdist keeps"
_BODY = "it is about the form of the body, which is sent as it came"
REFUSED = (
    dict.fromkeys(("host", "content-type", "content-length", "x-attempt"), _OWN)
    | dict.fromkeys(("x-packet-id", "x-packet-ids", "x-packet-count"), _OWN)
    | dict.fromkeys(("accept", "user-agent"), _CHECKS)
    | dict.fromkeys(("connection", "keep-alive", "proxy-connection", "te", "upgrade", "http2-settings"), _CONNECTION)
    | dict.fromkeys(("proxy-authorization", "proxy-authenticate", "expect"), _CONNECTION)
    | dict.fromkeys(("transfer-encoding", "trailer", "content-encoding", "content-range"), _BODY)
)


def header(name: str, raw: Any, environ: Mapping[str, str], quiet: float = 0.0) -> Header:
    """Return the header that is written as ``name = raw``. Raises ValueError; ``quiet`` as ``tomlfile.read`` has it."""
    if not NAME.fullmatch(name):
        raise ValueError("is no name of a header: A-Z a-z 0-9 ! # $ % & ' * + - . ^ _ ` | ~")
    if reason := REFUSED.get(name.lower()):
        raise ValueError(f"cannot be set: {reason}")
    if isinstance(raw, str):
        return Header(name, _checked(raw.encode("utf-8", "surrogateescape"), "it"))
    if not isinstance(raw, dict) or len(raw) != 1 or not isinstance(raw.get("env", raw.get("file")), str):
        raise ValueError('expected text, { env = "NAME" } or { file = "PATH" }')
    ((kind, place),) = raw.items()
    if re.search(r"[\x00-\x1f\x7f]", place):
        raise ValueError(f"{kind}: must have no control characters")
    value = _of_environment(place, environ) if kind == "env" else _of_file(place, quiet)
    return Header(name, value, f"{{ {kind} = {json.dumps(place, ensure_ascii=False)} }}")


def _of_environment(variable: str, environ: Mapping[str, str]) -> bytes:
    text, where = environ.get(variable, ""), f"the environment variable {json.dumps(variable[:60])}"
    if not text:
        raise ValueError(f"{where} is not set, or empty")
    return _checked(text.encode("utf-8", "surrogateescape"), where)


def _of_file(path: str, quiet: float) -> bytes:
    data = _read(path, 0.0)
    if quiet and _is_fresh(path):  # else it is whole: a thousand analyzers need not wait for a file each
        data = _read(path, quiet)
    data = re.sub(rb"\r?\n\Z", b"", data)
    if not data:
        raise ValueError(f"{_shown(path)} is empty")
    return _checked(data, _shown(path))


def _checked(value: bytes, where: str) -> bytes:
    """Return a value that arrives as it is sent. Raises ValueError."""
    if not value:
        raise ValueError("must not be empty")
    if not VALUE.fullmatch(value):
        raise ValueError(f"{where} holds a line end or another control character, which no header may have")
    if value.strip(b" \t") != value:
        raise ValueError(f"{where} begins or ends with a space or a tab, which would not arrive")
    if len(value) > MAX_VALUE:
        raise ValueError(f"{where} has more than {MAX_VALUE} bytes")
    return value


def tokens(path: str, quiet: float) -> list[str]:
    """Return the tokens in a file, one a line. Raises ValueError; ``quiet`` is as ``tomlfile.read`` has it."""
    found = []
    for number, line in enumerate(_read(path, quiet).split(b"\n"), 1):
        token = line.removesuffix(b"\r")
        if not token or token.startswith(b"#"):
            continue
        if not TOKEN.fullmatch(token):
            raise ValueError(f"{_shown(path)}: line {number}: must be visible ASCII without spaces")
        found.append(token.decode())
    if not found:
        raise ValueError(f"{_shown(path)} holds no token; leave this out to have none")
    return found


def _is_fresh(path: str) -> bool:
    """Return whether a file may be written to at this moment; a pipe can be read only once."""
    try:
        status = Path(path).stat()
    except OSError:  # gone since: reading it says so
        return True
    return stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime < FRESH


def _read(path: str, quiet: float) -> bytes:
    try:
        return tomlfile.read_whole(Path(path), quiet)
    except OSError as error:
        raise ValueError(f"{_shown(path)} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a file that does not stay as it is
        raise ValueError(f"{_shown(path)}: {error}") from None


def _shown(path: str) -> str:
    return path if len(path) <= MAX_SHOWN else f"{path[:MAX_SHOWN]}..."
