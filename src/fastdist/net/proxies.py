"""Whom a connection or a request is from, when a proxy in between says so (``server.trusted_proxies``).

- Only a trusted proxy is believed: its address is in one of the networks.
- X-Forwarded-For is read from its end, which the nearest proxy has written: the client is the first address there that
  is no trusted proxy's. What stands before it any client may have sent.
- An address of this machine is believed of this machine only, since it lets make changes: not of a proxy elsewhere,
  nor of what comes to a local proxy from elsewhere. A client without an address (``unknown``) does not count as local.
- The header of the PROXY protocol (versions 1 and 2, as HAProxy describes it) is all or nothing: what is no such header
  is an error, for the protocol may not be guessed.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    Address = ipaddress.IPv4Address | ipaddress.IPv6Address

SHORT = 64  # characters of X-Forwarded-For: one address or a few
MAX_HOPS = 32  # addresses of X-Forwarded-For that are looked at
NO_ADDRESS = "0.0.0.0"  # noqa: S104  (a client whose address a proxy on this machine does not tell)
WITH_PORT = re.compile(r"\[([^\]]*)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+")

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"  # of version 2
FIXED = 16  # bytes that each header of version 2 begins with
MAX_1, MAX_2 = 107, 2048  # bytes; of version 2 with what it may have besides addresses
LOCAL, PROXY = 0, 1  # commands of version 2
UNSPECIFIED, INET, INET6, UNIX = range(4)  # address families
SIZES = {UNSPECIFIED: 0, INET: 12, INET6: 36, UNIX: 216}  # bytes of both addresses
MAX_TRANSPORT = 2  # unspecified, stream, datagram
PORTS = {INET: 8, INET6: 32}  # where that of the client is


class TrustedProxies:
    """The networks of ``server.trusted_proxies``; false if there are none."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self.trusts = functools.lru_cache(maxsize=1024)(self._trusts)
        self._known = functools.lru_cache(maxsize=4096)(self._client)  # of short fields: bounded in bytes

    def __bool__(self) -> bool:
        return bool(self._networks)

    def _trusts(self, address: str) -> bool:
        """Whether this is the address of a trusted proxy."""
        found = parse(address)
        return found is not None and any(found in network for network in self._networks)

    def client(self, forwarded: str, proxy: str) -> str:
        """Return what ``_client`` does; of the same field as some time before at once."""
        return self._known(forwarded, proxy) if len(forwarded) <= SHORT else self._client(forwarded, proxy)

    def _client(self, forwarded: str, proxy: str) -> str:
        """Return the client's address by what a trusted proxy has sent as X-Forwarded-For; its own if it names none."""
        found = proxy
        for item in reversed(forwarded.rsplit(",", MAX_HOPS)[-MAX_HOPS:]):
            address = parse(item)
            if address is None:  # a word such as "unknown", or nonsense: who it had it from is known
                return NO_ADDRESS if forwarded and is_loopback(found) else found
            if address.is_loopback and not is_loopback(found):  # another machine's word for it
                break
            found = str(address)
            if not self.trusts(found):
                break
        return found


def believed(client: str, proxy: str) -> str:
    """Return the client that a proxy names, or the proxy where it names one of a machine that is not its own."""
    return proxy if is_loopback(client) and not is_loopback(proxy) else client


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine."""
    found = parse(address)
    return found is not None and found.is_loopback


def parse(text: str) -> Address | None:
    """Return the address in ``text``, which may have a port; mapped IPv4 as IPv4. None if that is no address."""
    text = text.strip(" \t")
    if match := WITH_PORT.fullmatch(text):
        text = match[1] or match[2] or ""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address):
        return found.ipv4_mapped or (None if found.scope_id else found)
    return found


# ---- the PROXY protocol


class Header(NamedTuple):
    """A header: its length in bytes, and the client's address and port, or None for the proxy's own."""

    length: int
    client: tuple[str, int] | None


def parse_header(data: bytes) -> Header | None:
    """Return the header that ``data`` begins with; None while it is not whole. Raises ValueError if it has none."""
    if data[: len(SIGNATURE)] == SIGNATURE[: len(data)]:
        return _parse_2(data) if len(data) >= FIXED else None
    if data[:6] == b"PROXY "[: len(data)]:
        return _parse_1(data)
    raise ValueError("it does not begin with a PROXY header")


def _parse_1(data: bytes) -> Header | None:
    line, mark, _ = data[:MAX_1].partition(b"\r\n")
    if not mark:
        if len(data) >= MAX_1 or b"\n" in line:
            raise ValueError(f"a PROXY header of version 1 has to end in CR LF within {MAX_1} bytes")
        return None
    length = len(line) + len(mark)
    kind, *fields = line.decode("latin-1").split(" ")[1:]
    if kind == "UNKNOWN":
        return Header(length, None)
    version = {"TCP4": 4, "TCP6": 6}.get(kind)
    if version is None or len(fields) != 4:  # noqa: PLR2004  (two addresses and two ports)
        raise ValueError(
            "a PROXY header of version 1 has to name TCP4 or TCP6, two addresses and two ports, or UNKNOWN"
        )
    for address, port in zip(fields[:2], fields[2:], strict=True):
        try:
            right = ipaddress.ip_address(address).version == version and "%" not in address
        except ValueError:
            right = False
        if not right or not re.fullmatch(r"0|[1-9][0-9]{0,4}", port) or int(port) > 65535:  # noqa: PLR2004
            raise ValueError(f"an address or a port in a PROXY header of version 1 is not one of {kind}")
    return Header(length, (str(ipaddress.ip_address(fields[0])), int(fields[2])))


def _parse_2(data: bytes) -> Header | None:
    version, command = data[12] >> 4, data[12] & 15
    family, transport = data[13] >> 4, data[13] & 15
    length = FIXED + int.from_bytes(data[14:FIXED], "big")
    if version != 2 or command not in (LOCAL, PROXY):  # noqa: PLR2004  (the version)
        raise ValueError("a PROXY header with this signature has to be of version 2, with the command LOCAL or PROXY")
    if length > MAX_2:
        raise ValueError(f"a PROXY header of {length} bytes is larger than the {MAX_2} allowed")
    if len(data) < length:
        return None
    if command == LOCAL:
        return Header(length, None)
    if family not in SIZES or transport > MAX_TRANSPORT:
        raise ValueError("a PROXY header of version 2 has an unknown address family or transport")
    if length < FIXED + SIZES[family]:
        raise ValueError("a PROXY header of version 2 is too short for its addresses")
    if family not in PORTS:  # a client without an address for limits to go by
        return Header(length, None)
    addresses = data[FIXED : FIXED + SIZES[family]]
    kind, size = (socket.AF_INET, 4) if family == INET else (socket.AF_INET6, 16)
    at = PORTS[family]
    return Header(length, (socket.inet_ntop(kind, addresses[:size]), int.from_bytes(addresses[at : at + 2], "big")))
