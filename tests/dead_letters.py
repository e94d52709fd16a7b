"""Files of dead letters for tests, and what is done with them."""

from __future__ import annotations

import time

from fastdist._core import Packet
from fastdist.client.connection import Target
from fastdist.client.replay import Replay
from fastdist.storage.dead_letter_files import DeadLetterFiles
from fastdist.storage.dead_letter_format import Selection, as_line, find_files, read_file

SECOND = 1_000_000_000
WHOLE = (
    b'{"id":"x","reason":"r","acceptedAt":"2026-01-02T03:04:05Z","deadLetteredAt":"2026-01-02T03:04:05Z","body":"b"}'
)


def packet(name="p-1", body=b'{"n":1}'):
    return Packet(1, name, body, 3, time.time_ns(), 2, 0, 0)


class Listener:
    """Remembers the events of a replay."""

    def __init__(self):
        self.total, self.count, self.refusals, self.waits, self.notes = None, 0, {}, [], []

    def begin(self, total):
        self.total = total

    def replayed(self):
        self.count += 1

    def refused(self, dead_letter, response):
        self.refusals[dead_letter.id] = response.text

    def waiting(self, why, _):
        self.waits.append(why)

    def note(self, text):
        self.notes.append(text)


def replayed(  # noqa: PLR0913  (tests name what they change)
    distributor, events, path, *, connections=2, limit=None, reason=None, target=None
):
    """Replay a folder to the distributor; return the summary."""
    target = target or Target.parse(distributor.url, None)
    return Replay(find_files(path), Selection(reason=reason), target, events).run(connections, limit)


def fill(folder, names, reason="refused", owner="w0-1", body=b'{"n":1}'):
    """Write a file of dead letters; return its path."""
    before = set(folder.glob("dead-letters/*.ndjson"))
    dead_letters = DeadLetterFiles(folder, owner)
    for name in names:
        dead_letters.write(as_line(packet(name, body), reason, "A1", 422, "no"))
    dead_letters.close()
    (new,) = set(folder.glob("dead-letters/*.ndjson")) - before
    return new


def ids(path):
    """Return the ids in a file or folder, None for what is unreadable."""
    return [line.dead_letter and line.dead_letter.id for found in find_files(path) for line in read_file(found)]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def broken(*_):
    raise OSError(5, "Input/output error")


def idle(dead_letters):
    """Have a writer close its file."""
    dead_letters.settle()
    dead_letters.tick(SECOND)
    dead_letters.tick(3 * SECOND)
