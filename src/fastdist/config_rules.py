"""The rules over several settings, each of which looks only at those that are valid by themselves."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Any

from fastdist import units

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    Report: TypeAlias = Callable[[str, str], None]  # gets the path of a setting, and what is wrong with it

MIN_PART = 2**16  # bytes of queue.capacity that a worker needs; its part is a multiple of that


def check(valid: Mapping[str, Any], report: Report) -> None:
    """Report what is wrong with settings, of which ``valid`` has the values by their paths."""
    _check_together(valid, report)
    _check_analyzers(valid, report)
    _check_capacity(valid, report)
    _check_jetstream(valid, report)


def usable_cores() -> int:
    """Return how many workers there are by default."""
    return min(256, len(os.sched_getaffinity(0)))


def _check_together(valid: Mapping[str, Any], report: Report) -> None:
    at = valid.get
    if at("retry.base", 0) > at("retry.cap", math.inf):
        report("retry.base", "must be <= retry.cap")
    needs = 'needs server.validation = "schema" or "strict"'
    if at("distribution.strategy") == "sticky" and at("server.validation") == "none":
        report("distribution.strategy", f'"sticky" {needs}: the emitterId is read there')
    if at("distribution.by") == "messages" and at("server.validation") == "none":
        report("distribution.by", f'"messages" {needs}: they are counted there')
    if "*" in (origins := at("security.cors_origins", ())) and len(origins) > 1:
        report("security.cors_origins", '"*" must be alone')
    if at("server.proxy_protocol") == "on" and at("server.trusted_proxies") == ():
        report("server.proxy_protocol", "needs server.trusted_proxies: the header is read from these only")
    if admin := at("admin.listen", ""):
        host, port = units.split_listen(admin)
        served = {host, at("server.host")}
        if port == at("server.port") != 0 and (len(served) == 1 or served & {"0.0.0.0", "::"}):  # noqa: S104
            report("admin.listen", "must not be the address of server.host and server.port")
    for key, other in (("security.tls_cert", "security.tls_key"), ("security.tls_key", "security.tls_cert")):
        if at(key) == "" and at(other):
            report(key, f"missing: {other} is set, and TLS needs both")


def _check_jetstream(valid: Mapping[str, Any], report: Report) -> None:
    at = valid.get
    if at("jetstream.servers") == ():
        report("jetstream.servers", "at least one is needed")
    given = [name for name in ("user", "token", "credentials", "nkey") if at(f"jetstream.{name}")]
    if len(given) > 1:
        report(f"jetstream.{given[1]}", f"{given[0]} is set as well, and there may be one way to log in at most")
    for key, other, why in (
        ("password", "user", "a user needs a password"),
        ("user", "password", "a password needs a user"),
        ("tls_cert", "tls_key", "a key needs its certificate"),
        ("tls_key", "tls_cert", "a certificate needs its key"),
    ):
        if at(f"jetstream.{key}") == "" and at(f"jetstream.{other}"):
            report(f"jetstream.{key}", f"missing: jetstream.{other} is set, and {why}")
    if at("jetstream.dedup_window", math.inf) < at("jetstream.publish_timeout", 0):
        report("jetstream.dedup_window", "must be >= jetstream.publish_timeout, so that what is tried again is known")


def _check_capacity(valid: Mapping[str, Any], report: Report) -> None:
    at = valid.get
    set_to = at("server.workers")
    if at("queue.backend") == "jetstream" or set_to is None:
        return
    workers = set_to or usable_cores()
    if at("queue.capacity", math.inf) < workers * MIN_PART:
        least, part = units.format_size(workers * MIN_PART), units.format_size(MIN_PART)
        whose = "server.workers" if set_to else "one per core here"
        report("queue.capacity", f"must be >= {least}: {part} for each of {workers} workers ({whose})")


def _check_analyzers(valid: Mapping[str, Any], report: Report) -> None:
    first: dict[str, str] = {}
    for path, value in valid.items():
        if re.fullmatch(r"analyzers\[\d+\]\.id", path) and first.setdefault(value, path) != path:
            report(path, f'duplicate of {first[value]}, "{value}"')
    for analyzer in dict.fromkeys(path.partition(".")[0] for path in valid if path.startswith("analyzers[")):
        _check_tls(valid, report, analyzer)
    analyzers = valid.get("analyzers")
    if analyzers is None:
        return  # neither their number nor the sum of their weights is known
    total = sum(analyzer.weight for analyzer in analyzers)
    if not analyzers:
        report("analyzers", "at least one is needed")
    elif total == 0:
        report("analyzers", "at least one weight must be > 0")
    elif total == math.inf:
        report("analyzers", "the sum of the weights must be finite")


def _check_tls(valid: Mapping[str, Any], report: Report, analyzer: str) -> None:
    """Check what one analyzer's settings of TLS need of each other."""
    at = valid.get
    cert, key = f"{analyzer}.client_cert", f"{analyzer}.client_key"
    for path, other in ((cert, key), (key, cert)):
        if at(path) == "" and at(other):
            report(path, f"missing: {other} is set, and a client certificate needs both")
    urls = str(at(f"{analyzer}.endpoint", "https:")), str(at(f"{analyzer}.health", ""))
    if not any(url.lower().startswith("https:") for url in urls):
        for name in ("ca_file", "client_cert", "client_key", "server_name"):
            if at(f"{analyzer}.{name}"):
                report(f"{analyzer}.{name}", "needs an https:// endpoint: without TLS it has no effect")
