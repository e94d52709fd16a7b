"""The connection to the NATS servers: a client of nats-py for one server at a time, replaced by a new one when it ends.

Why nats-py does not reconnect by itself here: its client keeps what it could not send and sends it after it has
reconnected, perhaps long after the packet was answered 503. A client that is never used again sends nothing. The rules:

- A server that does not answer pings for about three seconds is left, and the next is tried: those of the settings, and
  those that they have named.
- Parts (a publisher, a consumer, ...) subscribe again on each new client; what was under way is theirs to repeat.
- At the start (``start``) servers that all refuse are an error, said in one line; later everything is tried again, with
  a warning every ten seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from nats.errors import Error as NatsError
from nats.errors import NoServersError

from fastdist import logs
from fastdist.errors import StartError
from fastdist.storage.jetstream import login
from fastdist.storage.jetstream.client import Client
from fastdist.storage.jetstream.transport import NotEncryptedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastdist.settings import Jetstream

CONNECT_TIMEOUT = 2  # seconds for each step of it: TCP, INFO, TLS, login
ATTEMPT_TIMEOUT = 3.0  # seconds for all of them
PING_INTERVAL = 1  # seconds
PINGS = 2  # unanswered; with one more due the server is left
PAUSE = 0.25  # seconds between two rounds of all servers
AFTER_FAILURE = 1.0  # seconds
WARNING_EVERY = 10.0  # seconds
FLUSH_TIMEOUT = 1.0  # seconds, at the end
# A server tells errors by text alone (-ERR 'Authorization Violation'): parts of those of a login, and of permissions.
LOGIN_ERRORS = ("authoriz", "authentic")
PERMISSION_ERROR = "permissions violation"

Kind = Literal["authorization", "certificate", "unreachable"]

log = logs.get()


class Part(Protocol):
    """What uses a connection."""

    def connected(self, client: Client) -> None:
        """Subscribe on a new client, and send again what is under way."""

    def lost(self) -> None:
        """Do without a client until the next."""


class Refusal(Exception):  # noqa: N818  (one of several that make an error)
    """Why a server cannot be used; its text has no secret."""

    def __init__(self, server: str, kind: Kind, text: str) -> None:
        super().__init__(f"jetstream: {server}: {text}")
        self.kind = kind


class Connection:
    """Keeps a client connected from ``start`` to ``close``. ``name``: what the servers list it under.

    ``is_quiet``: another one of the same service says in the log when servers are lost.
    """

    def __init__(self, settings: Jetstream, name: str, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self.settings, self.name = settings, name
        self.client: Client | None = None  # the one to use now
        self.server = ""  # the URL of the one that is, or was, connected
        self.reconnects = 0
        self.last_error = ""  # of the last attempt to connect, or what a server has not allowed
        self.denied = ""  # the last operation that the user is not allowed
        self._parts: list[Part] = []
        self._learnt: dict[str, str | None] = {}  # URL -> the name that its certificate is for, if not its host
        self._ended = asyncio.Event()  # the present client
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._throttle = logs.Throttle(WARNING_EVERY)

    @property
    def is_connected(self) -> bool:
        """Whether there is a server to talk to."""
        return self.client is not None

    @property
    def max_payload(self) -> int:
        """Bytes of a message with its headers that the server takes; 0 without a server."""
        return self.client.max_payload if self.client is not None else 0

    @property
    def unsent(self) -> int:
        """Bytes that are ours still: the kernel has not taken them."""
        return 0 if self.client is None else self.client.unsent

    def add(self, part: Part) -> None:
        """Have a part told of every client; before ``start``."""
        self._parts.append(part)

    async def start(self) -> bool:
        """Connect, and keep connected until ``close``; return whether a server is there.

        Raises StartError when no server can be used and one has refused the login or failed verification. Otherwise
        those that are away are tried until they are there.
        """
        refusals = await self._try_all()
        wrong = [refusal for refusal in refusals if refusal.kind != "unreachable"]
        if self.client is None and wrong:
            raise StartError(str(wrong[0]))
        if self.client is None:
            self._warn(refusals)
        self.keep()
        while self.client is not None and not self._up.is_set():  # noqa: ASYNC110  (either may change)
            await asyncio.sleep(0.005)
        return self.client is not None

    def keep(self) -> None:
        """Connect, and keep connected until ``close``, whatever servers say."""
        self._task = forever(self._keep)

    async def wait(self) -> None:
        """Wait until a server is connected."""
        await self._up.wait()

    def drop(self) -> None:
        """Leave the server, with all that was not sent to it, and connect to another."""
        if self.client is not None:
            self.client.transport.close()
        self._ended.set()

    async def close(self) -> None:
        """Send what is on its way and end."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        client, self.client = self.client, None
        if client is not None:
            client.write()
            with contextlib.suppress(NatsError, OSError, TimeoutError):
                await client.flush(FLUSH_TIMEOUT)  # type: ignore[arg-type]  # any number of seconds
            await self._leave(client)

    # ---- one client after the other

    async def _keep(self) -> None:
        while True:
            while self.client is None:
                await asyncio.sleep(PAUSE * random.uniform(0.5, 1.5))  # noqa: S311  (only spreads)
                refusals = await self._try_all()
                if self.client is None:
                    self._warn(refusals)
            client = self.client
            self._tell_parts(client)
            await self._ended.wait()
            self.client = None
            self._up.clear()
            self.reconnects += 1
            if not self._is_quiet and self._throttle.allow("lost"):
                log.warning("jetstream: lost the connection; reconnecting", server=self.server)
            self._learn(client)
            await self._leave(client)
            for part in self._parts:
                part.lost()
            await self._try_all()  # at once the first time: mostly another server is there

    def _tell_parts(self, client: Client) -> None:
        try:
            for part in self._parts:
                part.connected(client)
        except (NatsError, OSError):  # it has ended meanwhile
            self._ended.set()
        except Exception as error:  # whatever it is, another client may do
            log.error("jetstream: a connection cannot be used; reconnecting", exc_info=error)
            self._ended.set()
        else:
            self._up.set()

    async def _leave(self, client: Client) -> None:
        """End a client; nothing of it is sent any more."""
        client.transport.close()
        if not client.is_closed:
            await client.close()

    # ---- connecting

    async def _try_all(self) -> list[Refusal]:
        """Try each server once, until there is a client; return what the others said."""
        refusals = []
        for url, tls_name in self._servers():
            try:
                await self._connect(url, tls_name)
            except Refusal as refusal:
                self.last_error = str(refusal)
                refusals.append(refusal)
            else:
                break
        return refusals

    def _servers(self) -> list[tuple[str, str | None]]:
        """Return URLs in the order to try them: by chance, that which was connected last at the end."""
        servers: dict[str, str | None] = dict.fromkeys(self.settings.servers)
        known = {urlsplit(url).netloc for url in servers}
        servers |= {url: name for url, name in self._learnt.items() if urlsplit(url).netloc not in known}
        order = list(servers.items())
        random.shuffle(order)
        return sorted(order, key=lambda server: server[0] == self.server)

    def _learn(self, client: Client) -> None:
        """Remember the servers that this one has named, in the place of those named before, and itself if learnt."""
        named = [url.geturl() for url in client.discovered_servers]
        # They name addresses; the certificate is for the name that was configured.
        own = self._learnt.get(self.server)
        learnt: dict[str, str | None] = dict.fromkeys(named, own or urlsplit(self.server).hostname)
        if own:
            learnt[self.server] = own
        if named:
            self._learnt = learnt

    async def _connect(self, url: str, tls_name: str | None) -> None:
        """Connect to one server. Raises Refusal."""
        client = Client(must_encrypt=url.startswith("tls://"))
        ended = asyncio.Event()
        errors: list[Exception] = []

        async def on_closed() -> None:
            ended.set()

        async def on_error(error: Exception) -> None:
            errors.append(error)
            del errors[:-4]
            if PERMISSION_ERROR in str(error).lower():
                self._not_allowed(str(error))
            elif not isinstance(error, NatsError | OSError | TimeoutError):  # of ours: what a part does with a message
                log.error("jetstream: a message could not be handled", exc_info=error)

        options: dict[str, Any] = login.options(self.settings)
        if tls_name is not None:
            options["tls_hostname"] = tls_name
        try:
            options["tls"] = login.tls_context(self.settings)
            async with asyncio.timeout(ATTEMPT_TIMEOUT):
                await client.connect(
                    [url],
                    name=self.name,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_TIMEOUT,
                    ping_interval=PING_INTERVAL,
                    max_outstanding_pings=PINGS,
                    pending_size=0,
                    closed_cb=on_closed,
                    error_cb=on_error,
                    **options,
                )
        except Exception as error:  # nats-py and nkeys raise all kinds; each is a reason in a line
            client.transport.close()
            cause = next((each for each in reversed(errors) if not isinstance(each, NatsError)), None)
            refusal = _refusal(url, cause if cause is not None and isinstance(error, NoServersError) else error)
            if refusal.kind == "authorization" and not login.options(self.settings):
                refusal.args = (f"{refusal}; no login is configured: see jetstream.user, token, credentials and nkey",)
            raise refusal from error
        except asyncio.CancelledError:
            client.transport.close()
            raise
        self._ended = ended
        self.client, self.server, self.last_error = client, url, ""

    def _not_allowed(self, text: str) -> None:
        self.denied = self.last_error = f"jetstream: {self.server}: authorization: {text.removeprefix('nats: ')}"
        if not self._is_quiet and self._throttle.allow("denied"):
            log.error(self.denied)

    def _warn(self, refusals: list[Refusal]) -> None:
        if refusals and not self._is_quiet and self._throttle.allow("away"):
            log.warning(
                "jetstream: no server can be used; packets are answered 503 until one can",
                servers=[str(refusal).removeprefix("jetstream: ") for refusal in refusals],
            )


def forever(work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """Run ``work()`` in a task, and again after a failure, which is logged; until it ends by itself or is cancelled."""

    async def run() -> None:
        while True:
            try:
                await work()
            except Exception as error:  # whatever it is, nothing else would do the work
                log.error("jetstream: a task has failed and begins again", exc_info=error)
                await asyncio.sleep(AFTER_FAILURE)
            else:
                return

    return asyncio.get_running_loop().create_task(run())


def background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run something in a task; if it fails, that is logged."""

    def done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("jetstream: a task has failed", exc_info=error)

    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(done)
    return task


def _refusal(url: str, error: Exception) -> Refusal:
    """Return an error of connecting as what it is about."""
    text = str(error).removeprefix("nats: ").strip("'") or type(error).__name__
    kind: Kind = "unreachable"
    if isinstance(error, ssl.SSLCertVerificationError):
        kind, text = "certificate", f"certificate: {error.verify_message or text}"
    elif isinstance(error, ssl.SSLError):
        kind, text = "certificate", f"certificate: TLS failed: {error.reason or text}"
    elif isinstance(error, NotEncryptedError):
        kind = "certificate"
    elif any(part in text.lower() for part in LOGIN_ERRORS):
        kind, text = "authorization", f"authorization: the server has refused the login: {text}"
    elif isinstance(error, TimeoutError):
        text = "no answer"
    elif isinstance(error, OSError):
        text = error.strerror or text
    return Refusal(url, kind, text)


def now() -> float:
    """Return the time that all deadlines here are in."""
    return time.monotonic()
