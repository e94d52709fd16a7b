"""One mock analyzer: its options, its ledger, its listener and the connections it has.

The only place where options change, because two of them are more than a flag: ``refuse`` closes and opens the
listener, and what ``plain`` says is worked out once instead of per request.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from mock_analyzers.ledger import Ledger

if TYPE_CHECKING:
    from mock_analyzers.ledger_file import LedgerFile
    from mock_analyzers.listener import Listener
    from mock_analyzers.options import Options


class Connection(Protocol):
    """What an analyzer needs to know of a connection."""

    @property
    def waiting(self) -> int:
        """How many requests wait for their response."""

    def drop(self) -> None:
        """End it now; what was answered still leaves."""


class Analyzer:
    """The state that an analyzer's connections share. ``listener`` is set before the first of them exists."""

    listener: Listener

    def __init__(self, name: str, options: Options, seed: int | None, log: LedgerFile | None) -> None:
        self.id = name
        self.key = name.encode()
        self.ledger = Ledger()
        self.log = log
        # Its own generator per analyzer: what one draws must not depend on the traffic of the others.
        self.random = Random(None if seed is None else f"{seed}/{name}")  # noqa: S311 - repeatable, not secret
        self.connections: set[Connection] = set()
        self._apply(options)

    def _apply(self, options: Options) -> None:
        self.options = options
        self.plain = options.plain

    def start(self) -> None:
        """Listen, unless the options say otherwise; raises ``OSError``."""
        self.listener.open()  # also when it refuses: port 0 has to become a number
        if self.options.refuse:
            self.listener.close()

    def configure(self, patch: object) -> None:
        """Change options; raises ``OptionsError``, or ``OSError`` if the port is gone. Then nothing has changed."""
        options = self.options.changed(patch)
        if options.refuse and not self.options.refuse:
            self.listener.close()
            # Later, because the connection that asked is one of them and has its response still to come.
            asyncio.get_running_loop().call_soon(self.drop_connections)
        elif self.options.refuse and not options.refuse:
            self.listener.open()
        self._apply(options)

    @property
    def waiting(self) -> int:
        """How many requests wait for their response."""
        return sum(connection.waiting for connection in self.connections)

    def drop_connections(self) -> None:
        """Close every connection."""
        for connection in list(self.connections):
            connection.drop()

    def stop(self) -> None:
        """Close the listener and every connection."""
        self.listener.close()
        self.drop_connections()

    def describe(self) -> dict[str, Any]:
        """Return what ``GET /control`` shows."""
        return {
            "id": self.id,
            "url": f"{self.listener.origin}/analyze",
            "options": self.options.as_json(),
            "totals": self.ledger.totals() | {"waiting": self.waiting, "connections": len(self.connections)},
        }
