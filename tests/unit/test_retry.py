"""Pauses: how long they are, and when patience ends. What becomes of responses: test_send.py, test_replay.py."""

from __future__ import annotations

import pytest

from fastdist.client.retry import Pauses


def test_patience_starts_again_with_a_success():
    """Trouble that is over does not count: a pause after hours of quiet is no reason to give up."""
    pauses = Pauses(10.0)
    assert pauses.begin(1.0) == pytest.approx(1, abs=0.1)
    pauses._failing_since -= 9.5
    pauses._until = 0
    assert pauses.begin(1.0) is None
    pauses._until = 0
    pauses.end()
    assert pauses.begin(1.0) == pytest.approx(1, abs=0.1)


def test_pauses_get_longer_without_end_to_them():
    pauses = Pauses(float("inf"))
    lengths = []
    for _ in range(40):
        pauses._until = 0
        lengths.append(pauses.begin(None))
    assert all(min(10, 0.1 * 2**i) / 2 - 0.01 <= length <= min(10, 0.1 * 2**i) for i, length in enumerate(lengths))


def test_failures_in_a_pause_do_not_extend_it():
    pauses = Pauses(60.0)
    assert pauses.begin(5.0) == pytest.approx(5, abs=0.1)
    for _ in range(20):
        assert pauses.begin(None) == pytest.approx(5, abs=0.1)
    assert pauses.begin(7.0) == pytest.approx(7, abs=0.1)
    assert 0 < pauses.left() < 7.8
