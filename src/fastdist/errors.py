"""The errors fastdist raises on purpose: each says what is wrong, where, and what to do about it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text that can be encoded: lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


class FastdistError(Exception):
    """The base of all errors below; its text can be shown as it is."""


class ConfigError(FastdistError):
    """A configuration that cannot be used. ``problems`` has one line for each fault, starting with its path."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [printable(problem) for problem in problems]  # file names may be any bytes
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
