"""Rings whose workers cannot start: what cannot be read is set aside, and the worker gets a new ring, as at a start."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.storage.directory import ring_path
from fastdist.storage.files import has_name

if TYPE_CHECKING:
    from fastdist._core import Counters
    from fastdist.storage.directory import QueueFolder
    from fastdist.supervisor.processes import WorkerSlot

log = logs.get()


async def renew(slot: WorkerSlot, folder: QueueFolder, row: Counters) -> None:
    """Replace what cannot be read of the rings of a slot without a process; ``row``: its counters."""
    try:
        await asyncio.to_thread(_renew, slot, folder, row)
    except Exception as error:  # noqa: BLE001  (whatever it is, the worker is to be started again)
        slot.irreplaceable = True
        log.error("the worker's queue file cannot be replaced", worker=slot.name, error=str(error))


def _renew(slot: WorkerSlot, folder: QueueFolder, row: Counters) -> None:
    for old in tuple(slot.old_rings):
        if has_name(old.fd, old.path) and (found := folder.renew_old(old)) != old:
            slot.old_rings.remove(old)
            slot.old_rings += [found] if found is not None else []
            slot.renewed = True
    if not has_name(slot.ring, ring_path(folder.path, slot.index)):
        return  # it is in memory, or was deleted: see worker.queue
    pushed = sum(row.get(name) for name in ("sequence_base", "migrated", "accepted", "withdrawn"))
    try:
        old_rings = folder.renew(slot.index, pushed or 1)
    finally:
        slot.ring = folder.ring(slot.index)
    if old_rings is not None:
        slot.old_rings += old_rings
        slot.renewed = True
