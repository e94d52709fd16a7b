"""The sockets that the supervisor listens on."""

from __future__ import annotations

import socket

import pytest

from fastdist.config import load
from fastdist.supervisor.listeners import for_packets


class Ipv6Only(socket.socket):
    """A socket as the system makes it with ``net.ipv6.bindv6only=1``."""

    def __init__(self, family=socket.AF_INET, *arguments, **options):
        super().__init__(family, *arguments, **options)
        if family == socket.AF_INET6 and self.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_INET6:
            self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


@pytest.fixture
def listeners(monkeypatch):
    """Return ``listeners(host)``: those of a service with that address."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    opened = []

    def listen(host):
        config = load(None, {}, {"host": host, "port": 0}).config
        monkeypatch.setattr(socket, "socket", Ipv6Only)
        opened.extend(for_packets(config, {}, 2))
        monkeypatch.undo()
        return opened

    yield listen
    for listener in opened:
        listener.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_all_of_ipv6_includes_ipv4_always(listeners, address):
    sockets = listeners("::")
    ports = {listener.getsockname()[1] for listener in sockets}
    assert len(ports) == 1
    with socket.create_connection((address, ports.pop()), timeout=20):
        assert [listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) for listener in sockets] == [0, 0]


def test_ipv6_address_is_listened_on_alone(listeners):
    port = listeners("::1")[0].getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=20)
