"""Analyzers that fail under load: their share goes to the others and comes back, and nothing is lost."""

from __future__ import annotations

import signal
import time

import pytest
from support import WEIGHTS, Emitter, compare, get_json, kill_worker, own_body, wait_until

VICTIM = "A2"
OTHERS = {name: weight / (1 - WEIGHTS[VICTIM]) for name, weight in WEIGHTS.items() if name != VICTIM}
QUICK = {"delivery": {"timeout": "2s"}}

# What an analyzer does -> (the options of the mock, the text that /analyzers shows as its last error)
COUNTED = {
    "refuses": ({"refuse": True}, "connection refused"),
    "answers 500": ({"status": 500}, "HTTP 500"),
    "answers 503 without Retry-After": ({"status": 503}, "HTTP 503"),
    "answers 429 without Retry-After": ({"status": 429}, "HTTP 429"),
    "resets": ({"resetRate": 1}, "connection"),
    "speaks no HTTP": ({"garbageRate": 1}, "not HTTP"),
    "hangs": ({"hang": True}, "no reply within 2 s"),
}


def check_share_is_with_the_others(fastdist, name=VICTIM):
    analyzers = fastdist.analyzers()
    assert analyzers[name]["effectiveShare"] == 0
    for other, share in OTHERS.items():
        assert analyzers[other]["effectiveShare"] == pytest.approx(share, abs=1e-4)


def wait_until_its_share_is_gone(fastdist):
    wait_until(lambda: fastdist.analyzers()[VICTIM]["effectiveShare"] == 0, "its share goes to the others")


def wait_until_it_has_its_share_again(fastdist, name=VICTIM):
    wait_until(lambda: fastdist.analyzers()[name]["effectiveShare"] > 0, f"{name} has a share")
    row = fastdist.analyzers()[name]
    assert (row["state"], row["probation"]) == ("online", None)
    assert row["effectiveShare"] == pytest.approx(WEIGHTS[name])
    before = row["delivered"]
    wait_until(lambda: fastdist.analyzers()[name]["delivered"] > before + 20, f"{name} gets packets again")


@pytest.mark.slow
def test_analyzer_ends_and_returns_3_times(fleet, serve):
    for name in WEIGHTS:
        fleet.set(name, latency=0.002)  # so that requests are under way when it ends
    fastdist = serve(fleet)
    emitter = Emitter(fastdist.port).start()
    emitter.wait_for(500)
    for _ in range(3):
        fleet.end(VICTIM)
        wait_until_its_share_is_gone(fastdist)
        check_share_is_with_the_others(fastdist)
        row = fastdist.analyzers()[VICTIM]
        assert row["state"] == "offline"
        assert row["lastError"]
        wait_until(lambda: fastdist.analyzers()[VICTIM]["health"]["consecutiveFailures"] > 0, "a check has failed too")
        before = {name: each["delivered"] for name, each in fastdist.analyzers().items()}
        emitter.wait_for(1000)
        after = {name: each["delivered"] for name, each in fastdist.analyzers().items()}
        assert after[VICTIM] == before[VICTIM]
        assert all(after[name] > before[name] for name in OTHERS)
        fleet.restart(VICTIM)
        wait_until_it_has_its_share_again(fastdist)
        assert fastdist.analyzers()[VICTIM]["health"]["consecutiveSuccesses"] >= 2
    emitter.stop()
    assert emitter.count(202) == len(emitter.answers)
    fastdist.wait_at_rest()
    compare(emitter, fleet)  # an answer that is cut off before its head is whole was none: no duplicates
    assert "analyzer offline" in fastdist.output
    assert "resolved: analyzer offline" in fastdist.output


@pytest.mark.slow
@pytest.mark.parametrize("fault", COUNTED)
def test_failing_analyzer_is_down_and_back(mocks, serve, fault):
    """Its health check is answered all the while (unless it refuses): deliveries alone take it offline."""
    options, error = COUNTED[fault]
    patient = {"interval": "100ms", "rise": 2 if "refuse" in options else 20}  # time to look before it is tried again
    fastdist = serve(mocks, QUICK | {"health": patient})
    emitter = Emitter(fastdist.port).start().wait_for(200)
    mocks.set(VICTIM, **options)
    wait_until_its_share_is_gone(fastdist)
    check_share_is_with_the_others(fastdist)
    row = fastdist.analyzers()[VICTIM]
    assert row["state"] == "offline"
    # A reset of a kept connection may have been seen last; the next check sees what it does now.
    wait_until(lambda: error in fastdist.analyzers()[VICTIM]["lastError"], f"its last error is {error}")
    assert row["failed"] > 0
    emitter.wait_for(500)
    mocks.set(VICTIM, **{name: 0 if name.endswith("Rate") else None if name == "status" else False for name in options})
    wait_until_it_has_its_share_again(fastdist)
    emitter.stop()
    assert emitter.count(202) == len(emitter.answers)
    stats = fastdist.wait_at_rest()
    compare(emitter, mocks)  # none of these faults leaves a packet delivered that is thought not to be
    assert stats["packets"]["retried"] > 0
    assert stats["packets"]["deadLettered"] == 0


@pytest.mark.slow
def test_stopped_analyzer_is_down_and_back(fleet, serve):
    """SIGSTOP: the kernel still accepts connections, but nothing answers. What it reads later it delivers twice."""
    fastdist = serve(fleet, QUICK)
    emitter = Emitter(fastdist.port).start().wait_for(200)
    fleet.each[VICTIM].signal(signal.SIGSTOP)
    wait_until_its_share_is_gone(fastdist)
    check_share_is_with_the_others(fastdist)
    emitter.wait_for(500)
    fleet.each[VICTIM].signal(signal.SIGCONT)
    wait_until_it_has_its_share_again(fastdist)
    emitter.stop()
    assert emitter.count(202) == len(emitter.answers)
    fastdist.wait_at_rest()
    compare(emitter, fleet, max_duplicates=2 * 2 * 32)  # all connections of two workers, twice


def test_retry_after_pauses_but_stays_online(mocks, serve):
    fastdist = serve(mocks, {"health": {"fall": 2}})
    emitter = Emitter(fastdist.port).start().wait_for(200)
    mocks.set(VICTIM, status=503, retryAfter=5)
    wait_until_its_share_is_gone(fastdist)
    check_share_is_with_the_others(fastdist)
    row = fastdist.analyzers()[VICTIM]
    assert row["state"] == "online"
    assert 0 < row["pausedForSeconds"] <= 5
    assert "Retry-After" in row["lastError"]
    mocks.set(VICTIM, status=None)
    wait_until(lambda: fastdist.analyzers()[VICTIM]["effectiveShare"] > 0, "the pause ends")
    wait_until_it_has_its_share_again(fastdist)
    emitter.stop()
    assert emitter.count(202) == len(emitter.answers)
    fastdist.wait_at_rest()
    compare(emitter, mocks)
    assert "analyzer offline" not in fastdist.output


def test_reply_with_cut_body_is_delivered(mocks, serve):
    """The head of a 2xx is enough; the connection is not used again."""
    mocks.set(VICTIM, wrongLengthRate=1)
    fastdist = serve(mocks)
    emitter = Emitter(fastdist.port).send(3000)
    stats = fastdist.wait_at_rest()
    assert emitter.count(202) == 3000
    compare(emitter, mocks)
    assert mocks.totals(VICTIM)["ambiguous"] > 0
    assert stats["packets"]["delivered"] == 3000


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"failureRate": 0.2},
        {"resetRate": 0.1, "garbageRate": 0.1},
        {"truncateRate": 0.2},
        {"silentClose": 7},
        {"closeEvery": 5, "chunked": True, "interim": True},
        {"latency": 0.005, "jitter": 0.02},
    ],
    ids=" and ".join,
)
def test_flaky_analyzers_get_everything(mocks, serve, options):
    mocks.set_all(**options)
    fastdist = serve(mocks, QUICK | {"delivery": {"timeout": "500ms", "pipeline": 4}})
    emitter = Emitter(fastdist.port).send(5000)
    assert emitter.count(202) == 5000
    stats = fastdist.wait_at_rest(100)
    # Pipelined requests behind a failed one may have been taken before the connection broke.
    compare(emitter, mocks, max_duplicates=5000)
    assert stats["packets"]["delivered"] == 5000
    assert stats["packets"]["deadLettered"] == 0


def test_refused_packets_hurt_no_other(mocks, serve):
    mocks.set_all(rejects="bad")
    fastdist = serve(mocks, {"delivery": {"mode": "batch", "connections": 2}})
    emitter = Emitter(fastdist.port, body=lambda name: own_body(name + "bad" * name.endswith("7"))).send(1000)
    stats = fastdist.wait_at_rest()
    dead_letters = fastdist.dead_letters()
    assert {(row["reason"], row["status"]) for row in dead_letters} == {("refused", 422)}
    refused = {row["id"] for row in dead_letters}
    assert refused == {name for name in emitter.accepted if name.endswith("7")}
    assert len(dead_letters) == stats["packets"]["deadLettered"] == 100
    compare(emitter, mocks, refused=refused)
    assert {row["state"] for row in fastdist.analyzers().values()} == {"online"}


# An analyzer that takes nothing, with a good health check -> (how it answers, how many dead letters, what is named)
SWALLOWS = {
    "a wrong path": ({"status": 404}, 0, "HTTP 404 Not Found"),
    "an expired credential": ({"status": 401}, 0, "HTTP 401 Unauthorized"),
    "a redirection": ({"status": 302}, 0, "HTTP 302 Found, Location: /elsewhere"),
    "one that refuses everything": ({"status": 422}, 3, "HTTP 422, but A"),  # `fall` of them before it is in doubt
}


@pytest.mark.parametrize("mode", ["single", "batch"])
@pytest.mark.parametrize("how", SWALLOWS)
def test_refusing_analyzer_loses_nothing(mocks, serve, how, mode):
    options, most, reason = SWALLOWS[how]
    mocks.set(VICTIM, **options)
    fastdist = serve(mocks, {"delivery": {"mode": mode}})
    emitter = Emitter(fastdist.port).start().wait_for(300)
    fastdist.wait_for_state(VICTIM, "offline")
    check_share_is_with_the_others(fastdist)
    wait_until(lambda: fastdist.analyzers()[VICTIM]["probation"], "its checks are good")
    failed = fastdist.analyzers()[VICTIM]["failed"]
    emitter.wait_for(2000)
    row = fastdist.analyzers()[VICTIM]
    assert row["delivered"] == 0
    assert row["failed"] - failed < 20, "one packet at a time, less and less often"
    assert reason in row["lastError"]
    wait_until(lambda: reason in fastdist.line_with("analyzer offline"), "the log names the reason")
    mocks.set(VICTIM, status=None)
    wait_until_it_has_its_share_again(fastdist)
    emitter.stop()
    stats = fastdist.wait_at_rest()
    dead_letters = {row["id"] for row in fastdist.dead_letters()}
    assert len(dead_letters) == stats["packets"]["deadLettered"] <= most
    compare(emitter, mocks, refused=dead_letters)


def test_refused_by_all_is_a_dead_letter(mocks, serve):
    mocks.set_all(rejects="bad")
    fastdist = serve(mocks)
    emitter = Emitter(fastdist.port, connections=4, body=lambda name: own_body(f"bad {name}")).send(50)
    stats = fastdist.wait_at_rest()
    assert {row["id"] for row in fastdist.dead_letters()} == emitter.accepted
    assert stats["packets"]["deadLettered"] == 50
    assert {row["state"] for row in fastdist.analyzers().values()} == {"online"}
    fastdist.line_with("analyzer refuses packet after packet")
    codes = [each["code"] for each in get_json(fastdist.port, "/health")["problems"]]
    assert "analyzer_refusing" in codes


def test_analyzer_returns_after_killed_trial(mocks, serve):
    mocks.set(VICTIM, status=404)
    fastdist = serve(mocks, {"server": {"workers": 1}, "delivery": {"timeout": "60s"}})
    emitter = Emitter(fastdist.port).start().wait_for(100)
    fastdist.wait_for_state(VICTIM, "offline")
    mocks.set(VICTIM, status=None, hang=True)
    wait_until(lambda: fastdist.analyzers()[VICTIM]["inFlight"] == 1, "a packet is on its way there")
    (worker,) = fastdist.worker_pids()
    kill_worker(worker)
    mocks.set(VICTIM, hang=False)
    wait_until_it_has_its_share_again(fastdist)
    emitter.stop()
    fastdist.wait_at_rest()
    compare(emitter, mocks, max_duplicates=200)


def test_all_analyzers_failing_loses_nothing(mocks, serve):
    mocks.set_all(status=404)
    fastdist = serve(mocks)
    emitter = Emitter(fastdist.port).send(500)
    wait_until(lambda: all(row["probation"] for row in fastdist.analyzers().values()), "all are on probation")
    assert fastdist.stats()["packets"]["deadLettered"] == 0
    mocks.set_all(status=None)
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["delivered"] == 500
    compare(emitter, mocks)


def test_max_attempts_ends_in_a_dead_letter(mocks, serve):
    mocks.set_all(status=500)
    fastdist = serve(mocks, {"retry": {"max_attempts": 6, "base": "10ms"}, "health": {"fall": 1_000}})
    emitter = Emitter(fastdist.port).send(20)
    stats = fastdist.wait_at_rest()
    dead_letters = fastdist.dead_letters()
    assert {row["id"] for row in dead_letters} == emitter.accepted
    assert {(row["reason"], row["status"], row["attempts"]) for row in dead_letters} == {("exhausted", 500, 6)}
    assert stats["packets"]["deadLettered"] == 20


def test_awaited_packet_names_its_analyzer(mocks, serve):
    fastdist = serve(mocks)
    started = time.monotonic()
    status, _, body = fastdist.post(Prefer="wait=10")
    assert status == 200
    assert b'"status":"delivered"' in body
    mocks.set_all(status=400)
    status, headers, body = fastdist.post(Prefer="wait=10")
    assert (status, headers["content-type"]) == (502, "application/problem+json")
    mocks.set_all(status=None, latency=4)
    status, _, body = fastdist.post(Prefer="wait=1")
    assert status == 202
    assert b'"status":"accepted"' in body
    assert time.monotonic() - started > 1
