"""Reconciling: a worker finds its ring as its predecessor, or the last run, left it, and makes its counters agree.

The ring is the truth. What is between its head and tail and not done is queued; of what was pushed in this run the rest
was delivered or is a dead letter. A predecessor that was killed may have changed the ring without counting it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.shm.snapshot import DEAD_LETTERS
from fastdist.worker.migrate import end_migrating

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastdist._core import Counters, PacketRing
    from fastdist.worker.migrate import Migration

log = logs.get()


def reconcile(ring: PacketRing, migrations: Sequence[Migration], counters: Counters, *, renewed: bool = False) -> None:
    """Make ``counters`` agree with the worker's ring and the old rings it migrates.

    ``renewed``: the ring is in the place of one that could not be read, or not all of it.
    """
    for each, name in ((ring, "the worker's own"), *((migration.ring, migration.old.path) for migration in migrations)):
        for offset, what in each.damage:
            log.warning("damage in the queue; skipped", ring=name, offset=offset, what=what)
    undone = ring.undone + sum(migration.undone for migration in migrations)
    if counters.get("sequence_base") == 0:
        counters.set("sequence_base", ring.next_sequence_number)
        counters.add("recovered", undone)
        counters.add("corrupt", ring.corrupt + sum(migration.ring.corrupt for migration in migrations))
        return
    _count_pushed(ring, counters)
    corrupt = ring.corrupt + sum(migration.ring.corrupt for migration in migrations)
    _count_delivered(undone, counters, corrupt + renewed)


def _count_pushed(ring: PacketRing, counters: Counters) -> None:
    end_migrating(ring, counters)
    pushed = ring.next_sequence_number - counters.get("sequence_base") - counters.get("migrated")
    missing = pushed - counters.get("accepted") - counters.get("withdrawn")
    if missing > 0:
        messages, body_bytes = ring.totals_of_latest(missing)
        counters.add("accepted", missing)
        counters.add("messages_accepted", messages)
        counters.add("bytes_accepted", body_bytes)


def reset_gauges(counters: Counters) -> None:
    """Forget what a predecessor had in flight."""
    for slot in range(counters.slots):
        for gauge in ("connections", "requests_in_flight", "packets_in_flight"):
            counters.set_of(slot, gauge, 0)


def _count_delivered(undone: int, counters: Counters, corrupt: int) -> None:
    slots = range(counters.slots)
    reset_gauges(counters)
    gone = counters.get("accepted") + counters.get("recovered") - undone
    gone -= sum(counters.get(reason) for reason in DEAD_LETTERS)
    gone -= counters.get("lost")
    uncounted = gone - sum(counters.get_of(slot, "delivered") for slot in slots)
    counters.add("corrupt", max(corrupt, uncounted) if corrupt else 0)
    if uncounted < 0:  # counted, not yet marked done in the file or in the old ring they were copied from: once more
        counters.add("recovered", -uncounted)
    elif corrupt:  # what is neither here nor known to be delivered was damaged
        counters.add("lost", uncounted)
    else:  # all of one request, the one that was being settled
        counters.add_to(max(0, counters.get("settling") - 1), "delivered", uncounted)
