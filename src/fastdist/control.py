"""What the supervisor and its workers say to each other: JSON lines over a socket pair.

To a worker: ``drain`` (until ``deadline``), ``reload`` (the settings were written anew; ``roster`` has the slots),
``reply`` (to the request of that ``id``). From a worker: ``ready``, ``reloaded``, ``request`` (an ``action`` that an
administrator asked for). The socket's end of file is how either learns that the other is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator


class Action(msgspec.Struct, frozen=True):
    """A change an administrator asks for: ``reload``, or ``override`` or ``clear`` of an analyzer's settings."""

    name: str
    analyzer: str = ""
    weight: float | None = None
    draining: bool | None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line."""

    verb: str
    id: int = 0
    deadline: float = 0.0  # time.monotonic()
    roster: dict[str, int] = {}
    action: Action | None = None
    status: int = 0  # of a reply, as in HTTP
    body: Any = None


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send a message; it is lost if the other side is gone."""
    if not writer.is_closing():
        writer.write(msgspec.json.encode(message) + b"\n")


async def receive(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """Yield messages until the other side is gone."""
    try:
        while line := await reader.readline():
            yield msgspec.json.decode(line, type=Message)
    except ConnectionError:
        return
