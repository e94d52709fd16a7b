"""Changes while the service runs, on the supervisor's side: reloads, and overrides of an analyzer's weight and state.

Overrides are kept over restarts in ``overrides.json`` in the queue's folder, rewritten as a whole. An analyzer keeps
its slot of the shared block, also when it is removed and added again, until a new one needs it, whose figures begin
at 0.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING

import msgspec

from fastdist import logs
from fastdist.config import reloadable
from fastdist.errors import ConfigError, StartError
from fastdist.net import tls
from fastdist.shm.block import AnalyzerWord
from fastdist.storage.files import has_name, identity, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fastdist.ipc import Action, Pair
    from fastdist.settings import Analyzer, Config
    from fastdist.shm.block import SharedBlock

FILE = "overrides.json"

log = logs.get()


class Override(msgspec.Struct, omit_defaults=True):
    """What an administrator set for an analyzer, over what the configuration says."""

    weight: float | None = None
    draining: bool = False


class Changes:
    """The configuration in force, certificate and key, the slots of the analyzers, and what is overridden."""

    def __init__(self, config: Config, block: SharedBlock, folder: Path, pair: Pair | None = None) -> None:
        self.config, self.block, self._folder, self.pair = config, block, folder, pair
        self._wanted_connections = config.server.max_connections  # more than the system may allow
        self.generation = 0  # of the settings; grows with every reload
        self.slots: dict[str, int] = {}  # of those configured, and of those removed whose slot was not reused
        self.analyzers: dict[int, Analyzer] = {}
        self.overrides: dict[str, Override] = {}
        self._file = -1  # what was read or written last, open, so that another file is recognised
        self._home = (0, 0)  # the folder at the start of the service

    def begin(self) -> None:
        """Put the analyzers into the shared block, with the overrides of earlier runs."""
        self._home = identity(self._folder)
        try:
            self._file = os.open(self._folder / FILE, os.O_RDONLY | os.O_CLOEXEC)
            with os.fdopen(os.dup(self._file), "rb") as file:
                self.overrides = msgspec.json.decode(file.read(), type=dict[str, Override])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            log.error("the overrides of the analyzers cannot be read; the configuration holds", error=str(error))
        if not _leaves_any(self.config.analyzers, self.overrides):
            log.error("the overrides of earlier runs leave no analyzer to deliver to, and are ignored", file=FILE)
            self.overrides = {}
        self._set_analyzers(self.config)

    def lower_connections(self, limit: int) -> None:
        """Limit emitters' connections, whatever is configured."""
        self.config = msgspec.structs.replace(
            self.config, server=msgspec.structs.replace(self.config.server, max_connections=limit)
        )

    def slots_in_use(self) -> dict[str, int]:
        """Return {analyzer id: slot} of those configured."""
        return {analyzer.id: slot for slot, analyzer in self.analyzers.items()}

    # ---- reload

    def reload(self, new: Config, pair: Pair | None = None) -> list[str]:
        """Apply what can change while running; return the paths that differ and need a restart.

        Raises ConfigError when there are more analyzers than slots, StartError when the certificate has
        expired or is not valid yet; one that is in force anyway stays, so that all else can still be changed.
        """
        need_restart = [path for path in reloadable(self.config, new) if path != "server.max_connections"]
        if new.server.max_connections != self._wanted_connections:
            need_restart.append("server.max_connections")
        security = new.security
        if bool(security.tls_cert) != bool(self.config.security.tls_cert):
            # Certificates can be replaced, but TLS cannot be turned on or off: a worker that is restarted meanwhile
            # would speak it and the others not.
            need_restart += ["security.tls_cert", "security.tls_key"]
            security = msgspec.structs.replace(
                security, tls_cert=self.config.security.tls_cert, tls_key=self.config.security.tls_key
            )
            pair = self.pair
        if fault := tls.out_of_date(pair, security):
            if pair != self.pair:
                raise StartError(fault)
            log.warning(fault)
        if not _leaves_any(new.analyzers, self.overrides):
            raise ConfigError(["analyzers: with the overrides in force nothing would be left to deliver to"])
        config = msgspec.structs.replace(self.config, analyzers=new.analyzers, limits=new.limits, security=security)
        self.put_in_force(config, pair)
        return need_restart

    def put_in_force(self, config: Config, pair: Pair | None) -> None:
        """Set the settings that workers will read. Raises ConfigError as above."""
        self._set_analyzers(config)
        self.config, self.pair = config, pair
        self.generation += 1

    def _set_analyzers(self, config: Config) -> None:
        slots = dict(self.slots)
        for analyzer in config.analyzers:
            if analyzer.id not in slots:
                slots[analyzer.id] = self._free_slot(slots, config)
        analyzers = {slots[analyzer.id]: analyzer for analyzer in config.analyzers}
        states = self.block.analyzers
        for slot in self.analyzers.keys() - analyzers.keys():
            states.set(slot, AnalyzerWord.IN_USE, 0)
        for slot, analyzer in analyzers.items():
            before = self.analyzers.get(slot)
            if before is None or before.endpoint != analyzer.endpoint:
                states.clear(slot)
            if self.slots.get(analyzer.id) != slot and slot in self.slots.values():
                self.block.reset_slot(slot)
        self.slots, self.analyzers = slots, analyzers
        for slot, analyzer in analyzers.items():
            self._put_in_force(slot, analyzer)
            states.set(slot, AnalyzerWord.IN_USE, 1)
        states.touch()

    def _free_slot(self, slots: dict[str, int], config: Config) -> int:
        taken = set(slots.values())
        free = next((slot for slot in range(self.block.slots) if slot not in taken), None)
        if free is not None:
            return free
        configured = {analyzer.id for analyzer in config.analyzers}
        removed = [name for name in slots if name not in configured]
        if not removed:
            raise ConfigError([f"analyzers: more than the {self.block.slots} there is room for; this needs a restart"])
        return slots.pop(min(removed, key=lambda name: self._is_in_use(slots[name])))  # the oldest, if all are idle

    def _is_in_use(self, slot: int) -> bool:
        """Whether workers may still count something there: it was removed just now, or awaits replies."""
        return slot in self.analyzers or any(row.get_of(slot, "packets_in_flight") for row in self.block.rows)

    def _put_in_force(self, slot: int, analyzer: Analyzer) -> None:
        override = self.overrides.get(analyzer.id, Override())
        states = self.block.analyzers
        weight = analyzer.weight if override.weight is None else override.weight
        states.set_weight(slot, weight)
        states.set(slot, AnalyzerWord.WEIGHT_OVERRIDDEN, int(override.weight is not None))
        states.set(slot, AnalyzerWord.DRAINING, int(override.draining))

    # ---- overrides

    def apply(self, action: Action) -> tuple[int, object]:
        """Change an analyzer; return a status as in HTTP, and the error if it is not 200."""
        slot = self.slots_in_use().get(action.analyzer)
        if slot is None:
            return 404, f"there is no analyzer {action.analyzer!r}"
        before = self.overrides.get(action.analyzer, Override())
        after = Override()
        if action.name == "override":
            after = Override(
                before.weight if action.weight is None else action.weight,
                before.draining if action.draining is None else action.draining,
            )
        wanted = {name: override for name, override in self.overrides.items() if name != action.analyzer}
        if after != Override():
            wanted[action.analyzer] = after
        if not _leaves_any(self.config.analyzers, wanted):
            return 422, "nothing would be left to deliver to"
        try:
            self._save(wanted)
        except OSError as error:
            return 503, f"the change cannot be stored in {self._folder}: {error.strerror}"
        self.overrides = wanted
        self._put_in_force(slot, self.analyzers[slot])
        if action.draining is False:  # set online: end a pause (Retry-After) and the wait for a trial
            self.block.analyzers.set(slot, AnalyzerWord.PAUSED_UNTIL_NS, 0)
            self.block.analyzers.set(slot, AnalyzerWord.NEXT_TRIAL_NS, 0)
        self.block.analyzers.touch()
        log.info("an analyzer was changed", analyzer=action.analyzer, weight=after.weight, draining=after.draining)
        return 200, None

    def _save(self, overrides: dict[str, Override]) -> None:
        """Write a new file, then rename it over the old one."""
        if self.config.queue.durability == "memory":  # else it exists; if not, it was moved and may come back
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / FILE
        beside = path.with_suffix(".new")
        text = json.dumps(msgspec.to_builtins(overrides), indent=2) + "\n"
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)
            if self._file >= 0:
                os.close(self._file)
            self._file = os.dup(file.fileno())
        sync_folder(self._folder)

    def check_file(self) -> None:
        """Write the overrides again if their file was deleted or replaced: a restart must find it. Raises OSError.

        Nothing is written while the folder is missing. One that is not locked (durability memory), or not the one of
        the start, may be another service's, whose file stays.
        """
        path = self._folder / FILE
        if self._file < 0 or not self._folder.is_dir() or has_name(self._file, path):
            return
        ours_alone = self.config.queue.durability != "memory" and identity(self._folder) == self._home
        if ours_alone or not path.exists():
            self._save(self.overrides)
            log.warning("the file of the overrides was deleted or replaced, and is written again", file=str(path))


def _leaves_any(analyzers: Iterable[Analyzer], overrides: Mapping[str, Override]) -> bool:
    """Whether an analyzer remains that is not draining, and the weights are what a configuration may have."""
    all_of_them = [(analyzer, overrides.get(analyzer.id, Override())) for analyzer in analyzers]
    weights = [analyzer.weight if over.weight is None else over.weight for analyzer, over in all_of_them]
    return 0 < sum(weights) < math.inf and not all(over.draining for _, over in all_of_them)
