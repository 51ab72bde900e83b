"""Rollout telemetry, emitted as an event at 4 Hz."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import anyio

from searchr1_async.billing import TokenUsage, total_usage
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.types import Passage
from searchr1_async.events import Emit, RolloutSampled
from searchr1_async.rollout.engine import PlayTally
from searchr1_async.rollout.gate import GateStatistics
from searchr1_async.rollout.pulse import PulseReading

NOTHING = TokenUsage()
TELL_EVERY = 0.25
"""Seconds between events."""
SEARCH_EVERY = 4
"""Events per update of the search metrics, whose percentiles are slower to compute."""


def usage_of_gates(gates: Sequence[GateStatistics], gone: TokenUsage = NOTHING) -> TokenUsage:
    """Tokens of everything that passed these gates, plus ``gone``: the usage of workers that exited."""
    return total_usage((gone, *(gate.usage for gate in gates)))


class CountedSearch:
    """Search that counts pending calls."""

    def __init__(self, search: SearchTool) -> None:
        self._search = search
        self.in_progress = 0
        """Unanswered searches."""

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        self.in_progress += 1
        try:
            return await self._search.search(queries)
        finally:
            self.in_progress -= 1

    def clean_query(self, query: str) -> str | None:
        return self._search.clean_query(query)


class PlayReading:
    """Emits rollout telemetry.

    Args:
        tally: counts of the engine.
        search: the search of the episodes.
        search_metrics: returns its totals.
    """

    def __init__(
        self, emit: Emit, tally: PlayTally, search: CountedSearch, search_metrics: Callable[[], Mapping[str, float]]
    ) -> None:
        self._emit, self._tally, self._search, self._search_metrics = emit, tally, search, search_metrics
        self.pulse = PulseReading(1.0, 0.0, 0.0, 0.0, 0.0)
        """Latest reading of the event loop."""
        self._searched: Mapping[str, float] = {}

    async def tell(self, look: Callable[[], RolloutSampled]) -> None:
        """Emits the result of ``look`` until cancelled."""
        for turn in itertools.count():
            if turn % SEARCH_EVERY == 0:
                self.look_at_search()
            self._emit(look())
            await anyio.sleep(TELL_EVERY)

    def look_at_search(self) -> None:
        """Updates the search totals used by :meth:`read`."""
        self._searched = self._search_metrics()

    def read(self, gates: Sequence[GateStatistics], gone: TokenUsage = NOTHING) -> RolloutSampled:
        """The current state.

        Args:
            gates: gates of all rollout processes.
            gone: usage of workers that exited.
        """
        tally, pulse = self._tally, self.pulse
        used = usage_of_gates(gates, gone)
        # Report the cause of the busiest process, which is the bottleneck.
        busiest = max(gates, key=lambda gate: gate.waiting, default=None)
        return RolloutSampled(
            episodes=tally.episodes,
            sampling=sum(gate.in_flight for gate in gates),
            queued=sum(gate.waiting for gate in gates),
            searching=self._search.in_progress,
            groups=tally.groups,
            finished_episodes=tally.finished,
            prompt_tokens=used.prompt,
            sampled_tokens=used.sampled,
            cached_prompt_tokens=used.cached,
            search=self._searched,
            limited_by="" if busiest is None else busiest.cause.value,
            loop_lag_p50=pulse.lag_p50,
            loop_lag_p99=pulse.lag_p99,
            loop_lag_max=pulse.lag_max,
            cpu=pulse.cpu,
            is_paused=bool(gates) and all(gate.is_paused for gate in gates),
        )
