"""Headers of the PROXY protocol, good and bad, by name."""

from __future__ import annotations

import socket

from fastdist.net.proxies import MAX_2, SIGNATURE


def version_2(*, command=1, family=1, transport=1, addresses=b"", more=b"", version=2, length=None):  # noqa: PLR0913
    size = len(addresses + more) if length is None else length
    return (
        SIGNATURE
        + bytes([version << 4 | command, family << 4 | transport])
        + size.to_bytes(2, "big")
        + addresses
        + more
    )


def inet(client, port, server="10.0.0.1", server_port=3000):
    kind = socket.AF_INET6 if ":" in client else socket.AF_INET
    ports = port.to_bytes(2, "big") + server_port.to_bytes(2, "big")
    return socket.inet_pton(kind, client) + socket.inet_pton(kind, server) + ports


TLV = b"\x04\x00\x03abc"
GOOD = {
    "TCP4": (b"PROXY TCP4 192.0.2.7 10.0.0.1 56324 443\r\n", ("192.0.2.7", 56324)),
    "TCP6": (b"PROXY TCP6 2001:db8::7 ::1 0 65535\r\n", ("2001:db8::7", 0)),
    "UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "UNKNOWN, and more": (b"PROXY UNKNOWN ffff:f::ff x 65535 y\r\n", None),
    "longest": (
        b"PROXY TCP6 " + b" ".join([b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"] * 2) + b" 65535 65535\r\n",
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535),
    ),
    "IPv4": (version_2(addresses=inet("192.0.2.7", 56324)), ("192.0.2.7", 56324)),
    "IPv4, with TLVs": (version_2(addresses=inet("192.0.2.7", 1), more=TLV * 20), ("192.0.2.7", 1)),
    "IPv6": (version_2(family=2, addresses=inet("2001:db8::7", 9, "::1")), ("2001:db8::7", 9)),
    "datagram": (version_2(transport=2, addresses=inet("192.0.2.7", 5)), ("192.0.2.7", 5)),
    "UNIX": (version_2(family=3, addresses=b"/a".ljust(108, b"\0") + b"/b".ljust(108, b"\0")), None),
    "unspecified": (version_2(family=0, transport=0), None),
    "unspecified, with TLVs": (version_2(family=0, transport=0, more=TLV), None),
    "LOCAL": (version_2(command=0, family=0, transport=0), None),
    "LOCAL, with an address": (version_2(command=0, addresses=inet("192.0.2.7", 5)), None),
    "LOCAL, of an unknown family": (version_2(command=0, family=9, more=b"x"), None),
    "largest": (version_2(addresses=inet("192.0.2.7", 1), more=bytes(MAX_2 - 28)), ("192.0.2.7", 1)),
}
BAD = {
    "HTTP": b"GET / HTTP/1.1\r\n",
    "TLS": b"\x16\x03\x01\x02\x00",
    "lower case": b"proxy TCP4 192.0.2.7 10.0.0.1 56324 443\r\n",
    "no space": b"PROXY\r\n",
    "no kind": b"PROXY \r\n",
    "UDP": b"PROXY UDP4 192.0.2.7 10.0.0.1 1 2\r\n",
    "two spaces": b"PROXY TCP4  192.0.2.7 10.0.0.1 1 2\r\n",
    "too few": b"PROXY TCP4 192.0.2.7 10.0.0.1 1\r\n",
    "too many": b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2 3\r\n",
    "IPv6 as TCP4": b"PROXY TCP4 2001:db8::7 ::1 1 2\r\n",
    "IPv4 as TCP6": b"PROXY TCP6 192.0.2.7 10.0.0.1 1 2\r\n",
    "zone": b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
    "no address": b"PROXY TCP4 x 10.0.0.1 1 2\r\n",
    "no address of the server": b"PROXY TCP4 192.0.2.7 x 1 2\r\n",
    "port too large": b"PROXY TCP4 192.0.2.7 10.0.0.1 65536 2\r\n",
    "port with a zero": b"PROXY TCP4 192.0.2.7 10.0.0.1 01 2\r\n",
    "port with a sign": b"PROXY TCP4 192.0.2.7 10.0.0.1 +1 2\r\n",
    "bare LF": b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\n",
    "bare CR": b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\rx\r\n",
    "endless": b"PROXY UNKNOWN " + b"x" * 107,
    "CR LF too late": b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    "version 1 in 2": version_2(version=1),
    "version 3": version_2(version=3),
    "command": version_2(command=2),
    "family": version_2(family=4, more=bytes(300)),
    "transport": version_2(transport=3, addresses=inet("192.0.2.7", 1)),
    "short IPv4": version_2(addresses=inet("192.0.2.7", 1)[:-1]),
    "short IPv6": version_2(family=2, addresses=inet("192.0.2.7", 1)),
    "short UNIX": version_2(family=3, addresses=bytes(215)),
    "too large": version_2(addresses=inet("192.0.2.7", 1), more=bytes(MAX_2 - 27)),
    "far too large": version_2(addresses=b"", length=65535),
    "signature broken": SIGNATURE[:-1] + b"x" + version_2()[12:],
}
