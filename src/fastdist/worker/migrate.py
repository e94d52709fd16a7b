"""Migrating: a worker moves the packets of old rings into its own, as there is room, and deletes rings that are empty.

A packet is done in the old ring when its copy is synced: at every moment one of the two is safe. Room for what old
rings hold is kept free of new packets (``Queue.reserve``), so it is moved however many of these come.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastdist._core import DamagedError, PacketRing
from fastdist.storage.files import has_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist._core import Counters
    from fastdist.storage.directory import OldRing

RETRY_SECONDS = 1.0  # until deleting an old ring is retried


class Migration:
    """The move of one old ring's packets; ``on_damage``: see ``PacketRing``."""

    def __init__(self, old: OldRing, on_damage: Callable[[int, str, int, int], object] | None = None) -> None:
        self.old = old
        self.ring = PacketRing(old.fd, on_damage=on_damage)
        self.next_deletion = 0.0  # time.monotonic()
        self._copied: list[int] = []  # handles in the old ring whose copies are not synced yet
        self._copied_bytes = 0  # of their records
        self._position = 0  # the sync that covers the copies

    @property
    def undone(self) -> int:
        """Packets that are still to be moved (a copy that is not synced counts in the new ring)."""
        return self.ring.undone - len(self._copied)

    @property
    def undone_bytes(self) -> int:
        """Bytes of their records."""
        return self.ring.undone_bytes - self._copied_bytes

    def step(self, target: PacketRing, counters: Counters, limit: int) -> tuple[int, list[int]]:
        """Copy up to ``limit`` packets; return how many were copied, and handles of packets too large for ``target``.

        What is copied and not yet synced is copied again after a kill: ``limit`` is how many may be sent twice then.
        Raises OSError if ``target`` cannot be written to; what was copied before that counts.
        """
        if not self.settle(target):
            return 0, []
        # Until ``end_migrating`` nothing but copies is pushed.
        counters.set("migrating", target.next_sequence_number - counters.get("migrated"))
        before = target.undone_bytes
        try:
            oversized = self._copy(target, limit)
        finally:
            self._position = target.tail_position
            self._copied_bytes = target.undone_bytes - before
            end_migrating(target, counters)
        return len(self._copied), oversized

    def _copy(self, target: PacketRing, limit: int) -> list[int]:
        oversized = []
        while len(self._copied) < limit and (handle := self.ring.claim()):
            try:
                if not target.push_copy(self.ring, handle):
                    self.ring.release(handle)
                    break
            except ValueError:
                oversized.append(handle)
            except DamagedError:
                self.ring.discard(handle)
            except OSError:
                self.ring.release(handle)
                raise
            else:
                self._copied.append(handle)
        return oversized

    def settle(self, target: PacketRing) -> bool:
        """Mark what was copied as done if the copies are synced; return whether they are."""
        if target.synced_position < self._position:
            return False
        for handle in self._copied:
            self.ring.done(handle)
        self._copied.clear()
        self._copied_bytes = 0
        return True

    @property
    def finished(self) -> bool:
        """Whether the old ring holds nothing any more."""
        return self.ring.undone == 0

    def delete(self) -> None:
        """Delete the old ring's file, unless its name is another file's by now. Raises OSError.

        Its space is free at once, whichever processes still have it open.
        """
        self.next_deletion = time.monotonic() + RETRY_SECONDS
        if has_name(self.old.fd, self.old.path):
            Path(self.old.path).unlink(missing_ok=True)
        if os.fstat(self.old.fd).st_nlink == 0:  # not before: what is cut short and has a name is damaged
            os.truncate(self.old.fd, 0)


def end_migrating(ring: PacketRing, counters: Counters) -> None:
    """Count what was copied since a step began, even if by a process that was killed meanwhile."""
    if begun := counters.get("migrating"):
        counters.set("migrated", ring.next_sequence_number - begun)
        counters.set("migrating", 0)
