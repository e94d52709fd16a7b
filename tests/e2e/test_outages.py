"""No analyzer at all, and a queue that fills: what was accepted is held, what cannot be is refused."""

from __future__ import annotations

import pytest
from support import WEIGHTS, Emitter, compare, get_json, own_body, request, wait_until


def held(packets):
    return packets["queued"] + packets["inFlight"]


@pytest.mark.parametrize(
    "fault", [{"refuse": True}, {"status": 500, "unhealthy": True}, {"hang": True, "healthHang": True}]
)
def test_packets_wait_while_all_are_down(mocks, serve, fault):
    fastdist = serve(mocks, {"retry": {"cap": "1s"}, "health": {"timeout": "500ms"}})
    mocks.set_all(**fault)
    fastdist.wait_for_states("offline")
    health = get_json(fastdist.port, "/health")
    assert (health["status"], health["analyzers"]) == ("unavailable", {"online": 0, "total": 4})
    emitter = Emitter(fastdist.port).send(2000)
    assert emitter.count(202) == 2000
    wait_until(lambda: held(fastdist.stats()["packets"]) == 2000, "all are counted as held")
    assert fastdist.stats()["packets"]["accepted"] == 2000
    queue = get_json(fastdist.port, "/queue")
    assert queue["packets"] + queue["inFlight"] == 2000
    assert queue["oldestAgeSeconds"] > 0
    assert queue["bytes"] > 0
    assert request(fastdist.port, "GET", "/ready")[0] == 200
    mocks.set_all(**{name: None if name == "status" else False for name in fault})
    fastdist.wait_for_states("online")
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["delivered"] == 2000
    compare(emitter, mocks)
    assert get_json(fastdist.port, "/health")["status"] == "ok"
    assert get_json(fastdist.port, "/queue")["oldestAgeSeconds"] == 0


def test_absent_analyzers_lose_nothing(fleet, serve):
    for name in WEIGHTS:
        fleet.end(name)
    fastdist = serve(fleet)
    emitter = Emitter(fastdist.port).send(500)
    assert emitter.count(202) == 500
    for name in WEIGHTS:
        fleet.restart(name)
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["delivered"] == 500
    compare(emitter, fleet)


def test_full_queue_refuses_drops_nothing(mocks, serve):
    fastdist = serve(mocks, {"queue": {"capacity": "1MiB"}})
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port, connections=32).send(4000)
    accepted, refused = emitter.count(202), emitter.count(503)
    assert accepted + refused == 4000
    assert refused > 100
    assert emitter.without_retry_after == 0
    stats = fastdist.stats()
    assert stats["packets"]["accepted"] == accepted
    assert stats["rejected"]["queueFull"] == stats["packets"]["rejected"] == refused
    status, headers, body = request(fastdist.port, "GET", "/ready")
    assert (status, headers["content-type"]) == (503, "application/problem+json")
    assert b"full" in body
    assert get_json(fastdist.port, "/health")["status"] == "unavailable"
    queue = get_json(fastdist.port, "/queue")
    assert 0.7 * queue["capacityBytes"] < queue["bytes"] <= queue["capacityBytes"]

    mocks.set_all(refuse=False)
    fastdist.wait_at_rest()
    compare(emitter, mocks)
    wait_until(lambda: request(fastdist.port, "GET", "/ready")[0] == 200, "ready again")
    assert fastdist.post()[0] == 202


@pytest.mark.parametrize("durability", ["memory", "disk", "fsync"])
def test_post_ready_and_queue_agree(mocks, serve, durability):
    """At every moment, however seldom the queue is synced; room that has become free stays while nothing is posted."""
    fastdist = serve(
        mocks,
        {"queue": {"capacity": "1MiB", "durability": durability, "sync_interval": "1h"}, "server": {"workers": 1}},
    )
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")

    def look():
        full = get_json(fastdist.port, "/queue")["full"]
        ready, headers, _ = request(fastdist.port, "GET", "/ready")
        posted, post_headers, _ = fastdist.post(body)
        return full, ready == 503, posted == 503, headers.get("retry-after"), post_headers.get("retry-after")

    body = own_body("e").replace(b"caf", 10_000 * b"x")
    for _ in range(200):
        if (seen := look())[2]:
            break
        assert seen == (False, False, False, None, None)
    for _ in range(3):
        assert look() == (True, True, True, "30", "30"), "nothing leaves: not soon"
    mocks.set_all(refuse=False, latency=0.02)
    for _ in range(200):
        full, unready, refused, _, wait = look()
        assert full >= unready >= refused, (full, unready, refused)
        assert wait is None or 1 <= int(wait) <= 30
    wait_until(lambda: not held(fastdist.stats()["packets"]), "all is delivered")
    assert look()[:3] == (False, False, False)
    wait_until(lambda: get_json(fastdist.port, "/queue")["bytes"] == 0, "what is delivered takes no room")


def test_full_queue_recovers_without_traffic(mocks, serve):
    """What no analyzer takes is moved out of the way of the room behind it, and that is synced at once."""
    settings = {"queue": {"capacity": "1MiB", "sync_interval": "1h"}, "server": {"workers": 1}}
    fastdist = serve(mocks, settings | {"delivery": {"connections": 1, "timeout": "100s"}})
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    emitter = Emitter(fastdist.port, connections=8)
    wait_until(lambda: emitter.send(100).count(503) > 0, "the queue is full")
    assert request(fastdist.port, "GET", "/ready")[0] == 503
    mocks.set("A1", refuse=False, hang=True)
    wait_until(lambda: fastdist.stats()["packets"]["inFlight"] == 1, "A1 has the first packet, and keeps it")
    assert request(fastdist.port, "PATCH", "/analyzers/A1", b'{"state":"draining"}')[0] == 200
    for name in ("A2", "A3", "A4"):
        mocks.set(name, refuse=False)
    wait_until(lambda: held(fastdist.stats()["packets"]) == 1, "the others take the rest")
    # Less than an eighth: of the last packets some may lie behind it, if it was moved while they were accepted.
    wait_until(lambda: get_json(fastdist.port, "/queue")["bytes"] < 1 << 17, "the room is free")
    wait_until(lambda: request(fastdist.port, "GET", "/ready")[0] == 200, "ready again")
    assert fastdist.post(Prefer="wait=20")[0] == 200
    mocks.set("A1", refuse=True)  # which breaks the connection: another gets the packet, under its id
    wait_until(lambda: held(fastdist.stats()["packets"]) == 0, "nothing is left")


def test_packet_over_half_part_is_too_large(mocks, serve):
    fastdist = serve(mocks, {"queue": {"capacity": "1MiB"}})
    large = b'{"emitterId":"e","messages":[{"message":"%s"}]}' % (b"x" * 300_000)
    assert fastdist.post(large)[0] == 413
    fits = b'{"emitterId":"e","messages":[{"message":"%s"}]}' % (b"x" * 200_000)
    answers = [fastdist.post(fits, Prefer="wait=20")[0] for _ in range(20)]
    assert answers == [200] * 20, "there is room again once the one before is delivered"
    assert fastdist.stats()["rejected"]["tooLarge"] == 1


@pytest.mark.slow
def test_outage_beyond_the_queue_under_load(mocks, serve):
    """Emitters go on through all of it and see only 202 and 503."""
    fastdist = serve(mocks, {"queue": {"capacity": "2MiB"}, "retry": {"cap": "500ms"}})
    emitter = Emitter(fastdist.port, connections=32, pause=0).start().wait_for(500)
    for _ in range(2):
        mocks.set_all(refuse=True)
        before = emitter.count(503)
        wait_until(lambda before=before: emitter.count(503) > before + 50, "the queue is full")
        mocks.set_all(refuse=False)
        emitter.wait_for(3000)
    emitter.stop()
    assert {*emitter.answers.values()} == {202, 503}
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["accepted"] == emitter.count(202)
    assert stats["rejected"]["queueFull"] == emitter.count(503)
    compare(emitter, mocks)
