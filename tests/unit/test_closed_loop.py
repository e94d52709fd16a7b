"""What wrk and ab print is read as they mean it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))

from closed_loop import Answers, read_ab, read_wrk

WRK = """\
Running 1s test @ http://127.0.0.1:19275/logs
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     2.39ms    3.01ms  21.87ms   86.21%
    Req/Sec     5.59k     1.11k    7.97k    80.00%
  Latency Distribution
     50%  {p50}
     75%    3.62ms
     90%    6.63ms
     99%   {p99}
  5664 requests in 1.02s, 1.38MB read
{more}Requests/sec:   5546.25
Transfer/sec:      1.35MB
"""
AB = """\
Concurrency Level:      8
Time taken for tests:   1.000 seconds
Complete requests:      6384
Failed requests:        {failed}
{more}Keep-Alive requests:    6384
Total transferred:      1787520 bytes
Percentage of the requests served within a certain time (ms)
  50%      0
  99%     13
 100%     27 (longest request)
"""
PERCENTILES = "Percentage served,Time in ms\n0,0.020\n50,0.210\n98,11.302\n99,13.275\n100,27.001\n"


@pytest.mark.parametrize(
    ("shown", "milliseconds"),
    [("795.00us", 0.795), ("1.51ms", 1.51), ("1.20s ", 1200.0), ("1.50m", 90_000.0), ("0.00us", 0.0)],
)
def test_latencies_of_wrk_are_milliseconds(shown, milliseconds):
    assert read_wrk(WRK.format(p50="0.00us", p99=shown, more="")).p99 == pytest.approx(milliseconds)
    assert read_wrk(WRK.format(p50=shown, p99="1.00h", more="")).p50 == pytest.approx(milliseconds)


def test_wrk_error_responses_do_not_count():
    more = "  Socket errors: connect 1, read 0, write 3, timeout 20\n  Non-2xx or 3xx responses: 64\n"
    said = WRK.format(p50="1.51ms", p99="12.61ms", more=more)
    errors = {"connections refused": 1, "write errors": 3, "time-outs": 20}
    assert read_wrk(said) == Answers(5600, 64, errors, 1.51, 12.61)
    assert read_wrk(WRK.format(p50="1.51ms", p99="12.61ms", more="")) == Answers(5664, 0, {}, 1.51, 12.61)


def test_ab_error_responses_do_not_count():
    assert read_ab(AB.format(failed=0, more=""), PERCENTILES) == Answers(6384, 0, {}, 0.21, 13.275)
    more = (
        "   (Connect: 1, Receive: 80, Length: 0, Exceptions: 5)\nWrite errors:           2\nNon-2xx responses:      3\n"
    )
    errors = {"connections refused": 1, "read errors": 80, "broken connections": 5, "write errors": 2}
    assert read_ab(AB.format(failed=86, more=more), PERCENTILES) == Answers(6300, 3, errors, 0.21, 13.275)


def test_slowest_answers_of_wrk_are_read():
    said = WRK.format(p50="1.51ms", p99="12.61ms", more="") + "p99.9 and max, us: 15020 21870\n"
    assert read_wrk(said) == Answers(5664, 0, {}, 1.51, 12.61, p999=15.02, max=21.87)


def test_load_without_replies_has_no_latency():
    nothing = AB.replace("6384", "0").format(failed=0, more="")
    assert read_ab(nothing, "") == Answers(0, 0, {}, 0.0, 0.0)
    assert read_wrk("  0 requests in 1.00s, 0B read\n") == Answers(0, 0, {}, 0.0, 0.0)


@pytest.mark.parametrize("read", [read_wrk, lambda said: read_ab(said, "")], ids=["wrk", "ab"])
def test_what_is_printed_otherwise_is_shown(read):
    with pytest.raises(RuntimeError, match="segmentation fault"):
        read("segmentation fault")
