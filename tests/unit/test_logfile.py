"""Logs that grow, are rotated, truncated or exchanged; streams; and going on where one was left."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from pathlib import Path

import msgspec
import pytest

from fastdist.client import logfile, rotation
from fastdist.client import offsets as offsets_module
from fastdist.client.logfile import Log, Stream, Trail
from fastdist.client.offsets import OffsetFile
from fastdist.client.packing import MIN_PACKET_BYTES, Recipe, Style

RECIPE = Recipe(Style("web-42", "app.log"), 3, MIN_PACKET_BYTES)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(logfile, "IDLE", 0.01)
    monkeypatch.setattr(logfile, "LINGER", 0.05)
    monkeypatch.setattr(logfile, "ROTATION_PATIENCE", 0.1)


@pytest.fixture
def notes():
    return []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "app.log"


@pytest.fixture
def trail(path, notes):
    return Trail(path, RECIPE, notes.append)


@pytest.fixture
def offsets(tmp_path):
    """Return the offset file, opened again at each call."""
    opened = []

    def offsets():
        for before in opened:
            before.__exit__()
        opened[:] = [OffsetFile(tmp_path / "app.offset")]
        return opened[0]

    yield offsets
    for file in opened:
        file.__exit__()


def never():
    return False


def lines(first, last):
    return b"".join(b"line %d\n" % number for number in range(first, last))


def only(sources):
    (source,) = sources
    return source


def all_of(source):
    """Return the packets of a source that ends."""
    return [packet for packet in source.packets(never) if packet]


def text_of(packets):
    """Return the lines in packets, by the packets' bodies."""
    return b"".join(packet.body for packet in packets).count(b'"line ')


def accept(offsets, log, packets, count=None):
    """Record that the first ``count`` packets are accepted and the others planned."""
    count = len(packets) if count is None else count
    last = packets[count - 1] if count else None
    offsets.save(log.reached(last, [(packet.end, packet.cut) for packet in packets[count:]]))


def following(trail, log):
    """Return what comes after a log; the log is closed."""
    after = trail.following(log, never)
    log.close()
    return after


# ----------------------------------------------------------------------------------------------------------- from start


def test_a_log_is_read_to_its_end(path, trail):
    path.write_bytes(lines(0, 10) + b"the end")
    log = trail.begin(None)
    packets = all_of(log)
    assert [packet.messages for packet in packets] == [3, 3, 3, 2]
    assert packets[-1].end == log.size == path.stat().st_size
    assert log.outcome == "end"


def test_two_runs_make_the_same_packets(path, trail):
    path.write_bytes(lines(0, 10))
    assert all_of(trail.begin(None)) == all_of(trail.begin(None))


def test_a_log_that_is_not_there(trail, offsets):
    with pytest.raises(FileNotFoundError):
        trail.begin(None)
    with pytest.raises(FileNotFoundError):
        trail.begin(offsets())


# ------------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("accepted", range(5))
def test_planned_packets_keep_their_ids(path, trail, offsets, notes, accepted):
    """Also when the log has grown meanwhile in the middle of what was its last line."""
    path.write_bytes(lines(0, 10) + b"unfinished")
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    accept(file, log, packets, accepted)
    with path.open("ab") as more:
        more.write(b" business\n" + lines(11, 13))
    log = trail.begin(offsets())
    again = all_of(log)
    assert [(each.id, each.body) for each in again[: 4 - accepted]] == [
        (each.id, each.body) for each in packets[accepted:]
    ]
    rest = again[4 - accepted :]
    assert rest[0].offset == packets[-1].end
    assert b'"message":" business","metadata":{"part":' in rest[0].body
    assert sum(packet.messages for packet in rest) == 3
    assert notes == []


def test_new_limits_do_not_change_the_plan(path, trail, offsets, notes):
    path.write_bytes(lines(0, 10))
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    accept(file, log, packets, 1)
    other = Trail(path, Recipe(RECIPE.style, 1, MIN_PACKET_BYTES), notes.append)
    again = all_of(other.begin(offsets()))
    assert again == packets[1:]
    with path.open("ab") as more:
        more.write(lines(10, 12))
    assert [packet.messages for packet in all_of(other.begin(offsets()))] == [3, 3, 1, 1, 1]


def test_planned_parts_keep_their_cuts(path, trail, offsets, notes):
    """Where a line comes in parts depends on the most bytes of a packet: those it was planned with."""
    path.write_bytes(b"x" * (RECIPE.max_line * 5 + 7) + b"\n" + lines(0, 3))
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    accept(file, log, packets, 1)
    other = Trail(path, Recipe(RECIPE.style, 3, 2 * MIN_PACKET_BYTES), notes.append)
    assert all_of(other.begin(offsets())) == packets[1:]


def test_only_the_refused_part_is_cut_again(path, offsets, notes):
    path.write_bytes(lines(0, 12))
    file = offsets()
    log = Trail(path, RECIPE, notes.append).begin(file)
    packets = all_of(log)
    plan = [(packet.end, 0 if number == 1 else packet.cut) for number, packet in enumerate(packets)]
    file.save(log.reached(None, plan))
    again = all_of(Trail(path, Recipe(RECIPE.style, 2, MIN_PACKET_BYTES), notes.append).begin(offsets()))
    assert [packet.messages for packet in again] == [3, 2, 1, 3, 3]
    assert [packet.id for packet in again if packet.messages == 3] == [packets[n].id for n in (0, 2, 3)]


def test_part_of_overlong_line_is_repeated(path, trail, offsets):
    path.write_bytes(b"x" * (RECIPE.max_line * 5 + 7) + b"\n" + lines(0, 3))
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    assert [packet.messages for packet in packets] == [3, 3, 3]
    for accepted in range(3):
        accept(file, log, packets, accepted)
        assert all_of(trail.begin(offsets())) == packets[accepted:]
        file = offsets()


def test_unchanged_log_sends_nothing(path, trail, offsets):
    path.write_bytes(lines(0, 4))
    file = offsets()
    log = trail.begin(file)
    accept(file, log, all_of(log))
    assert all_of(trail.begin(offsets())) == []


def test_a_plan_beyond_the_end_is_given_up(path, trail, offsets):
    """A crash of the system may cost a log more than the plan."""
    path.write_bytes(lines(0, 9))
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    accept(file, log, packets, 1)
    os.truncate(path, packets[1].end + 3)
    again = all_of(trail.begin(offsets()))
    assert again[0] == packets[1]
    assert [(each.offset, each.end) for each in again[1:]] == [(packets[1].end, packets[1].end + 3)]


# ------------------------------------------------------------------------------------ rotated, truncated, another's log


@pytest.fixture
def half_sent(path, trail, offsets):
    """A log of nine lines, three of which are accepted and three planned; its packets."""
    path.write_bytes(lines(0, 9))
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    accept(file, log, packets[:2], 1)
    return packets


def test_rotated_logs_rest_is_sent_first(path, trail, offsets, notes, half_sent):
    path.rename(path.with_name("app.log.1"))
    path.write_bytes(lines(100, 102))
    old = trail.begin(offsets())
    assert all_of(old) == half_sent[1:]
    new = following(trail, old)
    (packet,) = all_of(new)
    assert (packet.offset, packet.messages) == (0, 2)
    assert following(trail, new) is None
    assert notes == [f"{path} was rotated; sending the rest of the old one from app.log.1 first"]


def test_rotated_log_without_new_one_is_sent(path, trail, offsets, notes, half_sent):
    path.rename(path.with_name("app.log.1"))
    assert all_of(trail.begin(offsets())) == half_sent[1:]
    assert "is not there" in only(notes)


def test_log_behind_a_changed_link_is_found(path, tmp_path, offsets, notes):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "monday").write_bytes(lines(0, 9))
    path.symlink_to(logs / "monday")
    trail = Trail(path, RECIPE, notes.append)
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    accept(file, log, packets, 1)
    path.unlink()
    (logs / "tuesday").write_bytes(lines(10, 12))
    path.symlink_to(logs / "tuesday")
    old = trail.begin(offsets())
    assert all_of(old) == packets[1:]
    assert text_of(all_of(following(trail, old))) == 2


def test_new_log_starts_at_0_if_old_is_gone(path, trail, offsets, notes, half_sent):
    held = path.open("rb")  # so that its inode is not used again
    path.unlink()
    path.write_bytes(lines(0, 12))
    again = all_of(trail.begin(offsets()))
    held.close()
    assert text_of(again) == 12
    assert not {each.id for each in again} & {each.id for each in half_sent}
    assert "the one before is gone" in only(notes)


@pytest.mark.parametrize("now", [b"", lines(0, 1), lines(50, 90)], ids=["empty", "shorter", "longer"])
def test_truncated_log_restarts_with_new_ids(  # noqa: PLR0913
    path, trail, offsets, notes, half_sent, *, now
):
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(now)
    again = all_of(trail.begin(offsets()))
    assert text_of(again) == now.count(b"\n")
    assert not {each.id for each in again} & {each.id for each in half_sent}
    assert "was truncated or rewritten" in only(notes)


@pytest.mark.usefixtures("half_sent")
def test_rewritten_same_lines_get_new_ids(path, trail, offsets):
    """An analyzer that drops repetitions would drop the new lines."""
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(lines(0, 2))
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    accept(file, log, packets, 0)
    assert all_of(trail.begin(offsets())) == packets
    assert log.position.identity.startswith(f"{log.position.device}:{log.position.inode}:")


@pytest.mark.usefixtures("half_sent")
def test_offsets_of_another_log_are_refused(path, offsets, notes):
    other = path.with_name("other.log")
    other.write_bytes(lines(0, 3))
    with pytest.raises(ValueError, match=r"these are the offsets of .*/app.log; each log needs a file of its own"):
        Trail(other, RECIPE, notes.append).begin(offsets())


def test_moved_log_is_still_that_log(path, tmp_path, offsets, notes, half_sent):
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "moved.log")
    assert all_of(Trail(moved, RECIPE, notes.append).begin(offsets())) == half_sent[1:]
    assert notes == []


# ------------------------------------------------------------------------------------------------------------ following


class Follower:
    """Follows a trail; each step returns the packets up to the next pause."""

    def __init__(self, trail, offsets=None):
        self.trail = trail
        self.stopping = False
        self.log = trail.begin(offsets)
        self.packets = self.log.packets(lambda: self.stopping, follow=True)

    def step(self):
        return list(itertools.takewhile(lambda packet: packet is not None, self.packets))

    def until_it_ends(self):
        return [packet for packet in self.packets if packet is not None]

    def next(self):
        self.log = self.trail.following(self.log, lambda: self.stopping)
        self.packets = self.log.packets(lambda: self.stopping, follow=True)
        return self


def append(path, data):
    with path.open("ab") as file:
        file.write(data)


def test_a_log_that_is_followed_goes_on(path, trail):
    path.write_bytes(lines(0, 4))
    follower = Follower(trail)
    assert [packet.messages for packet in follower.step()] == [3, 1]
    assert follower.step() == []
    append(path, lines(4, 6))
    assert [packet.messages for packet in follower.step()] == [2]


def test_unended_line_is_waited_for(path, trail):
    path.write_bytes(b"one\ntw")
    follower = Follower(trail)
    assert [(each.offset, each.end) for each in follower.step()] == [(0, 4)]
    append(path, b"o\n")
    assert [(each.offset, each.end) for each in follower.step()] == [(4, 8)]


def test_following_ends_on_request(path, trail):
    path.write_bytes(b"one\ntw")
    follower = Follower(trail)
    follower.step()
    follower.stopping = True
    assert follower.until_it_ends() == []
    assert follower.trail.following(follower.log, lambda: True) is None


def test_rotated_log_is_read_while_written(path, trail, notes):
    path.write_bytes(lines(0, 2))
    follower = Follower(trail)
    assert text_of(follower.step()) == 2
    old = path.rename(path.with_name("app.log.1"))
    assert follower.step() == []
    append(old, lines(2, 4))
    assert text_of(follower.step()) == 2
    path.write_bytes(lines(10, 12))
    append(old, lines(4, 5) + b"no line end")
    assert text_of(follower.step()) == 1
    last = follower.until_it_ends()
    assert b"no line end" in only(last).body
    assert follower.log.outcome == "rotated"
    assert text_of(follower.next().step()) == 2
    assert notes == [f"{path} was rotated; going on with the new one"]


def test_truncated_log_starts_again(path, trail, notes):
    path.write_bytes(lines(0, 2) + b"unfinished")
    follower = Follower(trail)
    first = follower.step()
    os.truncate(path, 0)
    append(path, lines(0, 2))
    assert b"unfinished" in only(follower.until_it_ends()).body
    again = follower.next().step()
    assert text_of(again) == 2
    assert again[0].id != first[0].id
    assert only(notes).startswith(f"{path} was truncated; sending it from its beginning")


@pytest.mark.parametrize("more", [0, 1, 500], ids=["as long", "longer", "more than a block"])
def test_truncated_and_regrown_log_restarts(path, trail, notes, more):
    """Its length does not tell: the bytes before do."""
    path.write_bytes(lines(100, 200))
    follower = Follower(trail)
    follower.step()
    os.truncate(path, 0)
    append(path, lines(200, 300 + more))
    follower.until_it_ends()
    assert follower.log.outcome == "truncated"
    assert text_of(follower.next().step()) == 100 + more
    assert "was truncated" in only(notes)


def test_regrown_log_is_known_by_bytes_read(path, trail, offsets, notes):
    """What is recorded then is of the bytes that were read, not of those that are in their place by now."""
    path.write_bytes(lines(100, 110))
    file = offsets()
    follower = Follower(trail, file)
    packets = follower.step()
    os.truncate(path, 0)
    append(path, lines(200, 300))
    accept(file, follower.log, packets)
    assert text_of(all_of(trail.begin(offsets()))) == 100
    assert "was truncated" in only(notes)


def test_truncated_then_renamed_log_restarts(path, trail, offsets, half_sent):
    os.truncate(path, 0)
    append(path, lines(200, 230))
    path.rename(path.with_name("app.log.1"))
    path.write_bytes(lines(300, 301))
    log = trail.begin(offsets())
    assert text_of(all_of(log)) == 30
    assert text_of(all_of(following(trail, log))) == 1
    assert half_sent


def test_deleted_recreated_log_is_another(path, trail, offsets, half_sent, monkeypatch):
    """It may have the inode of the old one, and lines without a time look alike."""
    file = offsets()
    file.save(msgspec.structs.replace(file.position, birth=1))
    for module in (logfile, offsets_module, rotation):
        monkeypatch.setattr(module, "birth_ns", lambda _: 2)
    append(path, lines(9, 12))
    again = all_of(trail.begin(offsets()))
    assert text_of(again) == 12
    assert not {each.id for each in again} & {each.id for each in half_sent}


def test_unreadable_successor_is_waited_for(path, trail, notes, monkeypatch):
    path.write_bytes(lines(0, 2))
    follower = Follower(trail)
    follower.step()
    path.rename(path.with_name("app.log.1"))
    path.write_bytes(lines(5, 8))
    follower.until_it_ends()
    opened, refusals = os.open, iter(range(3))

    def refuse(name, *arguments, **options):
        if name == path and not arguments[0] & os.O_PATH and next(refusals, None) is not None:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return opened(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert text_of(follower.next().step()) == 3
    assert notes == [
        f"{path}: Permission denied; waiting until it can be read",
        f"{path} was rotated; going on with the new one",
    ]


def test_log_with_no_utf_8_name_has_offsets(tmp_path, offsets, notes):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.log"))
    path.write_bytes(lines(0, 4))
    trail = Trail(path, RECIPE, notes.append)
    file = offsets()
    log = trail.begin(file)
    packets = all_of(log)
    accept(file, log, packets, 1)
    assert all_of(trail.begin(offsets())) == packets[1:]
    assert offsets().position.file.endswith("/caf\\xe9.log")


def test_the_next_log_may_be_long_in_coming(path, trail):
    path.write_bytes(lines(0, 2))
    follower = Follower(trail)
    follower.step()
    path.rename(path.with_name("app.log.1"))
    path.write_bytes(b"")
    assert follower.until_it_ends() == []
    path.unlink()
    coming = path.with_name("coming")
    coming.write_bytes(lines(5, 6))
    threading.Timer(0.1, coming.rename, [path]).start()
    assert text_of(follower.next().step()) == 1


def test_rest_of_rotated_log_is_sent(path, trail, offsets, half_sent):
    """There is no new log yet: what is still written to the old one is sent, and the new one is found."""
    old = path.rename(path.with_name("app.log.1"))
    follower = Follower(trail, offsets())
    assert follower.step() == half_sent[1:]
    append(old, lines(9, 10))
    assert text_of(follower.step()) == 1
    path.write_bytes(lines(20, 23))
    assert follower.until_it_ends() == []
    assert text_of(follower.next().step()) == 3


# -------------------------------------------------------------------------------------------------------------- streams


@pytest.fixture
def pipe():
    """Return (stream, write): a stream and what writes to it; without bytes, it closes the other end."""
    reading, writing = os.pipe()
    open_ends = {writing}

    def write(data=None):
        if data is None:
            open_ends.discard(writing)
            os.close(writing)
        else:
            os.write(writing, data)

    stream = Stream(reading, RECIPE)
    yield stream, write
    stream.close()
    for fd in open_ends:
        os.close(fd)


def test_a_stream_is_read_to_its_end(pipe):
    stream, write = pipe
    write(lines(0, 4) + b"the end")
    write()
    packets = all_of(stream)
    assert [packet.messages for packet in packets] == [3, 2]
    assert not stream.resumable


def test_lines_of_a_stream_wait_briefly(pipe):
    stream, write = pipe
    write(lines(0, 1))
    packets = (packet for packet in stream.packets(never) if packet)
    assert next(packets).messages == 1
    write(lines(1, 2) + b"not ended")
    assert next(packets).messages == 1
    write()
    assert b"not ended" in next(packets).body


def test_trickling_lines_delay_no_earlier(pipe):
    stream, write = pipe
    recipe = Recipe(RECIPE.style, 100_000, MIN_PACKET_BYTES)
    stream._packer = logfile.Packer(recipe, "x")
    seen = []
    for packet in stream.packets(never):
        if packet:
            seen.append(packet)
            break
        write(b"x\n")  # always before the one before has waited for long
    assert seen[0].messages >= 1


def test_stopped_stream_yields_its_rest(pipe):
    stream, write = pipe
    stopping = False
    packets = stream.packets(lambda: stopping)
    write(lines(0, 1))
    assert next(packet for packet in packets if packet).messages == 1
    write(lines(1, 5) + b"not ended")
    stopping = True
    assert text_of(rest := [packet for packet in packets if packet]) == 4
    assert b"not ended" in rest[-1].body


def test_standard_input_has_ids_of_its_own():
    first, second = (Stream(os.dup(0), RECIPE) for _ in range(2))
    assert first._packer._identity != second._packer._identity
    first.close()
    second.close()
    os.fstat(0)


def test_a_pipe_with_a_name_is_a_stream(path, trail):
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[lines(0, 2)])
    writer.start()
    source = trail.begin(None)
    assert isinstance(source, Stream)
    assert text_of(all_of(source)) == 2
    writer.join()


def test_a_log_has_what_is_asked_of_a_source(path, trail):
    path.write_bytes(lines(0, 1))
    log = trail.begin(None)
    assert isinstance(log, Log)
    assert (log.start, log.size, log.resumable) == (0, 7, True)
    log.close()
