"""Logs that are rotated more than once between two looks: the chain of them, and that no line of it is passed by."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdist._core import birth_ns
from fastdist.client import logfile, rotation
from fastdist.client.logfile import Trail
from fastdist.client.offsets import OffsetFile
from fastdist.client.packing import MIN_PACKET_BYTES, Recipe, Style
from fastdist.client.rotation import Rotation

RECIPE = Recipe(Style("web-42", "app.log"), 3, MIN_PACKET_BYTES)
TICK = 0.011  # seconds in which a file system's clock goes on


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    for name in ("IDLE", "LIST_EVERY", "ROTATION_PATIENCE"):
        monkeypatch.setattr(logfile, name, 0.0)


def has_births(folder):
    with tempfile.TemporaryFile(dir=folder) as file:
        return birth_ns(file.fileno()) > 0


class World:
    """A log that is written to, rotated, compressed and truncated; and a reader that follows it."""

    def __init__(self, folder):
        self.path = folder / "app.log"
        self.offsets = folder / "app.offset"
        self.numbers = itertools.count()
        self.dates = itertools.count(20240101)
        self.written, self.cut, self.sent, self.notes = [], set(), [], []
        self.path.touch()
        self.begin()

    # ---- what happens to the log

    def write(self, count=2):
        with self.path.open("ab") as file:
            for number in itertools.islice(self.numbers, count):
                file.write(b"line %d\n" % number)
                self.written.append(number)

    def rotate(self):
        time.sleep(TICK)
        for old in sorted(self.path.parent.glob("app.log.*"), key=lambda old: -self.place(old)):
            old.rename(old.with_name(re.sub(r"\d+", lambda found: str(int(found[0]) + 1), old.name)))
        self.path.rename(self.path.with_name("app.log.1"))
        self.path.touch()
        time.sleep(TICK)

    def rotate_by_date(self):
        time.sleep(TICK)
        self.path.rename(self.path.with_name(f"app.log-{next(self.dates)}"))
        self.path.touch()
        time.sleep(TICK)

    def compress(self):
        """Compress the logs that were rotated, but for the last one."""
        for old in [*self.path.parent.glob("app.log-*"), *self.path.parent.glob("app.log.[0-9]*")]:
            if old.suffix != ".gz" and old.name != "app.log.1":
                packed = old.with_name(f"{old.name}.gz")
                packed.write_bytes(gzip.compress(old.read_bytes()))
                shutil.copystat(old, packed)
                old.unlink()
        time.sleep(TICK)

    def truncate(self):
        self.cut |= lines_in(self.path.read_bytes()) - set(self.sent)
        os.truncate(self.path, 0)

    @staticmethod
    def place(old):
        return int(re.search(r"\d+", old.name)[0])

    # ---- who follows it

    def begin(self):
        self.trail = Trail(self.path, RECIPE, self.notes.append)
        with OffsetFile(self.offsets) as offsets:
            self.log = self.trail.begin(offsets)
        self.last = None
        self.packets = self.log.packets(lambda: False, follow=True)
        self.look()

    def look(self):
        for packet in self.packets:
            if packet is None:
                return
            self.last = packet
            self.sent += lines_in(packet.body, ordered=True)
        self.log, before = self.trail.following(self.log, lambda: False), self.log
        before.close()
        self.last = None
        self.packets = self.log.packets(lambda: False, follow=True)

    def restart(self):
        with OffsetFile(self.offsets) as offsets:
            offsets.save(self.log.reached(self.last, []))
        self.close()
        self.begin()

    def close(self):
        self.packets.close()
        self.log.close()

    def settle(self):
        for _ in range(40):
            self.look()

    def check(self):
        self.settle()
        told = " ".join(self.notes)
        packed = set()
        for file in self.path.parent.glob("*.gz"):
            lines = lines_in(gzip.decompress(file.read_bytes()))
            if lines - set(self.sent):
                assert " is compressed and is NOT sent" in told, file
            packed |= lines
        assert len(self.sent) == len(set(self.sent)), "nothing is sent twice"
        missing = set(self.written) - set(self.sent)
        assert missing <= self.cut | packed, "what is there is sent"
        self.close()


def lines_in(data, *, ordered=False):
    found = [int(number) for number in re.findall(rb"line (\d+)", data)]
    return found if ordered else set(found)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


STEPS = ["write", "write", "rotate", "rotate_by_date", "compress", "truncate", "look", "restart"]


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=14))
def test_change_between_looks_loses_no_line(steps):
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if not has_births(folder):
            pytest.skip("the file system keeps no time of birth")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("IDLE", "LIST_EVERY", "ROTATION_PATIENCE"):
            patch.setattr(logfile, name, 0.0)
        world = World(Path(folder))
        for step in steps:
            getattr(world, step)()
        world.check()


@pytest.mark.parametrize("how", ["rotate", "rotate_by_date"])
@pytest.mark.parametrize("then", ["look", "restart"])
def test_two_rotations_between_looks_seen(world, how, then):
    world.write()
    world.look()
    for _ in range(3):
        world.write(20)
        getattr(world, how)()
    world.write()
    getattr(world, then)()
    world.settle()
    assert world.sent == world.written, "in order, too"


def test_chain_without_birth_uses_changes(tmp_path, monkeypatch):
    for module in (logfile, rotation):
        monkeypatch.setattr(module, "birth_ns", lambda _: 0)
    world = World(tmp_path)
    world.write()
    world.look()
    for _ in range(3):
        world.write(20)
        world.rotate()
    world.write()
    world.settle()
    assert world.sent == world.written


@pytest.mark.parametrize("then", ["settle", "restart"])
def test_skipped_compressed_log_logs_once(world, then):
    world.write()
    world.settle()
    for _ in range(3):
        world.write(20)
        world.rotate()
    world.compress()
    getattr(world, then)()
    world.settle()
    named = [note.split()[0] for note in world.notes if "is compressed and is NOT sent" in note]
    # What is open is read, whatever becomes of its name.
    assert sorted(named) == (["app.log.2.gz"] if then == "settle" else ["app.log.2.gz", "app.log.3.gz"])
    assert set(range(42, 62)) <= set(world.sent), "the one behind it is sent"


def test_copied_logs_are_no_successors(world):
    """After a change from copying and truncating to renaming there are older copies beside the log."""
    world.write(6)
    for number in (3, 2):
        shutil.copy(world.path, world.path.with_name(f"app.log.{number}"))
    world.settle()
    time.sleep(TICK)
    world.rotate()
    restored = world.path.with_name("app.log.9")
    restored.write_bytes(b"line 9999\n")
    os.utime(restored, (1000, 1000))
    world.write()
    world.settle()
    assert world.sent == world.written


@pytest.mark.parametrize(
    ("name", "is_rotated"),
    [
        ("app.log.1", True),
        ("app.log.0", True),
        ("app.log-20240131", True),
        ("app.log-20240131-1706659200", True),
        ("app.log.2024-01-31T12:00:00Z", True),
        ("app.log.20240131-120000", True),
        ("app-20240131.log", True),
        ("app-2024-01-31T12-00-00.000.log", True),
        ("app.1.log", True),
        ("app.log.old", True),
        ("app.log.2.gz", True),
        ("app-20240131.log.zst", True),
        ("app.log", False),
        ("app.log.offset", False),
        ("app.log.tmp", False),
        ("app-error.log", False),
        ("app.log-error", False),
        ("app2.log", False),
        ("myapp.log.1", False),
        ("app.logs.1", False),
    ],
)
def test_a_rotated_log_is_known_by_its_name(tmp_path, name, is_rotated):
    (tmp_path / name).write_bytes(b"x")
    assert [file.path.name for file in Rotation(tmp_path / "app.log").rotated()] == [name] * is_rotated


def test_link_targets_rotated_logs_are_found(tmp_path):
    """As a container's log is: its name is a link to 0.log, beside which lie those that were rotated."""
    pod = tmp_path / "pod"
    pod.mkdir()
    (pod / "0.log").touch()
    (pod / "0.log.20240131-120000").touch()
    link = tmp_path / "web.log"
    link.symlink_to(pod / "0.log")
    assert [file.path.name for file in Rotation(link).rotated()] == ["0.log.20240131-120000"]
    assert Rotation(link).current().inode == (pod / "0.log").stat().st_ino


def test_unlistable_folder_has_no_rotated(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError

    monkeypatch.setattr(os, "scandir", refuse)
    assert Rotation(tmp_path / "app.log").rotated() == []


def test_rename_during_a_look_is_not_missed(tmp_path, monkeypatch):
    (tmp_path / "app.log.1").touch()
    looks = iter([[]])  # the first one comes just between two names
    look = Rotation._look
    monkeypatch.setattr(Rotation, "_look", lambda self: next(looks, None) or look(self))
    assert len(Rotation(tmp_path / "app.log").rotated()) == 1


def test_a_file_made_again_has_another_birth(tmp_path):
    if not has_births(tmp_path):
        pytest.skip("the file system keeps no time of birth")
    births = set()
    for _ in range(3):
        with (tmp_path / "x").open("wb") as file:
            births.add(birth_ns(file.fileno()))
        (tmp_path / "x").unlink()
        time.sleep(TICK)
    assert len(births) == 3
    assert birth_ns(-1) == 0, "what cannot be known"
