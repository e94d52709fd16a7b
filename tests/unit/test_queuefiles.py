"""The queue's folder and its rings: what is there before a worker starts."""

from __future__ import annotations

import os

import pytest

from fastdist import queuefiles
from fastdist._core.ring import PacketRing, file_size
from fastdist.errors import StartError
from fastdist.queuefiles import QueueFolder
from fastdist.queueview import look

CAPACITY = 3 << 20


@pytest.mark.parametrize("most", [1 << 30, 1 << 21, 1 << 16])
def test_rings_in_memory_are_cleared_before_they_are_used_but_not_without_end(tmp_path, monkeypatch, most):
    written, real = {}, os.pwrite

    def pwrite(fd, data, at):
        assert at == written.get(fd, 0), "in order, without gaps"
        assert not any(data)
        written[fd] = at + len(data)
        return real(fd, data, at)

    monkeypatch.setattr(queuefiles.os, "pwrite", pwrite)
    monkeypatch.setattr(queuefiles, "CLEARED", most)
    rings = QueueFolder(tmp_path).memory_rings(2, CAPACITY)
    assert written == dict.fromkeys(rings, min(file_size(CAPACITY), most // 2))
    for fd in rings:
        assert os.fstat(fd).st_size == file_size(CAPACITY)
        ring = PacketRing(fd, volatile=True)
        assert ring.capacity == CAPACITY
        assert ring.push(b"x")
        os.close(fd)


def test_what_cannot_be_made_ends_the_start_with_the_reason(tmp_path):
    folder = QueueFolder(tmp_path)
    (tmp_path / "ring-0.new").mkdir()  # as where the disk has no room for one more name, or is read-only
    with pytest.raises(StartError, match=r"cannot make the queue in .*ring-0\.new: Is a directory"):
        folder.rings(1, CAPACITY)


@pytest.mark.parametrize("name", ["ring-0.fdq", "adopt-00.fdq"])
def test_a_pipe_in_place_of_a_queue_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(StartError, match=f"{name}: not a regular file"):
        QueueFolder(tmp_path).rings(1, CAPACITY)
    (report,) = look(tmp_path).files
    assert (report.error, report.sound) == ("not a regular file", False)
