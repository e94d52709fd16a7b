"""Settings for workers are read whole or not at all, and no message is too long for its receiver."""

from __future__ import annotations

import asyncio
import os
import socket
import threading

import pytest

from fastdist.errors import StartError
from fastdist.ipc import (
    MAX_PROBLEM,
    MAX_PROBLEMS,
    Message,
    Settings,
    connect,
    read_settings,
    receive,
    send,
    shorten,
    write_settings,
)
from fastdist.settings import Analyzer, Config


def settings(generation: int, count: int) -> Settings:
    analyzers = tuple(Analyzer(id=f"A{n}", endpoint=f"http://127.0.0.1:{4000 + n}/", weight=1) for n in range(count))
    slots = {analyzer.id: slot for slot, analyzer in enumerate(analyzers)}
    return Settings(generation, slots, Config(analyzers=analyzers))


@pytest.fixture
def memfd():
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def test_last_write_is_read_even_if_shorter(memfd):
    for generation, count in enumerate((1, 50, 2)):
        write_settings(memfd, settings(generation, count))
        assert read_settings(memfd) == settings(generation, count)


def test_partial_settings_are_waited_for(memfd):
    write_settings(memfd, settings(1, 20))
    whole = os.pread(memfd, os.fstat(memfd).st_size, 0)
    write_settings(memfd, settings(2, 30))
    os.pwrite(memfd, whole[: len(whole) // 2], 0)  # the rest is still of the longer ones
    with pytest.raises(StartError, match="incomplete"):
        read_settings(memfd, 0.0)
    rest = threading.Timer(0.05, os.pwrite, (memfd, whole, 0))
    rest.start()
    assert read_settings(memfd, 30.0) == settings(1, 20)
    rest.join()


def test_an_empty_file_holds_no_settings(memfd):
    with pytest.raises(StartError, match="incomplete"):
        read_settings(memfd, 0.0)


def test_settings_are_whole_during_writes(memfd):
    each = [settings(1, 10), settings(2, 200)]
    write_settings(memfd, each[0])
    done = threading.Event()

    def write():
        while not done.is_set():
            for it in each:
                write_settings(memfd, it)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            assert read_settings(memfd, 30.0) in each
    finally:
        done.set()
        writer.join()


def test_only_many_or_long_problems_are_cut():
    few = [f"analyzers[{number}].weight: must be >= 0" for number in range(MAX_PROBLEMS)]
    assert shorten(few) == few
    *first, last = shorten([*few, "one", "two", "three"])
    assert first == few
    assert "3 more" in last
    assert "fastdist check" in last
    assert shorten(["é" * MAX_PROBLEM, "é" * (MAX_PROBLEM + 1)]) == [
        "é" * MAX_PROBLEM,
        "é" * MAX_PROBLEM + "…",
    ]


@pytest.mark.parametrize(
    "body",
    [
        *(shorten([character * 10_000] * 10_000) for character in ["a", '"', "é", "\U0001f30d", "\x01"]),
        {"changed": [{"setting": "s" * 100, "before": "b" * 300, "after": "a" * 300}] * 10_000},
    ],
    ids=["ascii", "escaped", "latin", "astral", "control", "a reload of everything"],
)
def test_longest_messages_arrive(body):
    """Whatever the encoding makes of them."""
    message = Message("reply", id=7, status=422, body=body)

    async def converse():
        ours, theirs = socket.socketpair()
        _, writer = await connect(ours)
        reader, other = await connect(theirs)
        send(writer, message)
        send(writer, Message("drain", deadline=1.5))
        writer.close()
        received = [each async for each in receive(reader)]
        other.close()
        return received

    assert asyncio.run(converse()) == [message, Message("drain", deadline=1.5)]
