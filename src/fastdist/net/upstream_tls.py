"""TLS with analyzers: the files that are set for one, and the contexts made of what they say.

- The supervisor reads the files, at a start and by each reload, and checks them; workers get their contents within the
  settings. So all processes use the same, also those that start later.
- Analyzers with the same contents share a context: one holds all certificates that it trusts, and takes long to make.
"""

from __future__ import annotations

import ssl
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from fastdist.errors import ConfigError, StartError
from fastdist.ipc import Pair
from fastdist.net import tls
from fastdist.settings import ClientTls

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from fastdist.settings import Analyzer, Config

NOTHING = ClientTls()


def with_files(config: Config) -> Config:
    """Return the configuration with what its analyzers' files say. Raises ConfigError when some cannot be used."""
    contexts, problems, analyzers = Contexts(), [], []
    for index, analyzer in enumerate(config.analyzers):
        try:
            read = _read(analyzer, f"analyzers[{index}]")
            contexts.make(read, f"analyzers[{index}]")
            analyzers.append(read)
        except StartError as error:
            problems += str(error).split("\n")
    if problems:
        raise ConfigError(problems)
    return msgspec.structs.replace(config, analyzers=tuple(analyzers))


def _read(analyzer: Analyzer, path: str) -> Analyzer:
    named = {"authorities": "ca_file", "certificate": "client_cert", "key": "client_key"}
    files = {f"{path}.{name}": file for name in named.values() if (file := getattr(analyzer, name))}
    contents = dict(zip(files, tls.read(files), strict=True))
    if empty := [setting for setting, content in contents.items() if not content]:  # it would count as not named
        raise StartError("\n".join(f"{setting}: {files[setting]} is empty" for setting in empty))
    return msgspec.structs.replace(
        analyzer, tls=ClientTls(**{field: contents.get(f"{path}.{name}", b"") for field, name in named.items()})
    )


class Contexts:
    """The contexts for analyzers, one for each set of contents; without any it is the system's certificates."""

    def __init__(self) -> None:
        self._made: dict[ClientTls, ssl.SSLContext] = {}

    @cached_property
    def system(self) -> ssl.SSLContext:
        """Made for the first https URL: to read all authorities' certificates takes long."""
        return ssl.create_default_context()

    def make(self, analyzer: Analyzer, path: str = "") -> None:
        """Have the context for an analyzer ready. Raises StartError, which names it by ``path``, if that fails."""
        if analyzer.tls not in self._made and analyzer.tls != NOTHING:
            self._made[analyzer.tls] = _context(analyzer, path or f"analyzer {analyzer.id}")

    def of(self, analyzer: Analyzer) -> ssl.SSLContext:
        """Return the context for an analyzer. Raises StartError if it cannot be made."""
        self.make(analyzer)
        return self.system if analyzer.tls == NOTHING else self._made[analyzer.tls]

    def keep(self, analyzers: Iterable[Analyzer]) -> None:
        """Forget all contexts but those for these."""
        used = {analyzer.tls for analyzer in analyzers}
        self._made = {contents: context for contents, context in self._made.items() if contents in used}


def _context(analyzer: Analyzer, path: str) -> ssl.SSLContext:
    if analyzer.tls.authorities:
        try:
            context = ssl.create_default_context(cadata=analyzer.tls.authorities.decode("ascii", "ignore"))
        except (ssl.SSLError, ValueError) as error:
            text = f"{path}.ca_file: {analyzer.ca_file} holds no certificates in PEM form that can be read"
            raise StartError(text) from error
    else:
        context = ssl.create_default_context()
    if analyzer.tls.certificate:
        named = tls.Named(f"{path}.client_cert", analyzer.client_cert, f"{path}.client_key", analyzer.client_key)
        tls.load(context, Pair(analyzer.tls.certificate, analyzer.tls.key), named)
    return context


def not_after(transport: asyncio.BaseTransport | None) -> int:
    """Return when the certificate of the other side expires, in seconds since 1970; 0 without TLS or such a date."""
    certificate = transport.get_extra_info("peercert") if transport is not None else None
    try:
        return int(ssl.cert_time_to_seconds(certificate["notAfter"])) if certificate else 0
    except (KeyError, ValueError):
        return 0
