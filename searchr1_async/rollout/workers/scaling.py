"""When one more process helps. Pure: what is known of the processes is passed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SATURATED_SECONDS = 5.0
"""A process must have been saturated for so long, without a break: starting a worker takes 3 s of CPU, and what is over sooner
(a batch of first turns, assembling a minibatch) is not worth it."""
WORTH_MEMBERS = 64
"""Episodes under way in the busiest process. One that is saturated with fewer is so by something else, which would not move: at
3 ms of CPU a sample, 64 episodes saturate it only if each samples five times a second."""


@dataclass(frozen=True, slots=True)
class ProcessLoad:
    """One process that plays."""

    saturated_seconds: float
    """For how long it has been saturated; 0 while it is not (:attr:`GateStatistics.saturated_seconds`)."""
    members: int
    """Episodes under way."""


def wants_more_workers(processes: Sequence[ProcessLoad], *, cores: int, machine_load: float) -> bool:
    """Whether to start one more.

    Every process that plays is saturated: else groups go to one that is not. A core is left: fewer processes than cores, and
    the machine not busy all over (with the embedded service on it, say, a further process would take its cores).

    Args:
        processes: all that play, this one included.
        cores: of the machine, as far as this process may use them.
        machine_load: runnable threads, averaged over a minute (``os.getloadavg()[0]``); 0 where that is not known.
    """
    if not processes or len(processes) >= cores or machine_load >= cores:
        return False
    if max(process.members for process in processes) < WORTH_MEMBERS:
        return False
    return all(process.saturated_seconds >= SATURATED_SECONDS for process in processes)
