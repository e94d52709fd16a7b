"""``fastdist check --probe``: each analyzer is looked up, connected to and asked for its health, once.

Health checks are made by the service's own ``HealthChecker``, so that what is said here is what it would find. The
endpoint, where packets go, is connected to by itself only if it is at another place than the health check.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, NamedTuple, cast

import uvloop

from fastdist.net.connect import connect, describe
from fastdist.net.names import Names
from fastdist.shm.block import SharedBlock
from fastdist.supervisor.health import HealthChecker
from fastdist.units import without_query

if TYPE_CHECKING:
    from fastdist.settings import Analyzer, Config
    from fastdist.units import Endpoint


class Finding(NamedTuple):
    """What became of one analyzer's probe: ``text`` is for a person, on one line."""

    analyzer: str
    ok: bool
    text: str


def probe(config: Config) -> list[Finding]:
    """Probe all analyzers side by side; return what was found, in the order of the configuration."""
    return uvloop.run(_probe_all(config))  # the loop that ``connect`` is made for


async def _probe_all(config: Config) -> list[Finding]:
    block = SharedBlock.create(1, 1)  # the checker's own; nothing is recorded there
    os.close(block.fd)
    checker = HealthChecker(block.analyzers, config.health, config.delivery.max_age)
    try:
        return await asyncio.gather(*(_probe(checker, analyzer, config) for analyzer in config.analyzers))
    finally:
        checker.close()


async def _probe(checker: HealthChecker, analyzer: Analyzer, config: Config) -> Finding:
    """Look up, connect, ask: the first of them that fails is what is said."""
    health, endpoint = analyzer.health_address, analyzer.address
    url, names = without_query(analyzer.health_url), Names()
    try:
        infos = await names.infos(health.host, health.port, config.health.timeout)
    except OSError as error:
        return Finding(analyzer.id, ok=False, text=f"{url}: {describe(error, config.health.timeout)}")
    addresses = ", ".join(dict.fromkeys(info[4][0] for info in infos))
    outcome = await checker.check_once(analyzer)
    if outcome is None:
        return Finding(analyzer.id, ok=False, text=f"{url}: not checked: {checker.shortage.last}")
    status, error_text = outcome
    if error_text:
        return Finding(analyzer.id, ok=False, text=f"{url} ({addresses}): {error_text.removeprefix('health check: ')}")
    if (endpoint.host, endpoint.port) != (health.host, health.port):
        try:
            await _connect(names, endpoint, config.delivery.connect_timeout)
        except OSError as error:
            text = f"{without_query(analyzer.endpoint)}: {describe(error, config.delivery.connect_timeout)}"
            return Finding(analyzer.id, ok=False, text=text)
    return Finding(analyzer.id, ok=True, text=f"{url} ({addresses}) answers {status}")


async def _connect(names: Names, endpoint: Endpoint, patience: float) -> None:
    """Open a connection and close it again. Raises OSError."""

    class Opened(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            cast("asyncio.Transport", transport).abort()

    await connect(Opened(), names, endpoint, patience)
