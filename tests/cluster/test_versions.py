"""A replica of the next version beside one of this, as an upgrade has them."""

from __future__ import annotations

import json

import pytest
from replicas import Replicas, compare, emitter
from support import wait_until

# What a later version changes, loaded into each of a replica's processes.
NAMED = """
import fastdist

fastdist.__version__ = "next"
"""
MEMBER = """
import msgspec
from fastdist.storage.jetstream import message

class StoredPacket(message.StoredPacket, frozen=True, array_like=True, gc=False):
    color: str = "green"

message.StoredPacket = StoredPacket
message._decoder = msgspec.msgpack.Decoder(list[StoredPacket])
"""
FORMAT = """
from fastdist._core import checksum
from fastdist.storage.jetstream import message

message.FORMAT = 2
message._START = message.MAGIC + bytes([2])
message._START_SUM = checksum(message._START)
"""


@pytest.fixture
def replicas(tmp_path, mocks, three, name):
    made = Replicas(tmp_path, mocks, three.settings(name, ack_wait=6.0))
    yield made
    made.kill_all()


def start_next(replicas, tmp_path, change):
    """Start a replica with a change in it."""
    folder = tmp_path / "next"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NAMED + change)
    replica = replicas.start(environment={"PYTHONPATH": str(folder)})
    assert json.loads(replica.line_with("fastdist is ready"))["version"] == "next"
    return replica


def test_a_new_member_is_ignored(replicas, tmp_path, mocks):
    """Each delivers what the other has stored."""
    this, after = replicas.start(), start_next(replicas, tmp_path, MEMBER)
    senders = [emitter(each, prefix=f"e{n}").send(600) for n, each in enumerate((this, after))]
    replicas.wait_at_rest()
    assert len(compare(senders, mocks.delivered())) == 1200
    packets = [each.stats()["packets"] for each in (this, after)]
    assert min(each["delivered"] for each in packets) > 0
    assert sum(each["delivered"] for each in packets) == 1200
    assert [each["corrupt"] for each in packets] == [0, 0]


def test_a_new_format_is_given_back(replicas, tmp_path, mocks):
    """Until a replica has it that can read it; nothing is lost, or a dead letter, for that."""
    this = replicas.start()
    after = start_next(replicas, tmp_path, FORMAT)
    senders = [emitter(each, prefix=f"e{n}").send(60) for n, each in enumerate((this, after))]
    wait_until(lambda: "format 2" in this.output, "it is given back")
    line = json.loads(next(line for line in this.lines if "format 2" in line))
    assert line["message"] == "a message of the stream cannot be read; given back"
    assert this.stop() == 0  # as an upgrade goes on
    replicas.wait_at_rest(120)
    assert len(compare(senders, mocks.delivered())) == 120
    assert after.stats()["packets"]["deadLettered"] == 0


def test_upgrade_under_load(replicas, tmp_path, mocks):
    """One after the other: emitters of the other see nothing of it."""
    first, second = replicas.start(), replicas.start()
    staying = emitter(second, prefix="s").start()
    sender = emitter(first, prefix="f").send(300)
    assert first.stop() == 0
    after = start_next(replicas, tmp_path, MEMBER)
    moved = emitter(after, prefix="m").start()
    staying.wait_for(300)
    staying.stop()
    assert second.stop() == 0
    moved.wait_for(300)
    moved.stop()
    replicas.wait_at_rest()
    compare([sender, staying, moved], mocks.delivered())
    for each in (sender, staying, moved):
        assert set(each.answers.values()) == {202}
