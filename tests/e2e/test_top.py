"""``fastdist top`` against a distributor: its figures are those of /stats, and it is there when the server is not."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios

import pytest
from support import Emitter, get_json, own_body, wait_until

FASTDIST = [sys.executable, "-m", "fastdist"]
COUNTERS = {
    "received": "received",
    "accepted": "accepted",
    "rejected": "rejected",
    "delivered": "delivered",
    "retried": "retried",
    "spilled": "spilled",
    "dead letters": "deadLettered",
    "recovered": "recovered",
    "corrupt": "corrupt",
    "lost": "lost",
}


def once(run, fastdist):
    top = run(*FASTDIST, "top", "--once", "--url", f"http://127.0.0.1:{fastdist.port}")
    assert top.wait() == 0, top.output
    return top


def line_of(top, first_word):
    return next(" ".join(line.split()) for line in top.lines if line.split()[:1] == [first_word])


def count(number):
    return f"{number:,}"


def test_a_frame_has_the_figures_of_stats(mocks, serve, run):
    fastdist = serve(mocks)
    mocks.set_all(rejects="bad")
    Emitter(fastdist.port, body=lambda name: own_body(name + "bad" * name.endswith("7"))).send(3000)
    for _ in range(3):
        assert fastdist.post(b"{")[0] == 400
    stats = fastdist.wait_at_rest()
    assert stats["packets"]["deadLettered"] > 100
    top = once(run, fastdist)
    packets = line_of(top, "packets")
    assert packets == "packets " + " ".join(f"{name} {count(stats['packets'][key])}" for name, key in COUNTERS.items())
    assert line_of(top, "rejected") == "rejected malformed 3"
    assert not [line for line in top.lines if line.split()[:1] == ["agents"]]
    for row in get_json(fastdist.port, "/analyzers")["analyzers"]:
        shares = " ".join(f"{row[key] * 100:.1f} %" for key in ("actualShare", "targetShare", "effectiveShare"))
        counts = " ".join(count(row[key]) for key in ("delivered", "failed", "retried", "inFlight"))
        line = line_of(top, row["id"])
        assert line.startswith(f"{row['id']} online ")
        assert f" {shares} {counts} " in line
    for worker in stats["workers"]:
        line = line_of(top, str(worker["id"]))
        assert line.startswith(f"{worker['id']} running {worker['pid']} 0 ")
        assert line.endswith(f" {count(worker['accepted'])} {count(worker['delivered'])} -")
    latencies = stats["latencyMs"]
    for name, key in (("ingest", "ingest"), ("delivery", "delivery")):
        figures = [float(figure.replace(",", "")) for figure in line_of(top, name).split()[1:]]
        assert figures == pytest.approx(
            [latencies[key][each] for each in ("p50", "p90", "p99", "p999", "max")], rel=0.01
        )
    assert not any(re.search("DEGRADED|UNREACHABLE|\x1b", line) for line in top.lines), (
        "nothing is wrong, and it is plain"
    )


def test_a_frame_says_what_is_wrong(mocks, shared, run):
    fastdist = shared()
    mocks.set("A2", refuse=True)
    fastdist.wait_for_state("A2", "offline")
    top = once(run, fastdist)
    assert " degraded " in top.lines[0]
    assert "analyzers 3/4" in top.lines[0]
    assert top.lines[1].startswith(" WARNING: A2 is offline: ")
    assert line_of(top, "A2").startswith("A2 offline ")


def test_what_waits_in_the_queue_is_shown(mocks, serve, run):
    fastdist = serve(mocks)
    mocks.set_all(refuse=True)
    fastdist.wait_for_states("offline")
    Emitter(fastdist.port).send(1234)
    top = once(run, fastdist)
    assert "ERROR: no analyzer is online: packets are accepted, and wait until one comes back" in top.output
    queue = get_json(fastdist.port, "/queue")
    assert f"waiting {count(queue['packets'])} in flight {count(queue['inFlight'])} " in line_of(top, "queue")
    assert queue["packets"] + queue["inFlight"] == 1234
    mocks.set_all(refuse=False)


class Terminal:
    """``fastdist top`` in a terminal of 40 lines by 150 columns; ``shown`` is all it has written."""

    def __init__(self, *options):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        self.before = termios.tcgetattr(slave)
        environ = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
        command = [*FASTDIST, "top", "--interval", "200ms", *options]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ | {"TERM": "xterm-256color"},
            start_new_session=True,
        )
        self.slave = slave
        self.shown = ""

    def read(self):
        while select.select([self.master], [], [], 0)[0]:
            self.shown += os.read(self.master, 65536).decode(errors="replace")
        return self.shown

    def wait_for(self, pattern):
        """Wait until something is shown that was not before."""
        seen = len(self.shown)
        wait_until(lambda: re.search(pattern, self.read()[seen:]), f"{pattern!r} on the terminal")

    def end(self):
        """Wait for the end; return the exit status. The terminal must be as it was."""
        wait_until(lambda: (self.read(), self.process.poll())[1] is not None, "it ends")
        self.read()
        assert "\x1b[?1049l" in self.shown, "the other screen is left"
        assert self.shown.count("\x1b[?25h") >= 1, "the cursor is back"
        assert termios.tcgetattr(self.slave) == self.before
        assert "Traceback" not in self.shown
        return self.process.returncode

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal():
    opened = []

    def terminal(*options):
        opened.append(Terminal(*options))
        return opened[-1]

    yield terminal
    for each in opened:
        each.close()


@pytest.mark.parametrize(
    "key", [b"q", b"Q", b"\x04", None, signal.SIGTERM], ids=["q", "Q", "Ctrl-D", "Ctrl-C", "SIGTERM"]
)
def test_ends_on_request_restoring_terminal(shared, terminal, key):
    fastdist = shared()
    top = terminal("--url", f"http://127.0.0.1:{fastdist.port}")
    top.wait_for("A4")
    if isinstance(key, bytes):
        os.write(top.master, b"x\x1b[A" + key)
    else:
        top.process.send_signal(key or signal.SIGINT)
    assert top.end() == 0


@pytest.mark.slow
def test_figures_survive_a_server_restart(mocks, serve, terminal):
    fastdist = serve(mocks)
    top = terminal("--url", f"http://127.0.0.1:{fastdist.port}")
    top.wait_for("received 0 ")
    Emitter(fastdist.port).send(1500)
    top.wait_for("received 1,500 ")
    port = fastdist.port
    assert fastdist.stop() == 0
    top.wait_for("UNREACHABLE: Connection refused; the figures are of ")
    top.wait_for("received 1,500 ")
    fastdist = serve(mocks, port=port)
    top.wait_for("received 0 ")
    Emitter(fastdist.port).send(77)
    top.wait_for("received 77 ")
    os.write(top.master, b"q")
    assert top.end() == 0


def test_waits_for_a_server_not_there_yet(terminal):
    top = terminal("--url", "http://127.0.0.1:1")
    top.wait_for("UNREACHABLE: Connection refused")
    os.write(top.master, b"q")
    assert top.end() == 0
