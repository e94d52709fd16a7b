"""Changes while the service runs, on the supervisor's side: a new configuration, and overrides.

An analyzer keeps its slot of the shared block, also when it is removed and added again, until a new one needs it, whose
figures begin at 0.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from fastdist import logs
from fastdist.config import reloadable
from fastdist.errors import ConfigError, Fault, StartError
from fastdist.net import tls
from fastdist.shm.block import AnalyzerWord, HeadWord
from fastdist.shm.supervisor_report import Configuration, Own
from fastdist.supervisor.overrides import FILE, Override, Overrides, leaves_any

if TYPE_CHECKING:
    from pathlib import Path

    from fastdist.ipc import Action, Pair
    from fastdist.settings import Analyzer, Config
    from fastdist.shm.block import SharedBlock

log = logs.get()


class Changes:
    """The configuration in force, certificate and key, the slots of the analyzers, and what is overridden."""

    def __init__(self, config: Config, block: SharedBlock, folder: Path, pair: Pair | None = None) -> None:
        self._is_shared = config.queue.backend == "jetstream"  # the overrides, see ``supervisor.stream``
        self.config, self.block, self.pair = config, block, pair
        self._wanted_connections = config.server.max_connections  # more than the system may allow
        self.generation = 0  # of the settings; grows with every reload
        self.slots: dict[str, int] = {}  # of those configured, and of those removed whose slot was not reused
        self.analyzers: dict[int, Analyzer] = {}
        locked = config.queue.durability != "memory" and not self._is_shared
        self.overrides = Overrides(None if self._is_shared else folder, locked=locked)
        self._unused: dict[str, Override] | None = None  # of all replicas, that are ignored here
        self.state = Configuration(success_ns=time.time_ns())

    def begin(self) -> None:
        """Put the analyzers into the shared block, with the overrides of earlier runs."""
        self.overrides.load(self.config.analyzers)
        self._set_analyzers(self.config)
        self._note_own_certificate()

    def _note_own_certificate(self) -> None:
        self.block.head[HeadWord.NOT_AFTER] = tls.not_after(self.pair.certificate) if self.pair is not None else 0

    def lower_connections(self, limit: int) -> None:
        """Limit emitters' connections, whatever is configured."""
        self.config = msgspec.structs.replace(
            self.config, server=msgspec.structs.replace(self.config.server, max_connections=limit)
        )

    def slots_in_use(self) -> dict[str, int]:
        """Return {analyzer id: slot} of those configured."""
        return {analyzer.id: slot for slot, analyzer in self.analyzers.items()}

    def problems(self) -> list[Own]:
        """Return what is wrong with the configuration."""
        state, found = self.state, []
        if state.faults:
            first, *others = state.faults
            more = f", and {len(others)} more" if others else ""
            found.append(Own("reload_failed", state.file, f"the last reload failed: {first}{more}"))
        if state.needs_restart:
            settings = ", ".join(state.needs_restart)
            found.append(Own("restart_needed", state.file, f"settings wait for a restart: {settings}"))
        if (lowered := self.config.server.max_connections) < self._wanted_connections:
            detail = f"server.max_connections is lowered to {lowered}: more than the limit on open files allows"
            found.append(Own("connections_lowered", "server.max_connections", detail))
        if self.overrides.fault:
            detail = f"the overrides of earlier runs {self.overrides.fault}; the configuration holds"
            found.append(Own("overrides_ignored", FILE, detail))
        if self._unused is not None:
            detail = "the overrides that replicas share leave no analyzer to deliver to here, and are ignored"
            found.append(Own("overrides_ignored", "shared", detail))
        if fault := tls.out_of_date(self.pair, self.config.security):
            setting, _, detail = fault.partition(": ")
            found.append(Own("certificate_out_of_date", setting, detail))
        return found

    # ---- reload

    def failed(self, faults: list[Fault]) -> None:
        """Note that a reload has failed."""
        self.state.attempt_ns, self.state.faults = time.time_ns(), faults

    def succeeded(self, needs_restart: list[str]) -> None:
        """Note that a reload has succeeded, and which settings are not in force yet."""
        self.state.attempt_ns = self.state.success_ns = time.time_ns()
        self.state.faults, self.state.needs_restart = [], needs_restart

    @property
    def masked(self) -> list[str]:
        """Analyzers whose weight is not that of the configuration, since it is overridden."""
        return [each.id for each in self.config.analyzers if self.overrides.get(each.id).weight_of(each) != each.weight]

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
        if pair != self.pair and (fault := tls.out_of_date(pair, security)):
            raise StartError(fault)
        for warning in tls.date_warnings(pair, msgspec.structs.replace(new, security=security)):
            log.warning(warning)
        if not leaves_any(new.analyzers, self.overrides.by_id):
            raise ConfigError(["analyzers: with the overrides in force nothing would be left to deliver to"])
        dead_letters = msgspec.structs.replace(new.dead_letters, path=self.config.dead_letters.path)
        config = msgspec.structs.replace(
            self.config, analyzers=new.analyzers, limits=new.limits, security=security, dead_letters=dead_letters
        )
        self.put_in_force(config, pair)
        return need_restart

    def put_in_force(self, config: Config, pair: Pair | None) -> None:
        """Set the settings that workers will read. Raises ConfigError as above."""
        if self._is_shared and not leaves_any(config.analyzers, self.overrides.by_id):  # a reload is taken back
            self._unused, self.overrides.by_id = self.overrides.by_id, {}
        self._set_analyzers(config)
        self.config, self.pair = config, pair
        self._note_own_certificate()
        self.generation += 1
        if self._unused is not None:
            self.use_overrides(self._unused)

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
            states.set(slot, AnalyzerWord.CLIENT_NOT_AFTER, tls.not_after(analyzer.tls.certificate))
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

    def _put_all_in_force(self) -> None:
        for slot, analyzer in self.analyzers.items():
            self._put_in_force(slot, analyzer)

    def _put_in_force(self, slot: int, analyzer: Analyzer) -> None:
        override = self.overrides.get(analyzer.id)
        states = self.block.analyzers
        states.set_weight(slot, override.weight_of(analyzer))
        states.set(slot, AnalyzerWord.WEIGHT_OVERRIDDEN, int(override.weight is not None))
        states.set(slot, AnalyzerWord.DRAINING, int(override.draining))

    # ---- overrides

    def wanted(self, action: Action, by_id: dict[str, Override] | None = None) -> dict[str, Override] | tuple[int, str]:
        """Return what the overrides, or others, are after an action; or a status as in HTTP and why that cannot be."""
        if action.analyzer not in self.slots_in_use():
            return 404, f"there is no analyzer {action.analyzer!r}"
        wanted = self.overrides.after(action, by_id)
        if not leaves_any(self.config.analyzers, wanted):
            return 422, "nothing would be left to deliver to"
        return wanted

    def apply(self, action: Action) -> tuple[int, object]:
        """Change an analyzer; return a status as in HTTP, and the error if it is not 200."""
        wanted, before = self.wanted(action), self.overrides.get(action.analyzer)
        if not isinstance(wanted, dict):
            return wanted
        try:
            self.overrides.save(wanted)
        except OSError as error:
            return 503, f"the change cannot be stored in {self.overrides.folder}: {error.strerror}"
        return self.put_override_in_force(action, before)

    def put_override_in_force(self, action: Action, before: Override) -> tuple[int, object]:
        """Let workers know what an action has changed in the overrides, and log it; return 200 or what is wrong."""
        slot = self.slots_in_use().get(action.analyzer)
        if slot is None:  # a reload has removed it meanwhile
            return 404, f"there is no analyzer {action.analyzer!r}"
        analyzer = self.analyzers[slot]
        self._unused = None
        self._put_all_in_force()
        if action.draining is False:  # set online: end a pause (Retry-After) and the wait for a trial
            self.block.analyzers.set(slot, AnalyzerWord.PAUSED_UNTIL_NS, 0)
            self.block.analyzers.set(slot, AnalyzerWord.NEXT_TRIAL_NS, 0)
        self.block.analyzers.touch()
        log.info(
            "analyzer changed",
            analyzer=action.analyzer,
            by=action.by,
            before=_described(analyzer, before),
            after=_described(analyzer, self.overrides.get(analyzer.id)),
        )
        return 200, None

    def use_overrides(self, by_id: dict[str, Override]) -> bool:
        """Put the overrides of all replicas in force; return whether they are.

        They are not where they leave no analyzer to deliver to, until a reload brings others.
        """
        self._unused = None
        if by_id == self.overrides.by_id:
            return True
        if not leaves_any(self.config.analyzers, by_id):
            log.error("the shared overrides leave no analyzer to deliver to, and are ignored")
            self._unused = by_id
            return False
        self.overrides.by_id = by_id
        self._put_all_in_force()
        self.block.analyzers.touch()
        log.info("analyzers were changed at another replica", overrides=sorted(by_id))
        return True


def _described(analyzer: Analyzer, override: Override) -> dict[str, object]:
    """Return what is in force for an analyzer with that override."""
    weight = override.weight_of(analyzer)
    return {"weight": weight, "draining": override.draining, "override": override != Override()}
