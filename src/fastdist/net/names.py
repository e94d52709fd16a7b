"""Name look-ups that block only the requests for the same name.

The system takes half a minute or more to give up a name that no server answers for, and cannot be stopped. In the few
threads that an event loop has for its look-ups such names would block all others. The rules here:

- A name is looked up in a thread of its own, once at a time for all requests.
- ``AT_ONCE`` look-ups run in parallel; one that takes longer than ``LONG`` seconds does not count. So names that hang
  take a thread each and nothing from the others.
- An answer is good for ``FRESH`` seconds. A stale one is used until the next arrives, also while the name
  servers cannot be reached; a name that does not exist has no addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from fastdist.net import timeouts

if TYPE_CHECKING:
    from collections.abc import Sequence

FRESH, FAILED = 5.0, 1.0  # seconds until a name is looked up again, after an answer and after a failure
OLD = 30.0  # seconds after which an answer is only used if the next does not arrive in a moment
MOMENT = 0.5  # seconds
AT_ONCE, LONG = 32, 1.0
BEHIND = 60.0  # seconds that an address which did not connect is tried after the others
GONE = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}

AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]  # as getaddrinfo has it


class Name:
    """What is known of one name."""

    def __init__(self) -> None:
        self.infos: Sequence[AddressInfo] = []
        self.addresses: frozenset[str] = frozenset()
        self.error = ""  # of the last look-up
        self.errno: int | None = None  # of its error, if this system lacked a thread or a descriptor
        self.looked = float("-inf")  # time.monotonic() of its end
        self.look_up: asyncio.Task[None] | None = None  # under way
        self.behind: dict[str, float] = {}  # address -> until when (time.monotonic()) it is tried after the others

    @property
    def is_stale(self) -> bool:
        """Whether the next look-up is due."""
        return time.monotonic() - self.looked > (FAILED if self.error else FRESH)

    def answered(self, infos: Sequence[AddressInfo]) -> None:
        """Store the result of a look-up."""
        self.infos, self.addresses, self.error = infos, frozenset(info[4][0] for info in infos), ""
        self.errno = None
        self.behind = {address: until for address, until in self.behind.items() if address in self.addresses}

    def failed(self, error: Exception) -> None:
        """Note that a look-up has failed."""
        self.error = str(getattr(error, "strerror", None) or error)
        self.errno = errno.ENOMEM if isinstance(error, RuntimeError) else None  # no thread could be started
        if isinstance(error, socket.gaierror) and error.errno in GONE:
            self.infos, self.addresses = [], frozenset()


class Names:
    """The names that one event loop connects to."""

    def __init__(self) -> None:
        self._names: dict[str, Name] = {}
        self._limit = asyncio.Semaphore(AT_ONCE)

    async def infos(self, host: str, port: int, patience: float) -> Sequence[AddressInfo]:
        """Return the addresses of ``host`` in the order to try them. Raises OSError after ``patience`` seconds."""
        if numeric := _numeric(host, port):
            return numeric
        name = self._names.setdefault(host, Name())
        self._refresh(host, name)
        now = time.monotonic()
        if name.look_up and not name.infos:
            try:
                async with timeouts.running(patience):
                    await asyncio.wait({name.look_up})
            except TimeoutError:
                raise OSError(f"the name {host} cannot be looked up: no answer within {patience:g} s") from None
        elif name.look_up and now - name.looked > OLD:
            await asyncio.wait({name.look_up}, timeout=min(patience, MOMENT))
        if not name.infos:
            text = f"the name {host} cannot be looked up: {name.error}"
            raise OSError(name.errno, text) if name.errno else OSError(text)
        ordered = sorted(name.infos, key=lambda info: name.behind.get(info[4][0], 0.0) > now)
        return [(*info[:4], (info[4][0], port, *info[4][2:])) for info in ordered]

    def current(self, host: str) -> frozenset[str]:
        """Return the addresses of a name that is in use, and refresh them; none for anything else."""
        name = self._names.get(host)
        if name is None:
            return frozenset()
        self._refresh(host, name)
        return name.addresses

    def deprioritize(self, host: str, address: str) -> None:
        """Try this address of a name after its others for a while."""
        if host in self._names:
            self._names[host].behind[address] = time.monotonic() + BEHIND

    def _refresh(self, host: str, name: Name) -> None:
        if name.look_up is None and name.is_stale:
            name.look_up = asyncio.get_running_loop().create_task(self._look_up(host, name))

    async def _look_up(self, host: str, name: Name) -> None:
        try:
            async with self._limit:
                answer = _in_thread(host)
                await asyncio.wait({answer}, timeout=LONG)
            name.answered(await answer)
        except Exception as error:  # noqa: BLE001  (no address, no thread, or a name that cannot be one)
            name.failed(error)
        finally:
            name.looked, name.look_up = time.monotonic(), None


@functools.lru_cache(maxsize=4096)
def _numeric(host: str, port: int) -> Sequence[AddressInfo]:
    """Return what a numeric address stands for, nothing for a name."""
    try:
        return tuple(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
    except socket.gaierror:
        return ()


def _in_thread(host: str) -> asyncio.Future[Sequence[AddressInfo]]:
    """Look a name up in a daemon thread. Raises RuntimeError when no thread can be started."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[AddressInfo]] = loop.create_future()

    def settle(infos: Sequence[AddressInfo], error: Exception | None) -> None:
        if not answer.done():
            answer.set_exception(error) if error else answer.set_result(infos)

    def look_up() -> None:
        infos: Sequence[AddressInfo] = []
        failure = None
        try:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except Exception as error:  # noqa: BLE001  (it is passed to the caller)
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, infos, failure)

    threading.Thread(target=look_up, name=f"look-up of {host}", daemon=True).start()
    return answer
