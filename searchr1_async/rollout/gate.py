"""Admission of sampling requests: as many as the service and this process can handle, later turns first."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import anyio

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.compat import PushBackProbe
from searchr1_async.rollout.event_loop import PulseReading
from searchr1_async.rollout.limit import Cause, Flight, SampleLimit

LOOK_EVERY = 0.25
"""Seconds between checks for back-pressure. The SDK backs off for at least 1 s, so none is missed."""


@dataclass(frozen=True, slots=True)
class GateStatistics:
    """Current state and totals of a gate."""

    in_flight: int
    """Samples in flight."""
    requests: int
    """Requests in flight."""
    waiting: int
    """Samples waiting for admission."""
    limit: int
    """Samples that may be in flight."""
    cause: Cause
    samples: int
    """Total samples."""
    usage: TokenUsage
    """Billed tokens of everything that passed the gate: a shared prompt counts once per sample, cached for all but the first."""
    failed: int
    """Samples that failed at the service."""
    push_backs: int
    """Number of checks that saw new back-pressure from the service."""
    is_paused: bool


def gate_metrics(gates: Sequence[GateStatistics]) -> dict[str, float]:
    """Rollout metrics of the gates of all processes."""
    return {
        "rollout/samples_in_flight": float(sum(gate.in_flight for gate in gates)),
        "rollout/samples_waiting": float(sum(gate.waiting for gate in gates)),
        "rollout/sample_limit": float(sum(gate.limit for gate in gates)),
        **{
            f"rollout/limited_by/{cause.value}": sum(gate.cause is cause for gate in gates) / max(1, len(gates))
            for cause in Cause
        },
        "rollout/samples": float(sum(gate.samples for gate in gates)),
        "rollout/failed_samples": float(sum(gate.failed for gate in gates)),
        "rollout/push_backs": float(sum(gate.push_backs for gate in gates)),
    }


@dataclass(eq=False, slots=True)
class Slot:
    """Permission to send one request, as an async context manager. Created by :meth:`SampleGate.slot`; use it once."""

    _gate: SampleGate
    samples: int
    turn: int
    _wanted: int
    """Tokens of its prompt."""
    yields: bool
    _flight: Flight | None = None
    """Once admitted."""
    _admitted: anyio.Event | None = None
    """While it waits."""
    _tokens: int = 0
    """Sampled."""
    _cached: int = 0

    def finished(self, tokens: Sequence[int], cached_prompt_tokens: int = 0) -> None:
        """Reports the service's answer.

        Args:
            tokens: token count of each sample.
            cached_prompt_tokens: prompt tokens billed as cache hits, counted on one prompt as the service does.
        """
        self._tokens = sum(tokens)
        self._cached = cached_prompt_tokens

    async def __aenter__(self) -> Slot:
        # No checkpoint on the fast path: the request that follows is one.
        if not self._gate._enter(self, self._wanted):
            await self._gate._wait(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate._leave(self, kind)


class SampleGate:
    """Admits sampling requests; :class:`~searchr1_async.rollout.limit.SampleLimit` decides how many.

    Priority: later turns first (an episode near its end completes its group), then longer prompts (they take longest), then
    first come. Nothing overtakes the head of the queue, so a group's first turns are admitted as soon as there is room for all.
    Requests that yield (an evaluation during training) come after all others.

    Use it in one event loop; it may be created outside of one.
    """

    def __init__(self, limit: SampleLimit | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit or SampleLimit(), clock
        self._probe = PushBackProbe()
        self._looked_at = 0.0
        self._order = itertools.count()
        self._queue: list[tuple[bool, int, int, int, Slot]] = []
        """Heap; cancelled entries stay until they reach the top."""
        self._waiting = self._samples = self._failed = self._push_backs = 0
        self._tokens = self._prompt_tokens = self._cached_prompt_tokens = 0
        self._is_paused = False

    def slot(self, *, samples: int = 1, turn: int = 0, tokens: int = 0, yields: bool = False) -> Slot:
        """Waits for permission to send one request and holds it while the block runs.

        Args:
            samples: number of samples in the request. If it exceeds the limit, it runs alone.
            turn: turn of the episode, from 0; later turns are admitted first.
            tokens: prompt length; longer prompts are admitted first within a turn.
            yields: wait behind every request that does not yield.
        """
        return Slot(self, samples, turn, tokens, yields)

    def watch(self, client: Any) -> None:
        """Watches a sampling client for back-pressure from its service, which the SDK hides."""
        self._probe.watch(client)

    def client_is(self, reading: PulseReading) -> None:
        """Records the load of this process; a callback for :class:`~searchr1_async.rollout.event_loop.Pulse`."""
        now = self._clock()
        self._limit.client_is(now, cpu=reading.cpu, lag=reading.lag_p50)
        self._look(now)

    def pause(self, is_paused: bool) -> None:
        """Stops admission until called with False; requests in flight finish."""
        self._is_paused = is_paused
        self._pump()

    @property
    def statistics(self) -> GateStatistics:
        now, limit = self._clock(), self._limit
        return GateStatistics(
            in_flight=limit.in_flight,
            requests=limit.requests,
            waiting=self._waiting,
            limit=limit.limit,
            cause=limit.cause(now, self._waiting),
            samples=self._samples,
            usage=TokenUsage(self._prompt_tokens, self._cached_prompt_tokens, self._tokens),
            failed=self._failed,
            push_backs=self._push_backs,
            is_paused=self._is_paused,
        )

    def _enter(self, slot: Slot, tokens: int) -> bool:
        """Admits the slot if there is room and nobody is waiting; else queues it."""
        if not self._waiting and not self._is_paused and self._limit.may_begin(slot.samples):
            self._admit(slot, self._clock())
            return True
        heapq.heappush(self._queue, (slot.yields, -slot.turn, -tokens, next(self._order), slot))
        self._waiting += slot.samples
        slot._admitted = anyio.Event()
        self._pump()
        return slot._flight is not None

    async def _wait(self, slot: Slot) -> None:
        """Waits for admission. A cancelled slot gives up its queue entry, or the room it was just given."""
        assert slot._admitted is not None
        try:
            await slot._admitted.wait()
        except BaseException:
            if slot._flight is None:
                slot._admitted = None
                self._waiting -= slot.samples
            else:
                self._limit.ended(slot._flight)
            self._pump()
            raise

    def _admit(self, slot: Slot, now: float) -> None:
        # A request reads its prompt once; the other samples' prompts are billed as cache hits.
        self._prompt_tokens += slot._wanted * slot.samples
        self._cached_prompt_tokens += slot._wanted * (slot.samples - 1)
        slot._flight = self._limit.begin(now, slot.samples)

    def _leave(self, slot: Slot, kind: type[BaseException] | None) -> None:
        flight = slot._flight
        assert flight is not None
        now = self._clock()
        if now - self._looked_at >= LOOK_EVERY:
            self._look(now)
        if kind is None:
            self._limit.finished(flight, now, is_short=self._waiting > 0)
            self._samples += slot.samples
            self._tokens += slot._tokens
            self._cached_prompt_tokens += slot._cached
        else:
            self._limit.ended(flight)
            if issubclass(kind, Exception):  # not cancelled
                self._failed += slot.samples
        self._pump()

    def _pump(self) -> None:
        """Admits from the head of the queue while there is room."""
        queue = self._queue
        if not self._waiting:
            queue.clear()
            return
        if self._is_paused:
            return
        now = self._clock()
        while queue:
            slot = queue[0][-1]
            if slot._admitted is not None:
                if not self._limit.may_begin(slot.samples):
                    return
                self._waiting -= slot.samples
                self._admit(slot, now)
                slot._admitted.set()
            heapq.heappop(queue)

    def _look(self, now: float) -> None:
        self._looked_at = now
        if self._probe.take():
            self._push_backs += 1
            self._limit.pushed_back(now)
