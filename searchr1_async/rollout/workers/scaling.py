"""Decides when to add a worker. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SATURATED_SECONDS = 5.0
"""Minimum uninterrupted saturation: a worker's start takes 3 s of CPU, and shorter peaks are not worth it."""
WORTH_MEMBERS = 64
"""Minimum episodes in the busiest process. With fewer, something other than rollouts saturates it."""


@dataclass(frozen=True, slots=True)
class ProcessLoad:
    """Load of one rollout process."""

    saturated_seconds: float
    """Time saturated without a break; 0 if it is not (:attr:`GateStatistics.saturated_seconds`)."""
    members: int
    """Episodes in progress."""


def wants_more_workers(processes: Sequence[ProcessLoad], *, cores: int, machine_load: float) -> bool:
    """Whether to start another worker: every process is saturated and a core is free.

    Args:
        processes: all rollout processes, including this one.
        cores: cores usable by this process.
        machine_load: runnable threads, averaged over a minute (``os.getloadavg()[0]``); 0 if unknown. Accounts for other
            programs, such as the embedded service.
    """
    if not processes or len(processes) >= cores or machine_load >= cores:
        return False
    if max(process.members for process in processes) < WORTH_MEMBERS:
        return False
    return all(process.saturated_seconds >= SATURATED_SECONDS for process in processes)
