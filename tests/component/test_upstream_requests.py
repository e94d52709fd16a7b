"""Requests to analyzers, byte for byte: what is in them, how packets share them, and when they leave."""

from __future__ import annotations

import json
import random
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upstream_harness import OK, SECOND, Desk, requests_in

from fastdist._core import COUNTER_WORDS, HISTOGRAM_BUCKETS, WORDS_PER_HISTOGRAM
from fastdist.config import SAFE_BATCH

NEVER = 1000.0  # seconds: a linger that is over in no test
ANY_BYTES = bytes(range(256))


def single(packet_id, body, attempt=1, *, target="/analyze", host="analyzer.test"):
    return (
        f"POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"X-Packet-Id: {packet_id}\r\nX-Attempt: {attempt}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def batch(ids, bodies, attempt=1):
    body = b"[" + b",".join(bodies) + b"]"
    return (
        "POST /analyze HTTP/1.1\r\nHost: analyzer.test\r\nContent-Type: application/json\r\n"
        f"X-Packet-Count: {len(ids)}\r\nX-Packet-Ids: {','.join(ids)}\r\n"
        f"X-Attempt: {attempt}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


# ---- one packet a request


def test_single_request_follows_the_contract():
    desk = Desk()
    connection = desk.connect()
    desk.push(b'{"emitterId":"e"}')
    desk.pool.pump()
    assert connection.transport.writes == [single("p1", b'{"emitterId":"e"}')]
    desk.check()


@pytest.mark.parametrize(
    ("endpoint", "target", "host"),
    [
        ("http://analyzer.test", "/", "analyzer.test"),
        ("http://analyzer.test/", "/", "analyzer.test"),
        ("http://analyzer.test:80/a/b?c=d&e", "/a/b?c=d&e", "analyzer.test"),
        ("http://analyzer.test:8080?q", "/?q", "analyzer.test:8080"),
        ("https://analyzer.test:443/x", "/x", "analyzer.test"),
        ("https://analyzer.test:80/x", "/x", "analyzer.test:80"),
        ("http://[::1]:3001/x", "/x", "[::1]:3001"),
        ("http://ANALYZER.test/Case", "/Case", "analyzer.test"),
    ],
)
def test_target_and_host_are_the_endpoints(endpoint, target, host):
    desk = Desk(endpoint)
    connection = desk.connect()
    desk.push(b"{}")
    desk.pool.pump()
    assert connection.transport.sent == single("p1", b"{}", target=target, host=host)


@pytest.mark.parametrize(
    "body", [b"", b"x", ANY_BYTES, b"\r\n\r\n", b"[" * 3, b"\0" * 100_000, "é\u20ac\U0001f600".encode()]
)
@pytest.mark.parametrize("mode", ["single", "batch"])
def test_bodies_travel_byte_for_byte(mode, body):
    desk = Desk(mode=mode)
    connection = desk.connect()
    desk.push(body)
    desk.pool.pump()
    assert connection.transport.sent == (single("p1", body) if mode == "single" else batch(["p1"], [body]))


def test_id_is_the_uuid_unless_key_is_given():
    desk = Desk(pipeline=4)
    connection = desk.connect()
    wanted = uuid.UUID("0190aBcd-ef01-7234-89ab-cdef01234567")
    assert desk.ring.push(b"1", packet_id=wanted.bytes)
    desk.pool.append(desk.ring.claim())
    desk.push(b"2", keys=["k"], packet_id=wanted.bytes)
    desk.push(b"3", keys=["K" * 64])
    desk.push(b"4", keys=["!#$%&'()*+-./:<=>?@[]^_`{|}~"])
    desk.pool.pump()
    ids = [str(wanted), "k", "K" * 64, "!#$%&'()*+-./:<=>?@[]^_`{|}~"]
    assert connection.transport.writes == [b"".join(single(name, b"%d" % n) for n, name in enumerate(ids, 1))]


@pytest.mark.parametrize("before", [0, 1, 8, 9, 98, 99, 65_534])
def test_every_attempt_is_counted(before):
    desk = Desk()
    connection = desk.connect()
    desk.push(b"{}", attempts=before)
    desk.pool.pump()
    assert connection.transport.sent == single("p1", b"{}", before + 1)


def test_attempt_grows_with_every_request():
    desk = Desk()
    (handle,) = desk.push(b"{}")
    for attempt in range(1, 13):
        connection = desk.connect()
        desk.pool.pump()
        assert connection.transport.sent == single("p1", b"{}", attempt)
        connection.close_after("because", True)
        connection.connection_lost(None)
        assert desk.owner.events[-1] == ("failed", ["p1"], "because", True, None)
        desk.owner.handles.clear()
        desk.pool.prepend(handle)
        desk.check()


# ---- several requests in one write


@pytest.mark.parametrize("pipeline", [1, 2, 3, 7, 16])
def test_pipelined_requests_leave_at_once(pipeline):
    desk = Desk(pipeline=pipeline)
    connection = desk.connect()
    bodies = [b"%d" % number * number for number in range(1, 11)]
    desk.push(*bodies)
    desk.pool.pump()
    first = min(pipeline, 10)
    wanted = [single(f"p{number}", bodies[number - 1]) for number in range(1, 11)]
    assert connection.transport.writes == [b"".join(wanted[:first])]
    assert connection.in_flight() == desk.pool.requests_in_flight == first
    desk.check()
    # One reply makes room for one, three in one read for three, which leave in one write too.
    connection.data_received(OK)
    sent = min(first + 1, 10)
    assert connection.transport.sent == b"".join(wanted[:sent])
    if pipeline >= 3:
        connection.data_received(OK * 3)
        assert len(connection.transport.writes) == (3 if sent < 10 else 1)
    while connection.in_flight():
        connection.data_received(OK)
        desk.check()
    assert connection.transport.sent == b"".join(wanted)
    assert desk.ring.undone == 0


def test_the_circle_of_requests_comes_round():
    desk = Desk(pipeline=3)
    connection = desk.connect()
    desk.push(*[b"%d" % number for number in range(40)])
    desk.pool.pump()
    source = random.Random(3)
    while connection.in_flight():
        connection.data_received(OK * source.randint(1, connection.in_flight()))
        desk.check()
    assert connection.transport.sent == b"".join(single(f"p{number + 1}", b"%d" % number) for number in range(40))
    assert desk.counters.get_of(1, "delivered") == 40


# ---- batches


def test_a_batch_is_what_the_contract_says():
    desk = Desk(mode="batch")
    connection = desk.connect()
    bodies = [b'{"n":1}', b" [] ", b'"\xc3\xa9"', b"", b"0"]
    desk.push(*bodies)
    desk.pool.pump()
    assert connection.transport.writes == [batch(["p1", "p2", "p3", "p4", "p5"], bodies)]
    desk.check()
    connection.data_received(OK)
    assert desk.ring.undone == 0
    assert desk.counters.get_of(1, "delivered") == 5
    assert desk.counters.get_of(1, "bytes_delivered") == sum(map(len, bodies))


def test_batch_states_its_highest_attempt():
    desk = Desk(mode="batch", linger=0)
    connection = desk.connect()
    for attempts in (0, 6, 2):
        desk.push(b"0", attempts=attempts)
    desk.pool.pump()
    assert connection.transport.sent == batch(["p1", "p2", "p3"], [b"0"] * 3, 7)
    desk.push(b"1")
    connection.data_received(OK)
    assert connection.transport.writes[1] == batch(["p4"], [b"1"], 1)


def test_ids_of_any_length_share_a_batch():
    desk = Desk(mode="batch", batch_packets=500)
    connection = desk.connect()
    keys = ["k" * (1 + number % 64) for number in range(500)]
    desk.push(*[b"7"] * 500, keys=keys)
    desk.pool.pump()
    assert connection.transport.sent == batch(keys, [b"7"] * 500)


def test_largest_silent_batch_has_8_kib_head():
    desk = Desk(mode="batch", batch_packets=SAFE_BATCH)
    connection = desk.connect()
    desk.push(*[b"7"] * SAFE_BATCH, keys=[f"{number:064}" for number in range(SAFE_BATCH)])
    desk.pool.pump()
    (request,) = connection.transport.requests
    assert len(request.ids) == SAFE_BATCH
    assert connection.transport.sent.index(b"\r\n\r\n") + 4 < 8192 - 200  # what is left is for a host and a path


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 13])
def test_a_batch_has_at_most_batch_packets(count):
    desk = Desk(mode="batch", batch_packets=4, pipeline=8)
    connection = desk.connect()
    desk.push(*[b"%d" % number for number in range(count)])
    desk.pool.pump()
    # The first leaves at once; what would not fill another waits while that is under way.
    sizes = [len(request.ids) for request in connection.transport.requests]
    assert sizes == [4] * (count // 4) + ([count % 4] if count < 4 else [])
    assert desk.pool.waiting == (count % 4 if count > 4 else 0)
    desk.check()


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([100], [1]),
        ([101], [1]),
        ([5000], [1]),
        ([50, 50], [2]),
        ([50, 51], [1, 1]),
        ([40, 40, 40], [2, 1]),
        ([5000, 1], [1, 1]),
        ([1, 5000, 1], [1, 1, 1]),
        ([100, 100, 100], [1, 1, 1]),
        ([0, 0, 100, 0], [4]),
        ([60, 30, 10, 1], [3, 1]),
        ([99, 2, 98], [1, 2]),
    ],
)
def test_batch_is_within_batch_bytes_or_one(sizes, groups):
    desk = Desk(mode="batch", batch_bytes=100, linger=0, pipeline=8)
    connection = desk.connect()
    bodies = [b"x" * size for size in sizes]
    desk.push(*bodies)
    desk.pool.pump()
    requests = connection.transport.requests
    assert [len(request.ids) for request in requests] == groups
    assert b"".join(request.body[1:-1].replace(b",", b"") for request in requests) == b"".join(bodies)
    desk.check()


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 130),
    st.integers(1, 4),
    st.sampled_from(["single", "batch"]),
)
def test_limits_keep_order_and_send_once(sizes, batch_packets, batch_bytes, pipeline, mode):
    desk = Desk(
        mode=mode, batch_packets=batch_packets, batch_bytes=batch_bytes, pipeline=pipeline, linger=0, capacity=1 << 16
    )
    connection = desk.connect()
    bodies = [b"%d" % (size % 10) * size for size in sizes]
    desk.push(*bodies)
    desk.pool.pump()
    while connection.in_flight():
        assert connection.in_flight() <= pipeline
        connection.data_received(OK)
        desk.check()
    requests = requests_in(connection.transport.sent)
    assert [name for request in requests for name in request.ids] == [f"p{n}" for n in range(1, len(sizes) + 1)]
    left = list(bodies)
    for request in requests:
        mine, left = left[: len(request.ids)], left[len(request.ids) :]
        assert request.body == (b"[" + b",".join(mine) + b"]" if mode == "batch" else mine[0])
        assert len(mine) == 1 or (len(mine) <= batch_packets and sum(map(len, mine)) <= batch_bytes)
    assert desk.ring.undone == 0


def test_packet_marked_alone_goes_as_single():
    desk = Desk(mode="batch", pipeline=8, linger=0)
    handles = desk.push(b"1", b"2", b"3")
    assert desk.pool.take_request() == handles
    for handle in reversed(handles):
        desk.pool.prepend(handle, alone=handle != handles[2])
    desk.push(b"4")
    connection = desk.connect()
    desk.pool.pump()
    assert connection.transport.writes == [single("p1", b"1") + single("p2", b"2") + batch(["p3", "p4"], [b"3", b"4"])]
    desk.check()


def test_batch_ends_before_one_marked_alone():
    desk = Desk(mode="batch", pipeline=8, linger=0)
    first, second, third = desk.push(b"1", b"2", b"3")
    assert desk.pool.take_request() == [first, second, third]
    desk.pool.append(first)
    desk.pool.prepend(second, alone=True)
    assert desk.pool.take_request() == [second]
    desk.pool.prepend(second)  # once alone, always alone
    assert desk.pool.take_request() == [second]
    desk.pool.append(second)
    desk.pool.append(third)
    assert [desk.pool.take_request() for _ in range(4)] == [[first], [second], [third], []]
    desk.owner.handles += [first, second, third]
    desk.check()


# ---- linger


def busy_desk(**delivery):
    """Return a desk with one request in flight, and a connection to spare."""
    desk = Desk(mode="batch", **{"linger": NEVER, "batch_packets": 4, "batch_bytes": 100} | delivery)
    first, second = desk.connect(), desk.connect()
    desk.push(b"first")
    desk.pool.pump()
    return desk, *sorted((first, second), key=lambda each: -each.in_flight())


def test_idle_analyzer_gets_one_at_once():
    desk, busy, _ = busy_desk(linger=0.5)
    assert busy.transport.sent == batch(["p1"], [b"first"])
    busy.data_received(OK)
    time.sleep(0.55)
    desk.push(b"second")
    desk.pool.pump()
    assert busy.transport.sent.endswith(batch(["p2"], [b"second"]))


def test_first_packet_waits_for_no_more():
    desk = Desk(mode="batch", linger=1e9)  # longer than any machine has been up
    connection = desk.connect()
    desk.push(b"1")
    desk.pool.pump()
    assert len(connection.transport.writes) == 1


def test_analyzer_is_busy_a_linger_per_batch():
    """However fast it answers: it would get the packets of every event-loop iteration one by one."""
    desk, busy, _ = busy_desk()
    busy.data_received(OK)
    desk.push(b"2")
    desk.pool.pump()
    assert len(busy.transport.writes) == 1
    desk.push(b"3", b"4", b"5")
    desk.pool.pump()
    assert busy.transport.writes[1] == batch(["p2", "p3", "p4", "p5"], [b"2", b"3", b"4", b"5"])


def test_batch_waits_while_analyzer_is_busy():
    desk, busy, spare = busy_desk()
    for body in (b"2", b"3", b"4"):
        desk.push(body)
        desk.pool.pump()
        assert not spare.transport.writes
    desk.push(b"5")
    desk.pool.pump()
    assert spare.transport.writes == [batch(["p2", "p3", "p4", "p5"], [b"2", b"3", b"4", b"5"])]
    assert len(busy.transport.writes) == 1
    desk.check()


def test_batch_leaves_when_it_has_its_bytes():
    desk, _, spare = busy_desk()
    desk.push(b"x" * 99)
    desk.pool.pump()
    assert not spare.transport.writes
    desk.push(b"y")
    desk.pool.pump()
    assert spare.transport.writes == [batch(["p2", "p3"], [b"x" * 99, b"y"])]


def test_batch_leaves_when_first_lingered():
    desk, _, spare = busy_desk(linger=0.5)
    desk.push(b"2")
    desk.pool.pump()
    assert not spare.transport.writes
    time.sleep(0.55)
    desk.push(b"3")  # has not, but goes with it
    desk.pool.pump()
    assert spare.transport.writes == [batch(["p2", "p3"], [b"2", b"3"])]


def test_linger_of_0_waits_for_nothing():
    desk, _, spare = busy_desk(linger=0)
    desk.push(b"2")
    desk.pool.pump()
    assert spare.transport.writes == [batch(["p2"], [b"2"])]


def test_reply_sends_what_waited_long_enough():
    desk, busy, spare = busy_desk(linger=0.5)
    desk.push(b"2")
    desk.pool.pump()
    assert not spare.transport.writes
    time.sleep(0.55)
    busy.data_received(OK)
    assert busy.transport.writes[1] == batch(["p2"], [b"2"])


def test_batch_left_by_a_reply_is_sent_later():
    """All connections were busy when it came, so that no timer runs; the one that is free now is not to forget it."""
    desk = Desk(mode="batch", linger=NEVER, batch_packets=2, connections=2)
    for _ in range(2):
        desk.connect()
    desk.push(*[b"0"] * 4)
    desk.pool.pump()
    busy = list(desk.pool.connections)
    assert [each.in_flight() for each in busy] == [1, 1]
    desk.push(b"5")
    desk.pool.pump()
    before = desk.owner.wakes
    busy[0].data_received(OK)
    assert desk.pool.waiting == 1
    assert desk.owner.wakes > before  # the owner will see that it lingers
    desk.check()


def test_single_mode_never_lingers():
    desk = Desk(linger=NEVER)
    first, second = desk.connect(), desk.connect()
    desk.push(b"1", b"2")
    desk.pool.pump()
    assert [first.in_flight(), second.in_flight()] == [1, 1]


# ---- the list


def test_a_paused_pool_sends_nothing():
    desk = Desk()
    connection = desk.connect()
    desk.push(b"1", b"2")
    desk.pool.pump()
    desk.pool.paused = True
    connection.data_received(OK)
    desk.pool.pump()
    assert desk.pool.waiting == 1
    assert len(connection.transport.writes) == 1
    desk.pool.paused = False
    desk.pool.pump()
    assert len(connection.transport.writes) == 2


def test_waiting_counts_follow_the_list():
    desk = Desk()
    first, second = desk.push(b"12345", b"678")
    assert (desk.pool.waiting, desk.pool.waiting_bytes) == (2, 8)
    assert desk.pool.take_request() == [first]
    assert (desk.pool.waiting, desk.pool.waiting_bytes) == (1, 3)
    desk.pool.prepend(first)
    assert desk.pool.release_waiting() == 2
    assert (desk.pool.waiting, desk.pool.waiting_bytes) == (0, 0)
    assert [desk.ring.claim(), desk.ring.claim()] == [first, second]  # in order


def test_queue_wait_is_measured_once():
    desk = Desk()
    desk.push(b"{}", accepted_ns=time.time_ns() - 3 * SECOND)
    desk.push(b"{}", attempts=1, accepted_ns=time.time_ns() - 3 * SECOND)
    for _ in range(2):
        desk.connect()
    desk.pool.pump()
    row = desk.block.row(0)
    histogram = COUNTER_WORDS + WORDS_PER_HISTOGRAM  # behind the counters and the histogram of ingest
    count, _, largest = row[histogram + HISTOGRAM_BUCKETS : histogram + HISTOGRAM_BUCKETS + 3]
    assert count == 1
    assert 2 * SECOND <= largest < 60 * SECOND


def test_requests_are_json_when_packets_are():
    desk = Desk(mode="batch")
    connection = desk.connect()
    packets = [{"emitterId": f"e{number}", "messages": [{"message": "é" * number}]} for number in range(30)]
    desk.push(*[json.dumps(packet, ensure_ascii=False).encode() for packet in packets])
    desk.pool.pump()
    (request,) = connection.transport.requests
    assert json.loads(request.body) == packets
