"""Offset files: whole at every moment, for one process at a time, about one log."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from fastdist.offsets import TAIL, InUseError, OffsetFile, Position, tail_digest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.offset"


def position(**members):
    return Position(**{"file": "/var/log/app.log", "device": 1, "inode": 2, "identity": "1:2"} | members)


def test_what_is_saved_is_there_the_next_time(path):
    with OffsetFile(path) as offsets:
        assert offsets.position is None
        offsets.save(position(offset=3, planned=[5, 9], tail="x"))
        offsets.save(position(offset=5, planned=[9], tail="y"))
    with OffsetFile(path) as offsets:
        assert offsets.position == position(offset=5, planned=[9], tail="y")
    assert list(path.parent.iterdir()) == [path]


def test_a_file_of_one_process_is_not_another_ones(path):
    with OffsetFile(path) as offsets:
        with pytest.raises(InUseError, match="in use by another"):
            OffsetFile(path)
        offsets.save(position())
        with pytest.raises(InUseError):
            OffsetFile(path)
    OffsetFile(path).__exit__()


def test_a_file_that_is_replaced_while_one_waits_is_read_anew(path, monkeypatch):
    first = OffsetFile(path)
    first.save(position(offset=1))
    opened = os.open

    def replaced_meanwhile(*arguments, **options):
        fd = opened(*arguments, **options)
        monkeypatch.undo()
        first.save(position(offset=2))
        first.__exit__()
        return fd

    monkeypatch.setattr(os, "open", replaced_meanwhile)
    with OffsetFile(path) as offsets:
        assert offsets.position.offset == 2


def test_a_process_that_is_killed_leaves_no_lock(path):
    code = f"from pathlib import Path; from fastdist.offsets import OffsetFile; o = OffsetFile(Path({str(path)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; import os; os.kill(os.getpid(), 9)"], check=False)
    OffsetFile(path).__exit__()


def test_what_cannot_be_written_leaves_what_was_there(path):
    with OffsetFile(path) as offsets:
        offsets.save(position(offset=1))
        (path.parent / "log.offset.tmp").mkdir()
        with pytest.raises(OSError, match="Is a directory"):
            offsets.save(position(offset=2))
        (path.parent / "log.offset.tmp").rmdir()
        assert json.loads(path.read_text())["offset"] == 1
        offsets.save(position(offset=3))
    with OffsetFile(path) as offsets:
        assert offsets.position.offset == 3


def test_a_torn_temporary_file_does_not_matter(path):
    path.with_name("log.offset.tmp").write_text('{"file":')
    with OffsetFile(path) as offsets:
        assert offsets.position is None
        offsets.save(position())
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        "a log line\n",
        "{}",
        "[1]",
        '{"file":"x","device":1,"inode":2,"identity":"y","offset":"3"}',
        '{"file":"x","device":1,"inode":2,"identity":"y","offset":-1}',
        '{"file":"x","device":1,"inode":2,"identity":"y","offset":5,"planned":[5]}',
        '{"file":"x","device":1,"inode":2,"identity":"y","offset":5,"planned":[9,8]}',
        '{"file":"x","device":1,"inode":2,"identity":"y","unknown":1}',
        "\udcff",
    ],
)
def test_what_is_no_offset_file_is_refused_and_left_as_it_is(path, content):
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="delete it to send the log from its beginning"):
        OffsetFile(path)
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        OffsetFile(tmp_path / "nowhere" / "x")
    assert caught.value.filename == str(tmp_path / "nowhere" / "x")


def test_permissions_are_those_the_user_wants(path):
    before = os.umask(0o027)
    try:
        with OffsetFile(path) as offsets:
            offsets.save(position())
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("offset", [0, 1, TAIL - 1, TAIL, TAIL + 1, 3 * TAIL])
def test_a_position_fits_the_log_it_was_noted_for(tmp_path, offset):
    log = tmp_path / "app.log"
    log.write_bytes(bytes(i % 251 for i in range(3 * TAIL)))
    with log.open("r+b") as file:
        fd = file.fileno()
        noted = position(inode=os.fstat(fd).st_ino, offset=offset, tail=tail_digest(fd, offset))
        assert noted.fits(fd)
        file.seek(0, os.SEEK_END)
        file.write(b"more")
        file.flush()
        assert noted.fits(fd), "it may grow"
        assert not position(inode=noted.inode + 1, offset=offset, tail=noted.tail).fits(fd)
        if offset:
            file.seek(offset - 1)
            file.write(b"\xff")
            file.flush()
            assert not noted.fits(fd), "other bytes"
            file.truncate(offset - 1)
            assert not noted.fits(fd), "too short"
