"""Dead letters sent again."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from dead_letters import WHOLE, Listener, broken, fill, idle, ids, names_in, packet, replayed
from fakes import ACCEPTED, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdist.client import connection, held_file, replay
from fastdist.client.connection import Target
from fastdist.client.held_file import HeldFile
from fastdist.client.replay import Replay
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import Selection, as_line, digest_of, find_files, journal_of, read_file


@pytest.fixture
def events():
    return Listener()


@pytest.fixture
def run(distributor, events):
    """Replay a folder to the distributor."""
    return partial(replayed, distributor, events)


def test_accepted_keeps_its_bytes_and_id(tmp_path, distributor, run, events):
    bodies = {"plain": b'{"a": 1}\n', "umlaut": '{"ü":"€"}'.encode(), "binary": b"\xff\x00\xfe"}
    for name, body in bodies.items():
        fill(tmp_path, [name], body=body)
    summary = run(tmp_path, target=Target.parse(distributor.url, "secret"))
    assert (summary.replayed, summary.refused, summary.left, summary.stopped) == (3, 0, 0, None)
    assert {headers["Idempotency-Key"]: body for _, headers, body in distributor.requests} == bodies
    for path, headers, _ in distributor.requests:
        assert path == "/logs"
        assert headers["Content-Type"] == "application/json"
        assert headers["Authorization"] == "Bearer secret"
    assert (events.total, events.count) == (3, 3)
    assert names_in(tmp_path / "dead-letters") == []


def test_a_url_may_have_a_path(tmp_path, distributor, run):
    fill(tmp_path, "a")
    run(tmp_path, target=Target.parse(distributor.url + "/behind/proxy/", None))
    assert distributor.requests[0][0] == "/behind/proxy/logs"
    assert "Authorization" not in distributor.requests[0][1]


def test_what_is_refused_stays_and_is_shown(tmp_path, distributor, run, events):
    path = fill(tmp_path, "abc")
    distributor.script["b"] = [problem(400, "messages is empty")]
    distributor.script["c"] = [problem(413, "a packet\x1b[2J\n may have 10 bytes")]
    summary = run(tmp_path)
    assert (summary.replayed, summary.refused, summary.left, summary.stopped) == (1, 2, 2, None)
    assert events.refusals == {"b": "400 (messages is empty)", "c": "413 (a packet [2J may have 10 bytes)"}
    assert ids(tmp_path) == ["b", "c"]
    assert names_in(path.parent) == [path.name]


def test_unreadable_lines_count_as_left(tmp_path, run, events):
    path = fill(tmp_path, "ab")
    path.write_bytes(b"garbage\n" + path.read_bytes() + b'{"torn')
    summary = run(tmp_path)
    assert (summary.replayed, summary.left) == (2, 2)
    assert events.total == 2
    assert path.read_bytes() == b'garbage\n{"torn\n'


@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    max_examples=3 * settings().max_examples // 10,
    deadline=None,
)
@given(
    fates=st.lists(st.lists(st.sampled_from(["accepted", "refused", "unreadable", "blank"]), max_size=6), max_size=4),
    limit=st.none() | st.integers(1, 12),
)
def test_unaccepted_is_kept_in_order(tmp_path, distributor, fates, limit):
    folder = tmp_path / "dead-letters"
    folder.mkdir(exist_ok=True)
    distributor.accepted.clear()
    expected, dead_letters = [], 0
    for i, kinds in enumerate(fates):
        with (folder / f"{i}.ndjson").open("wb") as file:
            for j, kind in enumerate(kinds):
                name = f"{i}-{j}"
                line = {"accepted": WHOLE, "refused": WHOLE, "unreadable": b"{", "blank": b""}[kind]
                line = line.replace(b'"x"', f'"{name}"'.encode())
                file.write(line + b"\n")
                distributor.script[name] = [ACCEPTED if kind == "accepted" else problem(400, "no")]
                sent = kind in {"accepted", "refused"} and (limit is None or dead_letters < limit)
                dead_letters += kind in {"accepted", "refused"}
                if kind != "blank" and not (sent and kind == "accepted"):
                    expected.append(line)
    summary = Replay(find_files(tmp_path), Selection(), Target.parse(distributor.url, None), Listener()).run(3, limit)
    left = [line for path in sorted(folder.iterdir()) for line in path.read_bytes().splitlines() if line]
    assert left == expected
    assert summary.left == len(expected)
    assert sum(distributor.accepted.values()) == summary.replayed
    for path in folder.iterdir():
        path.unlink()


def test_a_limit_is_kept_over_all_files(tmp_path, distributor, run, events):
    fill(tmp_path, "abc")
    fill(tmp_path, "def")
    summary = run(tmp_path, limit=4)
    assert (summary.replayed, summary.left, events.total) == (4, 2, 4)
    assert ids(tmp_path) == ["e", "f"]
    assert len(distributor.requests) == 4


def test_only_those_with_the_reason(tmp_path, run):
    fill(tmp_path, "ab", reason="refused")
    fill(tmp_path, "cd", reason="shutdown")
    summary = run(tmp_path, reason="shutdown")
    assert (summary.replayed, summary.left) == (2, 0)
    assert ids(tmp_path) == ["a", "b"]


def test_connections_are_kept_over_files(tmp_path, distributor, run):
    for i in range(20):
        fill(tmp_path, [f"p-{i}"])
    assert run(tmp_path, connections=1).replayed == 20
    assert distributor.connections == 1


def test_dead_letters_are_posted_together(tmp_path, distributor, run):
    fill(tmp_path, "abc")
    meeting = threading.Barrier(3, timeout=20)
    distributor.before_answer = meeting.wait
    assert run(tmp_path, connections=3).replayed == 3


def test_closed_connection_is_reopened(tmp_path, distributor, run):
    fill(tmp_path, "abc")
    distributor.script["b"] = [None, ACCEPTED]
    assert run(tmp_path, connections=1).replayed == 3
    assert distributor.accepted == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_busy_service_is_retried_when_due(tmp_path, distributor, run, events, status):
    fill(tmp_path, "ab")
    distributor.script["a"] = [problem(status, "later", Retry_After="0")] * 3 + [ACCEPTED]
    summary = run(tmp_path)
    assert (summary.replayed, summary.refused, summary.left) == (2, 0, 0)
    assert events.notes == []
    assert set(events.waits) == {f"answers {status} (later)"}


def test_retry_after_is_for_all_connections(tmp_path, distributor, run):
    fill(tmp_path, "abcdef")
    times = []
    distributor.before_answer = lambda: times.append(time.monotonic())
    distributor.script["a"] = [problem(503, "full", Retry_After="1"), ACCEPTED]
    assert run(tmp_path, connections=2).replayed == 6
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) > 0.5


def test_patience_with_busy_distributor_ends(tmp_path, distributor, run, monkeypatch):
    monkeypatch.setattr(replay, "PATIENCE", 0.3)
    fill(tmp_path, "abc")
    distributor.script["b"] = distributor.script["c"] = [problem(503, "the queue is full", Retry_After="0")]
    summary = run(tmp_path)
    assert (summary.replayed, summary.left) == (1, 2)
    assert summary.stopped.startswith(f"{distributor.url} answers 503 (the queue is full)")
    assert ids(tmp_path) == ["b", "c"]


def test_no_wait_exceeds_the_patience(tmp_path, distributor, run):
    fill(tmp_path, "abc")
    distributor.otherwise = problem(429, "slow down", Retry_After="3600")
    summary = run(tmp_path)
    assert summary.stopped.endswith("answers 429 (slow down) and asks to wait 3600 s; given up, try again later")
    assert ids(tmp_path) == ["a", "b", "c"]


def test_unreachable_distributor_keeps_all(tmp_path, distributor, run):
    path = fill(tmp_path, "abc")
    before = path.read_bytes()
    distributor.server_close()
    summary = run(tmp_path)
    assert (summary.replayed, summary.left) == (0, 3)
    assert summary.stopped == f"{distributor.url} cannot be reached: Connection refused; given up, try again later"
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


def test_a_distributor_that_hangs_up_ends_it(tmp_path, distributor, run):
    fill(tmp_path, "abc")
    distributor.otherwise = None
    summary = run(tmp_path)
    assert "cannot be reached: it closes the connection without an answer" in summary.stopped
    assert ids(tmp_path) == ["a", "b", "c"]


def test_silent_service_ends_the_replay(tmp_path, distributor, run, monkeypatch):
    monkeypatch.setattr(connection, "TIMEOUT", 0.1)
    fill(tmp_path, "a")
    distributor.before_answer = lambda: time.sleep(0.5)
    assert "no answer within" in run(tmp_path).stopped
    assert ids(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "give one with --token, or in FASTDIST_TOKEN"),
        (403, "is the token right?"),
        (404, "of a distributor?"),
        (301, "of a distributor?"),
    ],
)
def test_a_wrong_url_refuses_no_dead_letter(tmp_path, distributor, run, status, advice):
    fill(tmp_path, "abc")
    distributor.otherwise = problem(status, "who is there?")
    summary = run(tmp_path, connections=1)
    assert (summary.replayed, summary.refused, summary.left) == (0, 0, 3)
    assert len(distributor.requests) == 1
    assert f"answers {status} (who is there?)" in summary.stopped
    assert summary.stopped.endswith(advice)
    assert ids(tmp_path) == ["a", "b", "c"]


def test_file_in_use_by_a_worker_is_skipped(tmp_path, run, events, monkeypatch):
    monkeypatch.setattr(held_file, "LOCK_PATIENCE", 0.1)
    fill(tmp_path, "a")
    busy = DeadLetterFiles(tmp_path, "w1-1")
    busy.write(as_line(packet("b"), "refused", "A1", 400, None))
    fill(tmp_path, "c", owner="w2-1")
    summary = run(tmp_path)
    assert (summary.replayed, summary.left, summary.stopped) == (2, 1, None)
    assert ids(tmp_path) == ["b"]
    assert len(events.notes) == 1
    assert "skipped" in events.notes[0]


def test_file_released_in_time_is_replayed(tmp_path, run):
    busy = DeadLetterFiles(tmp_path, "w1-1")
    busy.write(as_line(packet("b"), "refused", "A1", 400, None))
    threading.Timer(0.3, busy.close).start()
    assert run(tmp_path).replayed == 1


def test_new_dead_letters_are_left_for_later(tmp_path, distributor):
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    dead_letters.write(as_line(packet("a"), "refused", "A1", 400, None))
    idle(dead_letters)
    files = find_files(tmp_path)
    dead_letters.write(as_line(packet("b"), "refused", "A1", 400, None))
    dead_letters.close()
    Replay(files, Selection(), Target.parse(distributor.url, None), Listener()).run(1)
    assert distributor.accepted == {"a": 1}
    assert ids(tmp_path) == ["b"]


def test_two_at_once_send_nothing_twice(tmp_path, distributor):
    names = [f"p-{i}" for i in range(200)]
    for i in range(0, 200, 20):
        fill(tmp_path, names[i : i + 20])

    def run():
        Replay(find_files(tmp_path), Selection(), Target.parse(distributor.url, None), Listener()).run(2)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert distributor.accepted == dict.fromkeys(names, 1)
    assert names_in(tmp_path / "dead-letters") == []


# ---- a replay that does not end well


KILLED = """
import os, sys
from pathlib import Path
from fastdist.client import replay
from fastdist.storage.dead_letter_format import Selection, find_files
from fastdist.client.connection import Target

class Killer:
    count = 0
    def begin(self, total): pass
    def note(self, text): pass
    def waiting(self, why, seconds): pass
    def refused(self, dead_letter, response): pass
    def replayed(self):
        self.count += 1
        if self.count == int(sys.argv[3]):
            os.kill(os.getpid(), 9)

target = Target.parse(sys.argv[2], None)
replay.Replay(find_files(Path(sys.argv[1])), Selection(), target, Killer()).run(4)
"""


@pytest.mark.parametrize("after", [1, 30, 75])
def test_killed_replay_repeats_in_flight(tmp_path, distributor, run, after):
    names = [f"p-{i}" for i in range(80)]
    path = fill(tmp_path, names[:40])
    fill(tmp_path, names[40:])
    distributor.script["p-0"] = [problem(400, "no")]
    dead = subprocess.run([sys.executable, "-c", KILLED, tmp_path, distributor.url, str(after)], check=False)
    assert dead.returncode == -9
    known = {name for name in ids(tmp_path) if name}
    assert set(names) - known <= set(distributor.accepted)
    summary = run(tmp_path)
    assert summary.left == 1
    assert ids(tmp_path) == ["p-0"]
    assert set(distributor.accepted) == set(names[1:])
    assert sum(distributor.accepted.values()) <= 79 + 4
    assert names_in(path.parent) == [path.name]


def test_journal_with_torn_entry_goes_on(tmp_path, distributor, run):
    path = fill(tmp_path, "abc")
    first, second, _ = read_file(find_files(path)[0])
    journal_of(path).write_text(
        f"\n{first.offset} {digest_of(first.raw)}\nnonsense\n{second.offset} {digest_of(second.raw)[:5]}"
    )
    assert ids(path) == ["b", "c"]
    with HeldFile.hold(path, 0) as held:
        held.note_replayed(next(iter(held.lines())))
    assert ids(path) == ["c"]
    run(tmp_path)
    assert distributor.accepted == {"c": 1}
    assert names_in(path.parent) == []


def test_an_old_journal_hides_no_dead_letter(tmp_path, run, distributor):
    """The replay was killed between the rename of the new file and the deletion of the journal."""
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    for body in (b'{"first":1}', b'{"second":2}'):
        dead_letters.write(as_line(packet("key", body), "refused", "A1", 404, "no"))
    dead_letters.close()
    (found,) = find_files(tmp_path)
    with HeldFile.hold(found.path, 0) as held:
        held.note_replayed(next(iter(held.lines())))
        stale = journal_of(found.path).read_bytes()
        held.rewrite()
    journal_of(found.path).write_bytes(stale)
    assert [line.dead_letter.body for line in read_file(found)] == ['{"second":2}']
    assert run(tmp_path).replayed == 1
    assert [body for _, _, body in distributor.requests] == [b'{"second":2}']
    assert names_in(found.path.parent) == []


def test_old_files_journal_hides_nothing(tmp_path):
    path = fill(tmp_path, "abc")
    journal_of(path).write_text("0 z\n17 b\n")
    assert ids(path) == ["a", "b", "c"]


def test_journals_of_missing_files_go(tmp_path, run):
    path = fill(tmp_path, "a")
    folder = path.parent
    for name in ("gone.ndjson.replayed", "gone.ndjson.tmp", path.name + ".tmp", "mine.txt"):
        (folder / name).write_text("x")
    run(tmp_path)
    assert names_in(folder) == ["mine.txt"]


def test_unrewritable_file_keeps_progress(tmp_path, distributor, run, monkeypatch):
    path = fill(tmp_path, "abc")
    before = path.read_bytes()
    distributor.script["b"] = [problem(400, "no")]

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        summary = run(tmp_path)
    assert "cannot rewrite" in summary.stopped
    assert "No space left on device" in summary.stopped
    assert path.read_bytes() == before
    assert ids(path) == ["b"]
    assert names_in(path.parent) == [path.name, path.name + ".replayed"]
    assert run(tmp_path).left == 1
    assert distributor.accepted == {"a": 1, "c": 1}
    assert names_in(path.parent) == [path.name]


def test_stops_if_progress_cannot_be_noted(tmp_path, distributor, run, monkeypatch):
    fill(tmp_path, "abc")
    with monkeypatch.context() as disk:
        disk.setattr(HeldFile, "_create", broken)
        summary = run(tmp_path, connections=1)
    assert "cannot note what was replayed" in summary.stopped
    assert sum(distributor.accepted.values()) == 1
    assert run(tmp_path).left == 0
    assert distributor.accepted == {"a": 2, "b": 1, "c": 1}


def test_unnoted_progress_is_removed(tmp_path, run, monkeypatch):
    fill(tmp_path, "abc")
    with monkeypatch.context() as disk:
        disk.setattr(held_file, "journal_of", lambda path: path.with_name("no folder") / "x")
        summary = run(tmp_path, connections=1)
    assert "cannot note what was replayed" in summary.stopped
    assert summary.left == 2
    assert ids(tmp_path) == ["b", "c"]


def test_fault_in_a_thread_is_not_swallowed(tmp_path, run, events):
    fill(tmp_path, "abc")

    def fault():
        raise RuntimeError("a bug")

    events.replayed = fault
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path)


def test_ctrl_c_ends_it_in_good_order(tmp_path, distributor, run):
    names = [f"p-{i}" for i in range(50)]
    path = fill(tmp_path, names)
    asked = threading.Event()

    def interrupt():
        if len(distributor.requests) >= 10 and not asked.is_set():
            asked.set()
            os.kill(os.getpid(), signal.SIGINT)
        if asked.is_set():
            time.sleep(0.2)

    distributor.before_answer = interrupt
    summary = run(tmp_path)
    assert summary.stopped == "interrupted"
    assert 0 < summary.left < 50
    assert names_in(path.parent) == [path.name]
    assert set(names) - set(ids(tmp_path)) == set(distributor.accepted)
    distributor.before_answer = None
    assert run(tmp_path).left == 0
    assert distributor.accepted == dict.fromkeys(names, 1)


# ---- what the distributor has accepted, but not synced


class Says(dict):
    """What a distributor says of itself; ``asked`` is called for each question."""

    def __init__(self, asked, **health):
        super().__init__({"/health": health} if health else {})
        self.asked = asked

    def get(self, path):
        self.asked(path)
        return super().get(path)


DISK = {"durability": "disk", "syncIntervalSeconds": 0.01, "storage": "ok"}


def test_replayed_dead_letters_go_if_synced(tmp_path, distributor, run):
    paths = [fill(tmp_path, "ab"), fill(tmp_path, "c", owner="w1-1")]
    seen = []
    distributor.says = Says(lambda path: seen.append((path, [each.exists() for each in paths])), **DISK)
    assert run(tmp_path, connections=1).left == 0
    assert seen[:2] == [("/health", [True, True])] * 2
    assert names_in(tmp_path / "dead-letters") == []


@pytest.mark.parametrize(
    "says",
    [
        DISK | {"storage": "failing"},
        DISK | {"syncIntervalSeconds": 3600},
    ],
)
def test_unsynced_dead_letters_stay_noted(tmp_path, distributor, run, events, says):
    path = fill(tmp_path, "ab")
    fill(tmp_path, "c", owner="w1-1")
    distributor.says = Says(lambda _: None, **says)
    assert run(tmp_path).left == 0
    assert len(events.notes) == 1
    assert "until the next replay" in events.notes[0]
    assert ids(tmp_path) == []
    assert journal_of(path).exists()
    distributor.says = Says(lambda _: None, **DISK)
    run(tmp_path)
    assert distributor.accepted == {"a": 1, "b": 1, "c": 1}
    assert names_in(path.parent) == []


def test_long_intervals_end_between_replays(tmp_path, distributor, run):
    path = fill(tmp_path, "ab")
    distributor.says = Says(lambda _: None, **(DISK | {"syncIntervalSeconds": 3600}))
    run(tmp_path)
    run(tmp_path)
    assert path.exists()
    ago = time.time() - 7300
    os.utime(journal_of(path), (ago, ago))
    assert run(tmp_path).left == 0
    assert distributor.accepted == {"a": 1, "b": 1}
    assert names_in(path.parent) == []


def test_journal_follows_no_link(tmp_path, distributor, run):
    """As root it would change another file."""
    path = fill(tmp_path, "a")
    other = tmp_path / "other"
    other.write_bytes(b"")
    journal_of(path).symlink_to(other)
    run(tmp_path)
    assert other.read_bytes() == b""
    assert distributor.accepted == {"a": 1}


class Started(Says):
    """A distributor that has the state of ``DISK``, but for what is given, and was started at ``at``."""

    def __init__(self, **health):
        super().__init__(lambda _: None, **(DISK | health))
        self.at = time.time() - 3600

    def get(self, path):
        said = super().get(path)
        return said and said | {"uptimeSeconds": time.time() - self.at}


def age(path):
    """Have all that a journal notes be noted a minute earlier."""
    journal = journal_of(path)
    text = re.sub(r"(?<=since )\S+", lambda since: f"{float(since[0]) - 60:.3f}", journal.read_text())
    journal.write_text(text)


@pytest.mark.parametrize(
    ("host", "restarted", "times"), [("127.0.0.1", 0, 1), ("127.0.0.1", 1, 2), ("localhost", 0, 2)]
)
def test_what_may_be_lost_is_sent_again(tmp_path, distributor, host, restarted, times):
    """By a distributor that was restarted before it had synced, or by one that is not asked."""
    path = fill(tmp_path, "ab")
    distributor.says = Started(storage="failing")
    replayed(distributor, Listener(), tmp_path)
    assert ids(tmp_path) == []
    distributor.says["/health"] = DISK
    age(path)
    if restarted:
        distributor.says.at = time.time() - 30
    target = Target.parse(f"http://{host}:{distributor.server_port}", None)
    summary = replayed(distributor, Listener(), tmp_path, target=target)
    assert (summary.replayed, summary.left) == (2 * (times - 1), 0)
    assert distributor.accepted == {"a": times, "b": times}
    assert names_in(path.parent) == []


def test_restart_during_a_replay_is_seen(tmp_path, distributor, run, events):
    path = fill(tmp_path, "ab")
    distributor.says = Started()

    def restart():
        if distributor.accepted:
            time.sleep(0.01)  # for clocks to tell what is after that
            distributor.says.at = time.time()

    distributor.before_answer = restart
    run(tmp_path, connections=1)
    assert "the distributor was restarted meanwhile" in events.notes[0]
    assert path.exists()
    assert ids(tmp_path) == []
    distributor.before_answer = None
    age(path)
    distributor.says.at -= 30
    assert run(tmp_path).left == 0
    assert distributor.accepted == {"a": 2, "b": 2}
    assert names_in(path.parent) == []


def test_held_for_a_moment_is_not_removed(tmp_path, distributor, monkeypatch):
    """What another distributor had: not seen at the beginning, as a worker looked whether the file is in use."""
    path = fill(tmp_path, "ab")
    distributor.says = Started(storage="failing")
    replayed(distributor, Listener(), tmp_path)
    distributor.says["/health"] = DISK | {"durability": "fsync"}
    hold, busy = HeldFile.hold, [True]

    def hold_later(path, patience):
        if busy and not busy.clear():
            raise BlockingIOError
        return hold(path, patience)

    monkeypatch.setattr(HeldFile, "hold", hold_later)
    target = Target.parse(f"http://localhost:{distributor.server_port}", None)
    for replays in (0, 2):
        assert replayed(distributor, Listener(), tmp_path, target=target).replayed == replays
    assert distributor.accepted == {"a": 2, "b": 2}
    assert names_in(path.parent) == []


@pytest.mark.parametrize("durability", ["memory", "fsync", None])
def test_no_sync_expected_means_no_wait(tmp_path, distributor, run, durability):
    """Nothing is asked of who syncs before it answers; who says nothing of itself is not distrusted for ever."""
    fill(tmp_path, "ab")
    asked = []
    distributor.says = Says(asked.append, **(DISK | {"durability": durability} if durability else {}))
    run(tmp_path)
    assert asked == ["/health"] * (1 if durability else 2)
    assert names_in(tmp_path / "dead-letters") == []
