"""Offset files: whole at every moment, for one process at a time, about one log."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fastdist._core import birth_ns
from fastdist.client.offsets import TAIL, InUseError, OffsetFile, Position, tail_digest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.offset"


def position(**members):
    return Position(**{"file": "/var/log/app.log", "device": 1, "inode": 2, "identity": "1:2"} | members)


def test_saved_offset_is_there_next_time(path):
    with OffsetFile(path) as offsets:
        assert offsets.position is None
        offsets.save(position(offset=3, planned=[5, 9], tail="x"))
        offsets.save(position(offset=5, planned=[9], tail="y"))
    with OffsetFile(path) as offsets:
        assert offsets.position == position(offset=5, planned=[9], tail="y")
    assert list(path.parent.iterdir()) == [path]


def test_file_is_locked_to_one_process(path):
    with OffsetFile(path) as offsets:
        with pytest.raises(InUseError, match="in use by another"):
            OffsetFile(path)
        offsets.save(position())
        with pytest.raises(InUseError):
            OffsetFile(path)
    OffsetFile(path).__exit__()


def test_file_replaced_during_wait_is_reread(path, monkeypatch):
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


def test_killed_process_leaves_no_lock(path):
    code = (
        f"from pathlib import Path; from fastdist.client.offsets import OffsetFile; o = OffsetFile(Path({str(path)!r}))"
    )
    subprocess.run([sys.executable, "-c", f"{code}; import os; os.kill(os.getpid(), 9)"], check=False)
    OffsetFile(path).__exit__()


def test_failed_write_leaves_the_old_content(path):
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


def test_the_offset_is_what_the_file_says(path):
    with OffsetFile(path) as offsets:
        assert offsets.offset == 0
        offsets.save(position(offset=1))
        (path.parent / "log.offset.tmp").mkdir()
        with pytest.raises(OSError, match="Is a directory"):
            offsets.save(position(offset=2))
        assert offsets.offset == 1
    with OffsetFile(path) as offsets:
        assert offsets.offset == 1


def test_torn_temporary_file_is_harmless(path):
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
        '{"file":"x","device":1,"inode":2,"identity":"y","planned":[8,9],"cuts":[1]}',
        '{"file":"x","device":1,"inode":2,"identity":"y","unknown":1}',
        "\udcff",
    ],
)
def test_foreign_file_is_refused_unchanged(path, content):
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="delete it to send the log from its beginning"):
        OffsetFile(path)
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_missing_folder_is_named_in_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        OffsetFile(tmp_path / "nowhere" / "x")
    assert caught.value.filename == str(tmp_path / "nowhere" / "x")


def test_permissions_follow_the_umask(path):
    before = os.umask(0o027)
    try:
        with OffsetFile(path) as offsets:
            offsets.save(position())
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("offset", [0, 1, TAIL - 1, TAIL, TAIL + 1, 3 * TAIL])
def test_position_fits_the_log_it_is_of(tmp_path, offset):
    log = tmp_path / "app.log"
    log.write_bytes(bytes(i % 251 for i in range(3 * TAIL)))
    with log.open("r+b") as file:
        fd = file.fileno()
        known = {"inode": os.fstat(fd).st_ino, "birth": birth_ns(fd)}
        noted = position(**known, offset=offset, tail=tail_digest(log.read_bytes()[:offset]))
        assert noted.fits(fd)
        file.seek(0, os.SEEK_END)
        file.write(b"more")
        file.flush()
        assert noted.fits(fd), "it may grow"
        assert not msgspec.structs.replace(noted, inode=noted.inode + 1).fits(fd)
        assert not noted.birth or not msgspec.structs.replace(noted, birth=noted.birth + 1).fits(fd)
        assert msgspec.structs.replace(noted, birth=0).fits(fd), "an offset file, or a file system, without it"
        if offset:
            file.seek(offset - 1)
            file.write(b"\xff")
            file.flush()
            assert not noted.fits(fd), "other bytes"
            file.truncate(offset - 1)
            assert not noted.fits(fd), "too short"


# ----------------------------------------------------------------------------------- a name that is no longer the file


def read(path):
    with OffsetFile(path) as offsets:
        return offsets.position


@pytest.mark.parametrize("what", ["deleted", "renamed", "exchanged", "folder exchanged"])
def test_removed_file_is_noticed_in_writing(tmp_path, what):
    path = tmp_path / "state" / "log.offset"
    path.parent.mkdir()
    with OffsetFile(path) as offsets:
        offsets.save(position(offset=1))
        assert offsets.has_its_name
        if what == "deleted":
            path.unlink()
        elif what == "folder exchanged":
            path.parent.rename(tmp_path / "old")
            path.parent.mkdir()
        else:
            path.rename(tmp_path / "old")
        if what == "exchanged":
            path.write_text("something else")
        assert not offsets.has_its_name
        offsets.save(position(offset=2))
        assert offsets.has_its_name
        with pytest.raises(InUseError):
            OffsetFile(path)
    assert read(path).offset == 2


def test_file_taken_by_another_is_left_alone(path):
    with OffsetFile(path) as first:
        first.save(position(offset=1))
        path.unlink()
        with OffsetFile(path) as second:
            second.save(position(offset=5))
            with pytest.raises(InUseError, match="in use by another"):
                first.save(position(offset=2))
    assert read(path).offset == 5


def test_link_stays_and_target_is_replaced(path, tmp_path):
    (tmp_path / "state").mkdir()
    path.symlink_to("state/offset")
    for offset in (1, 2):
        with OffsetFile(path) as offsets:
            offsets.save(position(offset=offset))
            offsets.save(position(offset=offset + 10))
            assert offsets.has_its_name
        assert path.is_symlink()
        assert list((tmp_path / "state").iterdir()) == [tmp_path / "state" / "offset"]
        assert read(tmp_path / "state" / "offset").offset == offset + 10


# ------------------------------------------------------------------------------------------------------------- in place


@pytest.fixture
def mounted(monkeypatch):
    """A file that is a mount point has to stay where it is."""

    def refuse(self, _):
        raise OSError(errno.EBUSY, "Device or resource busy", str(self))

    monkeypatch.setattr(Path, "rename", refuse)


@pytest.mark.usefixtures("mounted")
@pytest.mark.parametrize("before", [b"", b"as it was replaced"])
def test_unreplaceable_file_written_in_place(path, before):
    path.write_bytes(before and msgspec.json.format(msgspec.json.encode(position(offset=1))) + b"\n")
    inode = path.stat().st_ino
    for offset in range(2, 400):
        with OffsetFile(path) as offsets:
            offsets.save(position(offset=offset))
            offsets.save(position(offset=offset + 1, planned=[10_000]))
        assert read(path) == position(offset=offset + 1, planned=[10_000])
    assert path.stat().st_ino == inode
    assert path.stat().st_size < 1 << 17
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("mounted")
def test_torn_line_leaves_the_one_before(path, monkeypatch):
    with OffsetFile(path) as offsets:
        for offset in range(1, 4):
            offsets.save(position(offset=offset))
    whole = path.read_bytes()
    two = whole.rindex(b"\n#")
    for end in range(two, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert read(path).offset == 2
        if end % 16 == 0:
            with OffsetFile(path) as offsets:
                offsets.save(position(offset=4))
            assert read(path).offset == 4
    # From the beginning again: at every moment one of the two is whole.
    monkeypatch.setattr("fastdist.client.offsets.MAX_IN_PLACE", 100)
    path.write_bytes(b"")
    with OffsetFile(path) as offsets:
        offsets.save(position(offset=1))
        offsets.save(position(offset=2))
        before = path.read_bytes()
        offsets.save(position(offset=3))
    line = path.read_bytes()
    assert len(line) < len(before)
    for end in range(len(line) + 1):
        path.write_bytes(line[:end] + before[end:])
        assert read(path).offset in (2, 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_mounted_single_file_keeps_offsets(tmp_path):
    (tmp_path / "state").touch()
    (tmp_path / "offset").touch()
    code = (
        "from pathlib import Path; from fastdist.client.offsets import OffsetFile, Position\n"
        f"with OffsetFile(Path({str(tmp_path / 'offset')!r})) as o: o.save(Position('x', 1, 2, 'y', offset=7))"
    )
    mount = f'mount --bind {tmp_path}/state {tmp_path}/offset && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", code], check=False, capture_output=True
    )
    if b"unshare" in done.stderr or b"mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "state").offset == 7
