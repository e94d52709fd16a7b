"""GCRA in shared memory: against a model with a clock of its own, over several views of one memory, and overcrowded."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fastdist._core import RateLimiter, limiter_words

SECOND = 10**9
SLOTS = 1024


def limiter(rate=0.0, burst=0.0, client_rate=0.0, client_burst=0.0, slots=SLOTS):
    made = RateLimiter(bytearray(8 * limiter_words(slots)))
    made.configure(rate, burst, client_rate, client_burst)
    return made


class Gcra:
    """One limit: the theoretical arrival time of the next request, and how much earlier one may come."""

    def __init__(self, rate, burst):
        self.interval = max(1, int(1e9 / rate)) if rate else 0
        allowed = burst or max(rate, 1.0)
        self.tolerance = int(1e9 / rate * (allowed - 1)) if rate and allowed > 1 else 0
        self.arrival = 0

    def wait(self, now):
        return max(0, self.arrival - now - self.tolerance)

    def count(self, now):
        self.arrival = max(self.arrival, now) + self.interval


class Model:
    """The limit of all and one for each client; what does not pass counts nowhere."""

    def __init__(self, rate, burst, client_rate, client_burst):
        self.everyone = Gcra(rate, burst)
        self.client_limits = client_rate, client_burst
        self.clients = {}

    def check(self, client, now):
        limits = [self.clients.setdefault(client, Gcra(*self.client_limits)), self.everyone]
        limits = [limit for limit in limits if limit.interval]
        for limit in limits:
            if limit.wait(now):
                return limit.wait(now) / 1e9
        for limit in limits:
            limit.count(now)
        return 0.0


rates = st.one_of(st.just(0.0), st.sampled_from([0.5, 1.0, 3.0, 10.0, 1000.0]), st.floats(0.01, 1e6))
bursts = st.one_of(st.just(0.0), st.sampled_from([1.0, 2.0, 2.5, 10.0]), st.floats(0.1, 1e4))
gaps = st.one_of(st.just(0), st.integers(0, 1000), st.integers(0, 3 * SECOND))


def arrivals(clients):
    """Strategy: (client, time) pairs, times never going back."""
    steps = st.lists(st.tuples(st.integers(0, clients - 1), gaps), max_size=100)
    return steps.map(
        lambda pairs: [(f"10.0.0.{who}", sum(gap for _, gap in pairs[: i + 1])) for i, (who, _) in enumerate(pairs)]
    )


def assert_within(admitted, limit):
    """Check what GCRA promises: in any stretch of time T, no more than the burst and T's worth pass."""
    for i, earlier in enumerate(admitted):
        for count, later in enumerate(admitted[i:]):
            assert count * limit.interval <= limit.tolerance + later - earlier


@given(rates, bursts, rates, bursts, arrivals(clients=6))
@example(10.0, 3.0, 0.0, 0.0, [("a", 0)] * 5 + [("a", SECOND // 10)] * 3)
@example(0.0, 0.0, 1.0, 0.0, [("a", 5), ("b", 5), ("a", 6), ("b", SECOND + 5), ("a", SECOND + 6)])
def test_it_does_what_the_model_does(rate, burst, client_rate, client_burst, requests):
    real, model = limiter(rate, burst, client_rate, client_burst), Model(rate, burst, client_rate, client_burst)
    assert real.active == (rate > 0 or client_rate > 0)
    passed = []
    for client, now in requests:
        wait = real.check(client, now)
        assert wait == model.check(client, now)
        if not wait:
            passed.append((client, now))
    if rate:
        assert_within([now for _, now in passed], Gcra(rate, burst))
    if client_rate:
        for who in {client for client, _ in passed}:
            assert_within([now for client, now in passed if client == who], Gcra(client_rate, client_burst))


@given(st.floats(0.01, 1e5), bursts, arrivals(clients=1))
def test_client_passes_after_the_stated_wait(rate, burst, requests):
    assume(requests)
    now = requests[-1][1]
    for early in (0, 1):
        real = limiter(rate, burst)
        for _, then in requests:
            real.check("a", then)
        wait = real.check("a", now)
        if wait:
            later = now + round(wait * 1e9) - early
            assert (real.check("a", later) == 0.0) is (early == 0)


@pytest.mark.parametrize(
    ("rate", "burst", "allowed"), [(10, 3, 3), (10, 0, 10), (0.5, 0, 1), (1000, 1, 1), (5, 0.1, 1)]
)
def test_burst_passes_then_one_per_interval(rate, burst, allowed):
    real, start = limiter(rate, burst), 7 * SECOND
    assert [real.check("a", start) for _ in range(allowed)] == [0.0] * allowed
    interval = int(1e9 / rate)
    assert real.check("a", start) == interval / 1e9
    for i in range(1, 4):
        assert real.check("a", start + i * interval - 1) > 0
        assert real.check("a", start + i * interval) == 0.0
    later = start + 3600 * SECOND  # long idle: the burst is back, and is no larger
    assert [real.check("a", later) for _ in range(allowed + 1)].count(0.0) == allowed


def test_client_limits_are_within_the_total():
    real = limiter(rate=1, burst=5, client_rate=1, client_burst=2)
    passed = [client for client in "aaabbbccc" if real.check(client, SECOND) == 0.0]
    assert passed == ["a", "a", "b", "b", "c"]


def test_total_refusal_spares_client_budget():
    real = limiter(rate=1, burst=1, client_rate=1, client_burst=3)
    assert [real.check("a", SECOND) > 0 for _ in range(50)] == [False] + [True] * 49
    real.configure(0, 0, 1, 3)
    assert [real.check("a", SECOND) > 0 for _ in range(3)] == [False, False, True]


def test_client_refusal_spares_total_budget():
    real = limiter(rate=1, burst=3, client_rate=1, client_burst=1)
    for _ in range(50):
        real.check("greedy", SECOND)
    assert [real.check(client, SECOND) > 0 for client in "abc"] == [False, False, True]


def test_without_limits_everything_passes():
    real = limiter()
    assert not real.active
    assert all(real.check("a", 0) == 0.0 for _ in range(1000))
    real.configure(0, 0, 5, 0)
    assert real.active
    real.configure(0, 9, 0, 9)
    assert not real.active


def test_its_own_clock_is_the_monotonic_one():
    real = limiter(rate=0.001, burst=1)
    assert real.check("a") == 0.0
    assert 0 < real.check("a") <= 1000


@pytest.mark.parametrize(("rate", "burst"), [(0.01, 1e9), (1.0, 1e18), (1e9, 1e300)])
def test_burst_beyond_bounds_is_no_limit(rate, burst):
    real = limiter(rate, burst)
    assert all(real.check("a", SECOND) == 0.0 for _ in range(20))


@pytest.mark.parametrize("rate", [1e-9, 1e-12, 5e-324])
def test_rate_near_zero_lets_one_pass(rate):
    real = limiter(rate, 1)
    assert real.check("a", SECOND) == 0.0
    assert all(real.check("a", now * SECOND) > 10**8 for now in (1, 2, 3600))


# ---- several views of one memory


def test_views_of_one_memory_count_together():
    memory = bytearray(8 * limiter_words(SLOTS))
    one, other = RateLimiter(memory), RateLimiter(memory)
    for view in (one, other):
        view.configure(10, 4, 10, 3)
    assert [view.check("a", SECOND) == 0.0 for view in (one, other, one, other)] == [True, True, True, False]
    assert [view.check("b", SECOND) == 0.0 for view in (other, one)] == [True, False]


@given(st.tuples(rates, bursts, rates, bursts), arrivals(clients=4), st.randoms(use_true_random=False))
def test_mixture_of_views_acts_as_one(limits, requests, rng):
    memory, alone = bytearray(8 * limiter_words(SLOTS)), limiter(*limits)
    views = [RateLimiter(memory) for _ in range(3)]
    for view in views:
        view.configure(*limits)
    for client, now in requests:
        assert rng.choice(views).check(client, now) == alone.check(client, now)


HAMMER = """
import mmap, sys, time
from fastdist._core import RateLimiter

fd, times, now, step, *limits = map(float, sys.argv[1:])
limiter = RateLimiter(mmap.mmap(int(fd), 0))
limiter.configure(*limits)
print("ready", flush=True)
sys.stdin.readline()
begun = time.monotonic_ns()
if now < 0:
    passed = sum(limiter.check("10.0.0.1") == 0.0 for _ in range(int(times)))
else:
    passed = sum(limiter.check("10.0.0.1", int(now + i * step)) == 0.0 for i in range(int(times)))
print(passed, begun, time.monotonic_ns())
"""


def hammer(fd, times, now, step, *limits):
    """Have two processes check ``times`` times each; return how many passed, and the nanoseconds it took at most."""
    command = [sys.executable, "-c", HAMMER, *map(str, (fd, times, now, step, *limits))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, pass_fds=[fd], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [[int(word) for word in process.communicate(timeout=60)[0].split()] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    passed, begun, ended = zip(*results, strict=True)
    return sum(passed), max(ended) - min(begun)


@pytest.fixture
def shared():
    fd = os.memfd_create("limiter")
    os.ftruncate(fd, 8 * limiter_words(SLOTS))
    yield fd
    os.close(fd)


def test_processes_share_one_burst_exactly(shared):
    passed, _ = hammer(shared, 200_000, SECOND, 0, 10, 150_000, 0, 0)
    assert passed == 150_000


def test_processes_share_the_rate_over_time(shared):
    # A million checks a virtual second each; a thousand a second pass, and 500 at once.
    passed, _ = hammer(shared, 200_000, SECOND, 1000, 1000, 500, 1000, 500)
    assert 500 + 199 <= passed <= 500 + 200


def test_processes_share_rate_in_real_time(shared):
    passed, elapsed = hammer(shared, 100_000, -1, 0, 10_000, 50, 0, 0)
    assert 50 <= passed <= 50 + elapsed / 100_000 + 1


def test_refused_client_uses_no_shared_rate(shared):
    # The client's word is moved on and back again whenever the limit of all refuses; the two moves must cancel out.
    passed, _ = hammer(shared, 100_000, SECOND, 0, 10, 20_000, 10, 50_000)
    assert passed == 20_000
    alone = RateLimiter(mmap.mmap(shared, 0))
    alone.configure(0, 0, 10, 50_000)
    assert sum(alone.check("10.0.0.1", SECOND) == 0.0 for _ in range(50_000)) == 30_000


# ---- more clients than room


@given(
    st.floats(0.1, 1e4),
    bursts,
    rates,
    bursts,
    st.lists(st.tuples(st.integers(0, 200), gaps), max_size=200),
)
def test_crowded_limit_of_all_still_holds(rate, burst, client_rate, client_burst, steps):
    size, guard = 8 * limiter_words(8), b"\xa5" * 64
    memory = bytearray(guard + bytes(size) + guard)
    real, now, admitted = RateLimiter(memoryview(memory)[64 : 64 + size]), SECOND, []
    real.configure(rate, burst, client_rate, client_burst)
    for who, gap in steps:
        now += gap
        if real.check(f"2001:db8::{who:x}", now) == 0.0:
            admitted.append(now)
    assert_within(admitted, Gcra(rate, burst))
    assert memory[:64] == memory[-64:] == guard


def test_crowded_clients_share_until_idle():
    real = limiter(client_rate=1, client_burst=1, slots=8)
    first = [real.check(f"c{i}", SECOND) == 0.0 for i in range(8)]
    assert all(first)
    assert not any(real.check(f"late-{i}", SECOND) == 0.0 for i in range(50))  # every place is busy
    assert real.check("late-0", 3 * SECOND) == 0.0  # all have been silent for their interval
    assert real.check("late-0", 3 * SECOND) > 0


# ---- memory


def test_how_much_memory_it_takes():
    assert limiter_words(16384) == 8 + 2 * 16384


@pytest.mark.parametrize("slots", [0, 1, 4, 7, 9, 24, 1000])
def test_slot_count_is_a_power_of_two_from_8(slots):
    with pytest.raises(ValueError, match="power of two"):
        limiter(slots=slots)


@pytest.mark.parametrize("size", [0, 1, 63])
def test_too_little_memory_is_refused(size):
    with pytest.raises(ValueError, match="power of two"):
        RateLimiter(bytearray(size))


def test_read_only_memory_is_refused():
    with pytest.raises((BufferError, TypeError)):
        RateLimiter(bytes(8 * limiter_words(8)))


def test_loosened_limit_admits_the_refused():
    real = limiter(0.01, 1, 0.01, 1)
    assert real.check("a") == 0
    assert real.check("a") > 90
    real.configure(1000, 10, 100, 10)
    assert real.check("a") < 0.02
    real.configure(0, 0, 0, 0)
    assert real.check("a") == 0
