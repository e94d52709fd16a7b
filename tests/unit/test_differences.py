"""What a reload has changed, as the log and the response show it: all of it, and no secret."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from fastdist.ipc import Pair
from fastdist.settings import Analyzer, Config, Delivery, Limits, Security, Server
from fastdist.supervisor.differences import Difference, differences

PLAIN = Config()
FIRST = PLAIN.analyzers[0]


def changed(old, new):
    return [(each.setting, each.before, each.after) for each in differences(old, new)]


def with_analyzers(*analyzers):
    return replace(PLAIN, analyzers=analyzers)


def test_equal_configurations_do_not_differ():
    assert changed(PLAIN, Config()) == []


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (replace(PLAIN, limits=Limits(rate=5)), ("limits.rate", "0.0", "5")),
        (replace(PLAIN, server=Server(max_body=2**20)), ("server.max_body", "10MiB", "1MiB")),
        (replace(PLAIN, delivery=Delivery(spill_after=math.inf)), ("delivery.spill_after", "1s", "never")),
        (
            replace(PLAIN, server=Server(protocols=())),
            ("server.protocols", "json, otlp, loki, splunk, elasticsearch", "none"),
        ),
        (replace(PLAIN, security=Security(tokens=("secret", "other"))), ("security.tokens", "0 set", "2 set")),
        (
            with_analyzers(replace(FIRST, weight=0.7), *PLAIN.analyzers[1:]),
            ("analyzers[A1].weight", "0.1", "0.7"),
        ),
        (with_analyzers(*PLAIN.analyzers[1:]), ("analyzers[A1]", "http://127.0.0.1:3001/analyze, weight 0.1", None)),
        (
            with_analyzers(*PLAIN.analyzers, Analyzer(id="B", endpoint="https://h/x?key=secret", weight=2)),
            ("analyzers[B]", None, "https://h/x?..., weight 2"),
        ),
        (
            with_analyzers(replace(FIRST, endpoint="http://h/?key=secret"), *PLAIN.analyzers[1:]),
            ("analyzers[A1].endpoint", "http://127.0.0.1:3001/analyze", "http://h/?..."),
        ),
    ],
)
def test_a_setting_has_its_values(new, expected):
    assert changed(PLAIN, new) == [expected]
    assert "secret" not in str(changed(PLAIN, new))
    setting, before, after = expected
    assert changed(new, PLAIN) == [(setting, after, before)]


def test_another_token_is_a_difference():
    """Of as many: that it is another one shows, and not which."""
    one, other = (replace(PLAIN, security=Security(tokens=(token,))) for token in ("secret-1", "secret-2"))
    assert changed(one, other) == [("security.tokens", "1 set", "1 set")]


def test_order_of_analyzers_is_no_difference():
    assert changed(PLAIN, with_analyzers(*reversed(PLAIN.analyzers))) == []


def test_renewed_certificate_shows():
    pairs = Pair(b"one", b"key"), Pair(b"two", b"key")
    assert differences(PLAIN, PLAIN, pairs) == [Difference("security.tls_cert", None, None)]
    assert differences(PLAIN, PLAIN, (pairs[0], pairs[0])) == []
