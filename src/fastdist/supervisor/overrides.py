"""What administrators set for analyzers, over what the configuration says.

It is kept over restarts in ``overrides.json`` in the queue's folder, rewritten as a whole.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from fastdist import logs
from fastdist.errors import UNDECODABLE
from fastdist.storage.files import has_name, identity, make_folder, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fastdist.ipc import Action
    from fastdist.settings import Analyzer

FILE = "overrides.json"

log = logs.get()


class Override(msgspec.Struct, omit_defaults=True):
    """What is set for an analyzer."""

    weight: Annotated[float, Meta(ge=0)] | None = None
    draining: bool = False

    def weight_of(self, analyzer: Analyzer) -> float:
        """Return the weight in force of the analyzer that it is for."""
        return analyzer.weight if self.weight is None else self.weight


class Overrides:
    """The overrides in force, and their file. ``locked``: no other service uses the folder (``memory`` locks none).

    Without a folder they are kept elsewhere.
    """

    def __init__(self, folder: Path | None, *, locked: bool = False) -> None:
        self.folder, self.locked = folder, locked
        self.by_id: dict[str, Override] = {}
        self.fault = ""  # why those of earlier runs are not in force
        self._file = -1  # what was read or written last, open, so that another file is recognised
        self._home = (0, 0)  # the folder at the start of the service

    def load(self, analyzers: Iterable[Analyzer]) -> None:
        """Read those of earlier runs; they are ignored if they leave no analyzer to deliver to."""
        if self.folder is None:
            return
        try:
            self._home = identity(self.folder)
            self._file = os.open(self.folder / FILE, os.O_RDONLY | os.O_CLOEXEC)
            with os.fdopen(os.dup(self._file), "rb") as file:
                self.by_id = msgspec.json.decode(file.read(), type=dict[str, Override])
        except FileNotFoundError:
            pass
        except (OSError, *UNDECODABLE) as error:
            self.fault = f"cannot be read: {error}"
            log.error("the overrides of the analyzers cannot be read; the configuration holds", error=str(error))
        if not leaves_any(analyzers, self.by_id):
            self.fault = "leave no analyzer to deliver to"
            log.error("the overrides of earlier runs leave no analyzer to deliver to, and are ignored", file=FILE)
            self.by_id = {}

    def get(self, analyzer_id: str) -> Override:
        """Return what is set for an analyzer."""
        return self.by_id.get(analyzer_id, Override())

    def after(self, action: Action, by_id: Mapping[str, Override] | None = None) -> dict[str, Override]:
        """Return what the overrides are after an action on those in force, or on others."""
        by_id = self.by_id if by_id is None else by_id
        wanted = {name: override for name, override in by_id.items() if name != action.analyzer}
        if action.name == "override":
            before = by_id.get(action.analyzer, Override())
            override = Override(
                before.weight if action.weight is None else action.weight,
                before.draining if action.draining is None else action.draining,
            )
            if override != Override():
                wanted[action.analyzer] = override
        return wanted

    def save(self, by_id: dict[str, Override]) -> None:
        """Put them in force: write a new file, then rename it over the old one. Raises OSError."""
        assert self.folder is not None  # noqa: S101  (for type checkers)
        if not self.locked:  # else the folder exists; if not, it was moved and may come back
            make_folder(self.folder)
        path = self.folder / FILE
        beside = path.with_suffix(".new")
        text = json.dumps(msgspec.to_builtins(by_id), indent=2) + "\n"
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)
            if self._file >= 0:
                os.close(self._file)
            self._file = os.dup(file.fileno())
        sync_folder(self.folder)
        self.by_id, self.fault = by_id, ""

    def check_file(self) -> None:
        """Write the file again if it was deleted or replaced: a restart must find it. Raises OSError.

        Nothing is written while the folder is missing. One that is not locked, or not the one of the start, may be
        another service's, whose file stays.
        """
        if self.folder is None:
            return
        path = self.folder / FILE
        if self._file < 0 or not self.folder.is_dir() or has_name(self._file, path):
            return
        ours_alone = self.locked and identity(self.folder) == self._home
        if ours_alone or not path.exists():
            self.save(self.by_id)
            log.warning("the file of the overrides was deleted or replaced, and is written again", file=str(path))


def leaves_any(analyzers: Iterable[Analyzer], overrides: Mapping[str, Override]) -> bool:
    """Whether an analyzer remains that is not draining, and the weights are what a configuration may have."""
    all_of_them = [(analyzer, overrides.get(analyzer.id, Override())) for analyzer in analyzers]
    weights = [over.weight_of(analyzer) for analyzer, over in all_of_them]
    return 0 < sum(weights) < math.inf and not all(over.draining for _, over in all_of_them)
