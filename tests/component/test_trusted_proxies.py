"""X-Forwarded-For of trusted proxies: whose a request is, for limits, for changes and in the log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from ingest_harness import BODY, RECORDS, Service, head, post

from fastdist.net.proxies import TrustedProxies

NETWORKS = ("10.0.0.0/8", "127.0.0.0/8")
PROXY = "10.0.0.1"


def service(**limits):
    return Service(trusted_proxies=NETWORKS, limits=limits or {"client_rate": 0.001, "client_burst": 1})


def of(client, first="POST /logs", body=BODY):
    return post(body, f"X-Forwarded-For: {client}", first=first)


def test_rates_are_those_of_the_clients():
    it = service()
    proxy = it.connect(PROXY).send(of("192.0.2.1"), of("192.0.2.1"), of("192.0.2.2"), post(), post())
    assert proxy.statuses == [202, 429, 202, 202, 429], "without one, a request is the proxy's own"
    assert it.connect("10.9.9.9").send(of("192.0.2.2")).statuses == [429], "another proxy, the same client"
    assert it.connect("192.0.2.2").send(post()).statuses == [429], "and without a proxy"


def test_others_are_not_believed():
    it = service()
    assert it.connect("192.0.2.9").send(of("192.0.2.1"), of("192.0.2.2")).statuses == [202, 429]
    assert it.connect(PROXY).send(of("192.0.2.1")).statuses == [202]


def test_without_networks_none_is_believed():
    it = Service(limits={"client_rate": 0.001, "client_burst": 1})
    connection = it.connect(PROXY)
    assert connection.protocol.forwarded is None
    assert connection.send(of("192.0.2.1"), of("192.0.2.2")).statuses == [202, 429]


def test_agents_are_told_apart_too():
    it = service()
    records = [of(client, "POST /ingest", RECORDS) for client in ("192.0.2.1", "192.0.2.1", "192.0.2.2")]
    assert it.connect(PROXY).send(*records).statuses == [200, 503, 200], "503 is what they try again after"


def test_several_fields_are_one_list():
    it = service()
    forged, real, hop = (f"X-Forwarded-For: {each}" for each in ("192.0.2.1", "192.0.2.7", "10.0.0.2"))
    proxy = it.connect(PROXY)
    proxy.send(post(BODY, forged, real, hop), post(BODY, forged, hop, real), post(BODY, real, forged))
    assert proxy.statuses == [202, 429, 202]
    assert proxy.protocol.address == "192.0.2.1"


def test_local_proxy_makes_no_client_local():
    """Changes come from this machine only, and what a proxy on it passes on does not."""
    it = service()
    change = head("PATCH /analyzers/A1", "X-Forwarded-For: 192.0.2.1", "Content-Length: 2") + b"{}"
    assert it.connect("127.0.0.1").send(change).answer().status == 403
    local = change.replace(b"192.0.2.1", b"127.0.0.1")
    assert it.connect("127.0.0.1").send(local).answer().status == 422, "it may ask, but not for that"
    assert it.connect(PROXY).send(local).answer().status == 403, "this machine, says another one"


FIELDS = st.lists(
    st.sampled_from(["192.0.2.1", "192.0.2.2", "10.0.0.2", "192.0.2.1, 10.0.0.7", "2001:db8::1", "unknown", "", "x,"]),
    max_size=3,
)
REQUESTS = st.lists(st.tuples(FIELDS, st.sampled_from(["POST /logs", "POST /ingest", "GET /health"])), max_size=8)


@given(REQUESTS, st.sampled_from([PROXY, "127.0.0.1", "192.0.2.3"]), st.data())
def test_each_request_has_its_own_client(requests, peer, data):
    """As a slow, obvious model has it, whatever was read before, and in whatever pieces it comes."""
    trusted = TrustedProxies(NETWORKS)
    connection = Service(trusted_proxies=NETWORKS).connect(peer)
    for fields, first in requests:
        lines = [f"X-Forwarded-For: {field}" for field in fields]
        body = RECORDS if "ingest" in first else BODY
        request = head(first, *lines) if first.startswith("GET") else post(body, *lines, first=first)
        cut = data.draw(st.integers(0, len(request)))
        connection.send(request[:cut], request[cut:])
        wanted = trusted.client(",".join(fields), peer) if trusted.trusts(peer) else peer
        assert connection.protocol.address == wanted
    assert len(connection.answers()) == len(requests)
