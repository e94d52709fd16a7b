"""Back-offs: how long they are, and when patience ends. What becomes of responses: test_sender.py, test_replay.py."""

from __future__ import annotations

import pytest

from fastdist.client.retry import BackOff


def test_patience_restarts_with_a_success():
    """Trouble that is over does not count: a back-off after hours of quiet is no reason to give up."""
    back_off = BackOff(10.0)
    assert back_off.begin(1.0) == pytest.approx(1, abs=0.1)
    back_off._failing_since -= 9.5
    back_off._until = 0
    assert back_off.begin(1.0) is None
    back_off._until = 0
    back_off.end()
    assert back_off.begin(1.0) == pytest.approx(1, abs=0.1)


def test_back_offs_grow_up_to_a_maximum():
    back_off = BackOff(float("inf"))
    lengths = []
    for _ in range(40):
        back_off._until = 0
        lengths.append(back_off.begin(None))
    assert all(min(10, 0.1 * 2**i) / 2 - 0.01 <= length <= min(10, 0.1 * 2**i) for i, length in enumerate(lengths))


def test_back_off_failures_do_not_extend_it():
    back_off = BackOff(60.0)
    assert back_off.begin(5.0) == pytest.approx(5, abs=0.1)
    for _ in range(20):
        assert back_off.begin(None) == pytest.approx(5, abs=0.1)
    assert back_off.begin(7.0) == pytest.approx(7, abs=0.1)
    assert 0 < back_off.left() < 7.8
