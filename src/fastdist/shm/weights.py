"""Shares: which analyzers get packets right now, and in what proportion.

The dispatcher builds its table from ``effective_weights`` and ``/analyzers`` shows it, so that both agree.
The rules:

- An analyzer gets packets while it is configured, online, not draining and not paused.
- Weight 0 is a backup: such an analyzer gets packets only while no other is online, all such ones equally. A paused one
  is online: its pause ends by itself, and soon.
- One that deliveries took offline is on probation once its checks are good: it gets one packet at a time until it has
  taken one, which is no share. For all others it is offline.
- With slow start, one that has recovered begins with a tenth of its weight and has all of it after ``slow_start``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdist.shm.block import AnalyzerWord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastdist._core import AnalyzerStates
    from fastdist.settings import Analyzer, Health

RAMP_START = 0.1  # of its weight, for an analyzer that has just recovered


def effective_weights(
    states: AnalyzerStates, analyzers: Mapping[int, Analyzer], health: Health, now_ns: int, also: int | None = None
) -> dict[int, float]:
    """Return {slot: weight > 0} of those of ``analyzers`` (by slot) that get packets at ``now_ns`` (monotonic).

    The weights have any scale. The result is empty when no analyzer can take a packet. ``also``: a slot that counts as
    online whether it is or not.
    """
    weights = {slot: states.weight(slot) for slot in analyzers if states.is_pickable(slot) or slot == also}
    if any(weight > 0 for weight in weights.values()):
        weights = {slot: weight for slot, weight in weights.items() if weight > 0}
    else:
        weights = dict.fromkeys(weights, 1.0)
    return {
        slot: weight * ramp(states.get(slot, AnalyzerWord.ONLINE_SINCE_NS), health.slow_start, now_ns) or weight
        for slot, weight in weights.items()  # "or": the smallest of all floats has no tenth
        if states.get(slot, AnalyzerWord.PAUSED_UNTIL_NS) <= now_ns
    }


def ramp(online_since_ns: int, slow_start: float, now_ns: int) -> float:
    """Return the part (0.1..1) of its weight that an analyzer has; it reaches 1 after ``slow_start`` seconds."""
    if online_since_ns == 0 or slow_start == 0:  # 0: it was never offline
        return 1.0
    way = (now_ns - online_since_ns) / (slow_start * 1e9)
    return RAMP_START + (1.0 - RAMP_START) * min(max(way, 0.0), 1.0)


def seems_online(states: AnalyzerStates, slot: int, rise: int) -> bool:
    """Whether an analyzer is shown as online: so is one on probation until it has failed to take a packet.

    Without traffic there is no packet to try it with: one that has recovered must not be shown offline all night.
    """
    if states.is_on_probation(slot, rise):
        return not states.has_failed_trials(slot)
    return states.is_online(slot)


def normalised(weights: Mapping[int, float]) -> dict[int, float]:
    """Return the same slots with weights that add up to 1 (or are all 0)."""
    total = sum(weights.values())
    return {slot: weight / total if total else 0.0 for slot, weight in weights.items()}
