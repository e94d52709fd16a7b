"""Dead letters purged, and counted."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime

from dead_letters import WHOLE, broken, fill, ids, names_in, packet

from fastdist.client import held_file, purge
from fastdist.client.held_file import HeldFile
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import Selection, as_line, find_files


def purged(files, selection, note):
    """Purge; return how many lines are gone, and how many files were skipped."""
    skipped = []

    def skip(text):
        skipped.append(text)
        note(text)

    return purge.purge(files, selection, skip).lines, len(skipped)


def test_purging_a_whole_file_needs_no_room(tmp_path, monkeypatch):
    path = fill(tmp_path, "ab")
    monkeypatch.setattr(HeldFile, "_create", broken)
    assert purged(find_files(tmp_path), Selection(), print) == (2, 0)
    assert names_in(path.parent) == []


def test_file_under_steady_trickle_is_purged(tmp_path):
    """Its worker is asked for it."""
    dead_letters, ended = DeadLetterFiles(tmp_path, "w0-1"), threading.Event()
    dead_letters.write(as_line(packet("first"), "refused", "A1", 400, None))
    files = find_files(tmp_path)

    def work():
        while not ended.wait(0.005):
            dead_letters.write(as_line(packet("later"), "refused", "A1", 400, None))
            dead_letters.settle()
            dead_letters.tick(time.monotonic_ns())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert purged(files, Selection(), print) == (1, 0)
    finally:
        ended.set()
        thread.join()
    dead_letters.close()
    assert set(ids(tmp_path)) <= {"later"}


def test_purge_removes_only_what_is_selected(tmp_path):
    fill(tmp_path, "ab", reason="refused")
    path = fill(tmp_path, "cd", reason="shutdown")
    with path.open("ab") as file:
        file.write(b"{torn")
    assert purged(find_files(tmp_path), Selection(reason="shutdown"), print) == (2, 0)
    assert ids(tmp_path) == ["a", "b", None]
    assert purged(find_files(tmp_path), Selection(reason="unreadable"), print) == (1, 0)
    assert ids(tmp_path) == ["a", "b"]
    assert purged(find_files(tmp_path), Selection(), print) == (2, 0)
    assert names_in(tmp_path / "dead-letters") == []


def test_purge_by_age_keeps_newer_ones(tmp_path):
    path = tmp_path / "a.ndjson"
    old = WHOLE.replace(b'"x"', b'"old"')
    new = old.replace(b"old", b"new").replace(b"2026-01-02", datetime.now(UTC).strftime("%Y-%m-%d").encode())
    path.write_bytes(b"unreadable\n" + old + b"\n" + new.replace(b"03:04:05Z", b"23:59:59Z") + b"\n")
    until = datetime(2026, 1, 3, tzinfo=UTC)
    assert purged(find_files(path), Selection(until=until), print) == (1, 0)
    assert ids(path) == [None, "new"]
    os.utime(path, (0, 0))
    assert purged(find_files(path), Selection(until=until), print) == (1, 0)
    assert ids(path) == ["new"]


def test_purge_skips_open_and_newer_files(tmp_path, monkeypatch):
    monkeypatch.setattr(held_file, "LOCK_PATIENCE", 0.05)
    dead_letters = DeadLetterFiles(tmp_path, "w0-1")
    dead_letters.write(as_line(packet("a"), "refused", "A1", 400, None))
    files = find_files(tmp_path)
    notes = []
    assert purged(files, Selection(), notes.append) == (0, 1)
    assert "skipped" in notes[0]
    dead_letters.write(as_line(packet("b"), "refused", "A1", 400, None))
    dead_letters.close()
    assert purged(files, Selection(), notes.append) == (1, 0)
    assert ids(tmp_path) == ["b"]


def test_purge_does_not_count_replayed(tmp_path):
    path = fill(tmp_path, "ab")
    with HeldFile.hold(path, 0) as held:
        held.note_replayed(next(iter(held.lines())))
    assert purged(find_files(tmp_path), Selection(), print) == (1, 0)
    assert names_in(path.parent) == []


def test_count_sums_lines_and_sizes(tmp_path):
    path = fill(tmp_path, "ab", body=b"12345")
    with path.open("ab") as file:
        file.write(b"{torn")
    census = purge.count(find_files(tmp_path), Selection())
    assert (census.lines, census.dead_letters, census.size) == (3, 2, 15)
    assert census.oldest < datetime.now(UTC)
    assert purge.count(find_files(tmp_path), Selection(reason="exhausted")).oldest is None
