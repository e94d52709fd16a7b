"""The errors fastdist raises on purpose: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import MsgspecError, Struct

if TYPE_CHECKING:
    from collections.abc import Iterable


# What decoding the bytes of others raises: the second in older versions of msgspec, the last of nested brackets.
UNDECODABLE = (MsgspecError, UnicodeDecodeError, RecursionError)
INTERNAL_ERROR = "a fault in fastdist; its log has the traceback"  # what a response with 500 says


def printable(text: str) -> str:
    """Return text that can be encoded: lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


class FastdistError(Exception):
    """The base of all errors below; its text can be shown as it is."""


class Fault(Struct, frozen=True, omit_defaults=True):
    """A fault of a configuration: what is wrong, and where it stands in a file, if it stands in one."""

    detail: str
    pointer: str = ""  # RFC 6901
    file: str = ""
    line: int = 0  # 0: not known

    def __str__(self) -> str:
        if not self.line or self.detail.startswith(self.file):
            return self.detail
        return f"{self.detail} ({self.file}:{self.line})"


class ConfigError(FastdistError):
    """A configuration that cannot be used.

    ``problems`` has one line for each fault, starting with its path; ``faults`` has the same, with their places.
    """

    def __init__(self, faults: Iterable[str | Fault]) -> None:
        # File names may be any bytes.
        self.faults = [
            Fault(printable(each.detail), each.pointer, printable(each.file), each.line)
            if isinstance(each, Fault)
            else Fault(printable(each))
            for each in faults
        ]
        self.problems = [fault.detail for fault in self.faults]
        super().__init__("\n".join(self.problems))


class StartError(FastdistError):
    """Something other than the configuration keeps the service from starting (exit status 3)."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class PacketError(FastdistError):
    """A body that is not a log packet.

    ``reason`` is the counter it belongs to (``malformed``: not JSON; ``invalid``: JSON of another shape), ``errors``
    lists the faults as RFC 9457 extension members: ``{"pointer": "/messages/0/message", "detail": "…"}``.
    """

    def __init__(self, reason: str, detail: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.errors = errors or []
