"""Dispatching: every accepted packet is claimed, given to an analyzer, and sent from its list."""

import asyncio
from typing import Any, Final, Self

from typing_extensions import disjoint_base

from fastdist._core.forward import PoolBase
from fastdist._core.pick import AliasTable, Rendezvous
from fastdist._core.ring import PacketRing
from fastdist._core.states import AnalyzerStates

UNLIMITED: Final[int]
STRATEGIES: Final[dict[str, int]]
UNITS: Final[dict[str, int]]

@disjoint_base
class DispatchBase:
    loop: asyncio.AbstractEventLoop
    phase: int
    seen_epoch: int
    claim_limit: int
    trials_due: bool
    @property
    def ring(self) -> PacketRing: ...
    @property
    def pools(self) -> list[Any]: ...
    def __new__(
        cls,
        loop: asyncio.AbstractEventLoop,
        ring: PacketRing,
        states: AnalyzerStates,
        config: Any,
        *args: object,
        **kwargs: object,
    ) -> Self: ...
    def set_table(self, table: AliasTable | None, rendezvous: Rendezvous | None) -> None: ...
    def schedule(self) -> None: ...
    def flush(self) -> None: ...
    def linger_over(self) -> None: ...
    def judge(self, steady: bool) -> None: ...
    def spill_at(self, now: int) -> None: ...
    def touch(self, pool: PoolBase) -> None: ...
    def choose(self, handle: int) -> int: ...
