"""Who the client is behind a proxy: X-Forwarded-For, and headers of the PROXY protocol."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from proxying import BAD, GOOD, version_2

from fastdist.net import proxies
from fastdist.net.proxies import SIGNATURE, Header, TrustedProxies, parse_header

TRUSTED = TrustedProxies(["127.0.0.1", "10.0.0.0/8", "2001:db8::/32"])

# ---- X-Forwarded-For


def test_no_networks_trust_no_one():
    assert not TrustedProxies([])
    assert TRUSTED
    assert not TrustedProxies([]).trusts("127.0.0.1")


@pytest.mark.parametrize(
    ("address", "trusted"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", False),
        ("10.255.0.1", True),
        ("11.0.0.1", False),
        ("::ffff:10.0.0.1", True),
        ("2001:db8::7", True),
        ("2001:db9::7", False),
        ("::1", False),
        ("", False),
        ("localhost", False),
    ],
)
def test_networks_that_are_trusted(address, trusted):
    assert TRUSTED.trusts(address) is trusted


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("", "10.0.0.1"),
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7, 10.0.0.9", "192.0.2.7"),
        ("203.0.113.5, 192.0.2.7, 10.0.0.9", "192.0.2.7"),  # what the client has sent itself is not believed
        ("127.0.0.1,192.0.2.7", "192.0.2.7"),
        ("10.0.0.3, 10.0.0.2", "10.0.0.3"),  # all of them are proxies, or the client is one
        ("192.0.2.7:5000", "192.0.2.7"),
        ("[2001:db9::1]:5000", "2001:db9::1"),
        ("2001:DB9:0::1", "2001:db9::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        (" \t192.0.2.7\t ", "192.0.2.7"),
        ("unknown", "10.0.0.1"),
        ("192.0.2.7, unknown, 10.0.0.2", "10.0.0.2"),
        ("192.0.2.7,", "10.0.0.1"),
        ("192.0.2.300", "10.0.0.1"),
        ("fe80::1%eth0", "10.0.0.1"),
        ("127.0.0.1", "10.0.0.1"),  # this machine, says another
        ("::1", "10.0.0.1"),
        ("10.0.0.2," * 100 + "10.0.0.2", "10.0.0.2"),
    ],
)
def test_client_is_the_last_that_is_no_proxy(forwarded, client):
    assert TRUSTED.client(forwarded, "10.0.0.1") == client


def test_local_client_is_a_local_proxys_only():
    assert TRUSTED.client("127.0.0.5", "127.0.0.1") == "127.0.0.5"
    assert proxies.believed("127.0.0.5", "::1") == "127.0.0.5"
    assert proxies.believed("::1", "192.0.2.1") == "192.0.2.1"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("127.0.0.1, 10.0.0.5", "10.0.0.5"),  # what another machine has sent to the local proxy
        ("::1, 127.0.0.1, 10.0.0.5, 127.0.0.1", "10.0.0.5"),
        ("unknown", "0.0.0.0"),  # a client that is not told is not this machine
        ("fe80::1%eth0", "0.0.0.0"),
        ("::1%lo", "0.0.0.0"),
        ("192.0.2.7,", "0.0.0.0"),
        ("192.0.2.7, unknown, 10.0.0.2", "10.0.0.2"),
        ("", "127.0.0.1"),  # the proxy itself, for example its health check
    ],
)
def test_local_proxy_makes_no_others_local(forwarded, client):
    assert TRUSTED.client(forwarded, "127.0.0.1") == client


@given(st.text(), st.ip_addresses().map(str))
def test_any_field_names_an_address(forwarded, proxy):
    client = TRUSTED.client(forwarded, proxy)
    assert client == proxy or ipaddress.ip_address(client)


@given(st.text(alphabet="0123456789.,: \t[]af"), st.ip_addresses(v=4, network="192.0.2.0/24").map(str))
def test_what_clients_send_changes_nothing(sent, address):
    """A proxy appends the address that it sees to what the client has sent."""
    assert TRUSTED.client(f"{sent}, {address}", "10.0.0.1") == address


# ---- the PROXY protocol


@pytest.mark.parametrize("kind", GOOD)
def test_header_is_read_whatever_has_come(kind):
    """Up to its last byte it is not whole, and what follows is not looked at."""
    data, client = GOOD[kind]
    for end in range(len(data)):
        assert parse_header(data[:end]) is None
    for rest in (b"", b"P", b"POST /logs HTTP/1.1\r\n", data):
        assert parse_header(data + rest) == Header(len(data), client)


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_header_is_an_error(kind):
    data = BAD[kind]
    with pytest.raises(ValueError, match="PROXY header"):
        parse_header(data)
    for end in range(len(data)):  # at some byte it is seen to be none, and then remains so
        try:
            assert parse_header(data[:end]) is None
        except ValueError:
            break
    for later in range(end + 1, len(data)):
        with pytest.raises(ValueError, match="PROXY header"):
            parse_header(data[:later])


MUTATED = st.builds(
    lambda data, at, byte: data[: at % len(data)] + bytes([byte]) + data[at % len(data) + 1 :],
    st.sampled_from([data for data, _ in GOOD.values()]),
    st.integers(0, 2047),
    st.integers(0, 255),
)


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(SIGNATURE.__add__), MUTATED))
@example(b"PROXY TCP4 \xff \xff 1 2\r\n")
def test_any_bytes_are_a_header_or_an_error(data):
    """And a longer piece of the same never is another thing than a shorter."""
    found = None
    for end in range(len(data) + 1):
        try:
            header = parse_header(data[:end])
        except ValueError:
            assert found is None
            return
        assert found is None or header == found
        if header is not None and found is None:
            assert header.length == end
            assert header.client is None or ipaddress.ip_address(header.client[0])
            found = header


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=99))
def test_both_versions_say_the_same(client, server, port, other, rest):
    server = ipaddress.ip_address(int(server) % 2**32) if client.version == 4 else ipaddress.IPv6Address(int(server))
    kind, family = ("TCP4", 1) if client.version == 4 else ("TCP6", 2)
    first = f"PROXY {kind} {client} {server} {port} {other}\r\n".encode()
    second = version_2(family=family, addresses=client.packed + server.packed + port.to_bytes(2, "big") + bytes(2))
    one, two = parse_header(first + rest), parse_header(second + rest)
    assert one.client[1] == two.client[1] == port
    assert ipaddress.ip_address(one.client[0]) == ipaddress.ip_address(two.client[0]) == client
