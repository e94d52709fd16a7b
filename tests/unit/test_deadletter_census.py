"""The census of dead letters says what a slow reading of all files says, whatever happens to them; and reads little."""

from __future__ import annotations

import os
from collections import Counter

import msgspec
import pytest
from dead_letters import WHOLE, fill, packet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdist.client.held_file import HeldFile
from fastdist.client.purge import purge
from fastdist.dead_letter_report import LAST, Count, Described, Report, encode
from fastdist.shm.block import SharedBlock
from fastdist.storage import dead_letter_census as module
from fastdist.storage.dead_letter_census import Census, HaltedError
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import (
    FOLDER,
    Selection,
    as_line,
    find_files,
    journal_of,
    read_file,
    read_journal,
)

SECRET = b"what is in the packet"


def slowly(folder):
    """Return what is there, by reason and analyzer: the model."""
    counts = Counter()
    for found in find_files(folder):
        for line in read_file(found):
            analyzer = line.dead_letter.analyzer or "" if line.dead_letter else ""
            counts[line.reason, analyzer] += 1
    return counts


def counted(census):
    """Return what a census says; a torn line is seen to be one when nothing has followed it."""
    census.look()
    return Counter({(each.reason, each.analyzer): each.packets for each in census.look().counts if each.packets})


class Site:
    """Files of dead letters, and what happens to them."""

    def __init__(self, folder):
        self.folder = folder
        (folder / FOLDER).mkdir(parents=True)
        self.writers = [DeadLetterFiles(folder, f"w{number}-1") for number in range(2)]
        self.census = Census(folder / FOLDER)
        self.written = 0

    def write(self, number):
        self.written += 1
        reason, analyzer = ("refused", "exhausted", "shutdown")[number % 3], ("A1", "A2", None)[number % 3]
        writer = self.writers[number % 2]
        writer.write(as_line(packet(f"p{self.written}", SECRET), reason, analyzer, 422, "HTTP 422", SECRET))
        writer.settle()

    def end(self, number):
        self.writers[number % 2].close()

    def file(self, number):
        files = find_files(self.folder)
        return files[number % len(files)] if files else None

    def replay(self, number):
        """Of a file, every second dead letter; rewrite it or not."""
        self._close()
        if (found := self.file(number)) is None:
            return
        with HeldFile.hold(found.path, 0.0) as file:
            for line in list(file.lines())[::2]:
                if line.dead_letter:
                    file.note_replayed(line)
            if number % 3 == 0:
                file.rewrite()

    def purge(self, number):
        self._close()
        reason = ("refused", "exhausted", None)[number % 3]
        purge(find_files(self.folder), Selection(reason=reason), pytest.fail)

    def delete(self, number):
        if (found := self.file(number)) is not None:
            found.path.unlink()

    def lose_journal(self, number):
        if (found := self.file(number)) is not None:
            journal_of(found.path).unlink(missing_ok=True)

    def cut(self, number):
        if (found := self.file(number)) is not None:
            os.truncate(found.path, found.size * (number % 5) // 5)

    def tear(self, number):
        self._close()
        if (found := self.file(number)) is not None:
            with found.path.open("ab") as file:
                file.write(b'{"id":"torn' + b"\n" * (number % 2))

    def replace(self, number):
        """By one with as many bytes, under the same name."""
        self._close()
        if (found := self.file(number)) is not None:
            content = found.path.read_bytes()
            found.path.write_bytes(content[::-1].strip() + b"\n" if number % 2 else content)

    def _close(self):
        for writer in self.writers:
            writer.close()


EVENTS = (
    "write",
    "write",
    "write",
    "end",
    "replay",
    "purge",
    "delete",
    "lose_journal",
    "cut",
    "tear",
    "replace",
    "look",
)


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 29)), max_size=60))
@example([("write", 0), ("replay", 1), ("lose_journal", 0)])
def test_census_agrees_with_a_slow_reading(tmp_path_factory, events):
    site = Site(tmp_path_factory.mktemp("data"))
    for event, number in events:
        if event == "look":
            site.census.look()
        else:
            getattr(site, event)(number)
        assert counted(site.census) == slowly(site.folder), event
    site._close()
    assert counted(site.census) == counted(Census(site.folder / FOLDER)), "as after a restart"


def test_replay_that_ends_during_a_look(tmp_path, monkeypatch):
    path = fill(tmp_path, ["a", "b", "c"])
    census = Census(tmp_path / FOLDER)
    with HeldFile.hold(path, 0.0) as file:
        for line, left in zip(list(file.lines()), (2, 1, 0), strict=True):
            file.note_replayed(line)
            if left:
                assert census.look().packets == left

    def end_before(of):
        path.unlink()
        journal_of(of).unlink()
        return read_journal(of)

    monkeypatch.setattr(module, "read_journal", end_before)
    assert census.look().packets == 0


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    site = Site(tmp_path)
    read = []
    decode = module.decoded

    def counting(raw):
        read.append(raw)
        return decode(raw)

    monkeypatch.setattr(module, "decoded", counting)
    for number in range(100):
        site.write(number)
    site.census.look()
    described = LAST
    assert len(read) == 100 + described
    site.census.look()
    assert len(read) == 100 + described
    site.write(0)
    site.census.look()
    assert len(read) == 100 + described + 2, "the line, and once more to describe it"
    site._close()
    with HeldFile.hold(find_files(tmp_path)[0].path, 0.0) as file:
        file.note_replayed(next(file.lines()))
    del read[:]
    site.census.look()
    assert len(read) == 1


def test_what_was_there_goes_to_0(tmp_path):
    """And stays a figure: a series that ends would leave its last value on a chart."""
    path = fill(tmp_path, ["a", "b"])
    census = Census(path.parent)
    assert census.look().counts == (Count("refused", "A1", 2),)
    path.unlink()
    report = census.look()
    assert report.counts == (Count("refused", "A1", 0),)
    assert (report.packets, report.bytes, report.files, report.last) == (0, 0, 0, ())


def test_the_last_are_shown_without_packet(tmp_path):
    site = Site(tmp_path)
    for number in range(50):
        site.write(number)
    report = site.census.look()
    assert [each.id for each in report.last] == [f"p{number}" for number in range(50, 30, -1)]
    first = report.last[0]
    assert (first.reason, first.analyzer, first.status, first.error) == ("exhausted", "A2", 422, "HTTP 422")
    assert (first.attempts, first.messages, first.bytes) == (2, 3, len(SECRET)) or first.bytes == len(SECRET)
    assert SECRET not in encode(report, 1 << 20)
    assert report.bytes == sum(found.size for found in find_files(tmp_path))


def test_many_files_leave_few_to_describe(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECENT", 2)
    for number in range(5):
        fill(tmp_path, [f"p{number}"], owner=f"w{number}")
    census = Census(tmp_path / FOLDER)
    assert len(census.look().last) == 2
    assert census.look().packets == 5


def test_no_folder_is_no_dead_letters(tmp_path):
    report = Census(tmp_path / "nothing" / "here").look()
    assert (report.packets, report.files) == (0, 0)
    assert 0 < report.available <= report.size


def test_whatever_a_line_holds_it_is_counted(tmp_path):
    path = fill(tmp_path, ["a", "b"])
    nested = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    edges = [
        WHOLE.replace(b"2026-01-02T03:04:05Z", time)
        for time in (b"0001-01-01T00:00:00+05:00", b"9999-12-31T23:00:00-05:00")
    ]
    path.write_bytes(path.read_bytes() + nested + b"\n".join(edges) + b"\n\xff\n")
    assert (
        counted(Census(tmp_path / FOLDER)) == slowly(tmp_path / FOLDER) == {("refused", "A1"): 2, ("unreadable", ""): 4}
    )


def test_what_is_no_file_is_passed_over(tmp_path):
    path = fill(tmp_path, ["a"])
    path.with_name("0.ndjson").mkdir()
    os.mkfifo(path.with_name("1.ndjson"))  # to open it would wait for ever
    path.with_name("2.ndjson").symlink_to(tmp_path)
    assert counted(Census(tmp_path / FOLDER)) == slowly(tmp_path / FOLDER) == {("refused", "A1"): 1}


def test_a_census_can_be_halted(tmp_path):
    fill(tmp_path, ["a", "b"])
    census = Census(tmp_path / FOLDER)
    with pytest.raises(HaltedError):
        census.look(lambda: True)
    assert census.look().packets == 2


# ---- the report


def described(number):
    return Described(f"p{number}", "refused", "A1", 422, "HTTP 422", 1, 2, "2026", "2026", 10)


@settings(max_examples=settings().max_examples // 2)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 300), st.integers(0, 10**6))), st.integers(100, 5000))
def test_a_report_fits_and_sums_up(kinds, room):
    counts = {(reason, f"analyzer-{number}"): packets for reason, number, packets in kinds}
    kept = tuple(Count(*kind, packets=packets) for kind, packets in counts.items())
    report = Report(kept, 1, 2, tuple(map(described, range(20))))
    data = encode(report, room)
    assert len(data) <= room
    shown = msgspec.msgpack.decode(data, type=Report)
    assert shown.packets == report.packets
    assert (shown.bytes, shown.files) == (1, 2)
    assert shown.last == report.last[: len(shown.last)]


@pytest.mark.parametrize("reasons", [[str(number) for number in range(8000)], ["r" * 70000], ["r" * 70000, "other"]])
def test_a_report_of_any_reasons_fits(reasons):
    counts = tuple(Count(reason, "", packets) for packets, reason in enumerate(reasons, 1))
    data = encode(Report(counts, 1, 2, ()), 64 << 10)
    assert len(data) <= 64 << 10
    shown = msgspec.msgpack.decode(data, type=Report)
    assert sum(count.packets for count in shown.counts) == sum(count.packets for count in counts)


@pytest.mark.parametrize(
    ("size", "available", "packets", "warned"),
    [(0, 0, 5, False), (100, 21, 5, False), (100, 20, 5, True), (100, 0, 5, True), (100, 0, 0, False)],
)
def test_a_full_file_system_is_warned_of(size, available, packets, warned):
    report = Report((Count("refused", "A1", packets),), size=size, available=available)
    assert bool(report.warning) == warned


def test_half_a_report_does_not_count():
    block = SharedBlock.create(1, 4)
    assert block.dead_letters == Report()
    first = Report((Count("refused", "A1", 1),), 7, 1, (described(1),), 100, 50)
    block.dead_letters = first
    other = SharedBlock.attach(block.fd)
    assert other.dead_letters == first
    block._dead_letters._part[20] ^= 1  # as if it was just being written
    assert other.dead_letters == first
    second = Report((Count("refused", "A1", 2),))
    block.dead_letters = second
    assert other.dead_letters == second
    os.close(block.fd)
