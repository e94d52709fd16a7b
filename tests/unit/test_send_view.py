"""How sending is shown: a bar at a terminal, lines elsewhere, why nothing moves, what was special at the end."""

from __future__ import annotations

import io
from collections import Counter
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastdist.client import progress
from fastdist.client.packing import TALLIES, Packet
from fastdist.client.send import Summary
from fastdist.client.send_view import SendView


def log(size=1000, start=0):
    return SimpleNamespace(size=size, start=start)


def packet(offset, end, messages=5):
    return Packet("id", b"", offset, end, messages, Counter(), 1000)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=150, color_system=None)


def bar(view, width=150):
    """Return what the bar is now."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view.bar.get_renderable())
    return console.file.getvalue()


def test_bar_shows_the_part_of_log_sent(terminal):
    with SendView(console=terminal) as view:
        view.begin(log(size=2048, start=512))
        assert " 25%" in bar(view)
        view.accepted(packet(512, 1024))
        assert " 50%" in bar(view)
        assert "1.0/2.0 KiB" in bar(view)
        assert "messages/s" in bar(view)
        assert "ETA" in bar(view)


@pytest.mark.parametrize("width", [40, 59, 60, 70, 80, 81, 100, 110, 150])
def test_the_bar_is_one_line_in_any_terminal(width):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with SendView(console=terminal) as view:
        view.begin(log(size=5_000_000_000))
        view.accepted(packet(0, 1_250_000_000, messages=1_500_000))
        view.bar.tasks[0].start_time -= 10
        line = bar(view, width).rstrip("\n")
        assert "\n" not in line
        assert len(line) <= width
        assert "sending" in line
        assert " 25%" in line
        assert "/s ETA" in line
        assert "…" not in line
        assert (" messages/s" in line) == (width >= 60)


def test_growing_log_makes_the_bar_longer(terminal):
    source = log(size=100)
    with SendView(console=terminal) as view:
        view.begin(source)
        source.size = 200
        view.accepted(packet(0, 100))
        assert " 50%" in bar(view)


@pytest.mark.parametrize(("follow", "size"), [(True, 100), (False, None)])
def test_unknown_end_shows_no_estimate(terminal, follow, size):
    with SendView(console=terminal, follow=follow) as view:
        view.begin(log(size=size))
        view.accepted(packet(0, 50))
        assert "50%" not in bar(view)
        assert "50/? bytes" in bar(view)


def test_stall_reason_shows_until_progress(terminal):
    with SendView(console=terminal) as view:
        view.begin(log())
        view.waiting("answers 429 (too many)", 1.25)
        assert "answers 429 (too many); again in 1.2 s" in bar(view)
        view.accepted(packet(0, 100))
        assert "answers 429" not in bar(view)


def test_plain_output_reports_a_reason_once(capsys):
    with SendView() as view:
        view.begin(log())
        for _ in range(50):
            view.waiting("answers 503 (full)", 1)
        view.waiting("cannot be reached: x", 1)
        view.accepted(packet(0, 10))
        view.waiting("cannot be reached: x", 1)
    assert capsys.readouterr().err.splitlines() == [
        "the distributor answers 503 (full); trying again",
        "the distributor cannot be reached: x; trying again",
        "the distributor cannot be reached: x; trying again",
    ]


def test_plain_output_has_a_line_regularly(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with SendView() as view:
        view.begin(log(size=4096))
        view.accepted(packet(0, 1024))
        view.begin(log(size=None))
        view.accepted(packet(0, 10, 1))
    assert capsys.readouterr().err.splitlines() == [
        "5 messages, 1.0 KiB of 4.0 KiB (25%)",
        "1 message, 10 B",
    ]


def test_quiet_still_shows_what_matters(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with SendView(quiet=True) as view:
        view.begin(log())
        view.accepted(packet(0, 10))
        view.note("app.log was rotated")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "app.log was rotated\n")


def test_the_summary_says_what_was_special():
    assert Summary(packets=1, messages=1, bytes=2048).lines(2.0) == [
        "sent 1 message in 1 packet, 2.0 KiB in 2.0 s (0 messages/s)"
    ]
    lines = Summary(retries=3, tally=Counter(dict.fromkeys(TALLIES, 7)), unsent=2).lines(0.0)
    assert lines[1] == "retries: 3"
    assert lines[2:-1] == [f"{what}: 7" for what in TALLIES.values()]
    assert lines[-1] == "read but NOT sent: 2 messages at least"
