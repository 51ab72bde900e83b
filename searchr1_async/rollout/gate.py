"""Admission of sampling requests: as many as the service and this process can handle, later turns first.

It also detects back-pressure from the service, which the SDK hides. On "too many requests" (429) the SDK delays all samples of its
session by 1 to 5 s, and on "paused for capacity" it retries; callers see only longer waits. It leaves two traces: the session
holder's back-off time, and the queue-state callback of a sampling client. Both are SDK internals: if one is missing the other is
used, and without both nothing is detected.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import anyio

from searchr1_async.billing import TokenUsage
from searchr1_async.rollout.event_loop import PulseReading
from searchr1_async.rollout.first_turn import Sharing
from searchr1_async.rollout.limit import Cause, Flight, SampleLimit

HOLDER_FIELD = "_sample_backoff_until"
OBSERVER = "on_queue_state_change"
PAUSED = "PAUSED_CAPACITY"
"""Queue state of a service short of capacity. (Fewer samples do not help with PAUSED_RATE_LIMIT, which limits the number of
weights sampled from.)"""


class PushBackProbe:
    """Watches the sampling clients of this process. Call :meth:`watch` and :meth:`take` on one thread."""

    def __init__(self) -> None:
        self._holders: dict[int, tuple[weakref.ref[Any], Any]] = {}
        """By identity: the holder and its last seen back-off time."""
        # The SDK reports queue states on its own thread.
        self._paused = threading.Event()

    def watch(self, client: Any) -> None:
        """Adds a sampling client; clients are dropped when garbage-collected."""
        holder = getattr(client, "holder", None)
        if holder is not None and id(holder) not in self._holders:
            try:
                number = id(holder)
                reference = weakref.ref(holder, lambda _: self._holders.pop(number, None))
            except TypeError:  # not weakly referenceable, and must not be kept alive
                pass
            else:
                self._holders[number] = (reference, getattr(holder, HOLDER_FIELD, None))
        self._listen(client)

    def take(self) -> bool:
        """Whether the service pushed back since the last call."""
        pushed = self._paused.is_set()
        if pushed:
            self._paused.clear()
        for number, (reference, seen) in list(self._holders.items()):
            now = getattr(reference(), HOLDER_FIELD, None)
            if now != seen:
                self._holders[number] = (reference, now)
                pushed = pushed or now is not None
        return pushed

    def _listen(self, client: Any) -> None:
        """Wraps the client's queue-state callback."""
        if not callable(getattr(client, OBSERVER, None)) or OBSERVER in getattr(client, "__dict__", {OBSERVER: None}):
            return
        paused, kind = self._paused, type(client)
        try:
            reference = weakref.ref(client)  # a strong reference would be a cycle that keeps old clients alive
        except TypeError:
            return

        def observe(queue_state: Any, queue_state_reason: str | None) -> None:
            if getattr(queue_state, "name", "") == PAUSED:
                paused.set()
            if (owner := reference()) is not None:
                getattr(kind, OBSERVER)(owner, queue_state, queue_state_reason)

        setattr(client, OBSERVER, observe)


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
    """Current maximum of samples in flight."""
    cause: Cause
    saturated_seconds: float
    """How long this process has been saturated without a break; 0 if it is not."""
    samples: int
    """Total samples."""
    tokens: int
    """Total sampled tokens."""
    prompt_tokens: int
    """Prompt tokens of all requests sent; a shared prompt counts once per sample."""
    cached_prompt_tokens: int
    """Part of ``prompt_tokens`` billed as cache hits: as reported by the service, plus the prompts of all but the first sample of a
    request. Counted as 0 for failed or cancelled requests."""
    failed: int
    """Samples that failed at the service."""
    push_backs: int
    """Number of checks that saw new back-pressure from the service."""
    groups: int
    """Groups whose first turns were scheduled by ``first_turn="auto"``."""
    split_groups: int
    """Those of ``groups`` that were sent as one request per member."""
    is_paused: bool

    @property
    def usage(self) -> TokenUsage:
        """Billed tokens of everything that passed the gate."""
        return TokenUsage(self.prompt_tokens, self.cached_prompt_tokens, self.tokens)


def gate_metrics(gates: Sequence[GateStatistics]) -> dict[str, float]:
    """Rollout metrics summed over the gates of all processes; ``rollout/limited_by/<cause>`` is the fraction of gates with that
    cause."""
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
        "rollout/split_groups": float(sum(gate.split_groups for gate in gates)),
    }


class Slot:
    """Permission to send one request, as an async context manager. Created by :meth:`SampleGate.slot`; use it once."""

    __slots__ = (
        "_admitted",
        "_cached",
        "_delay",
        "_flight",
        "_gate",
        "_tokens",
        "_wanted",
        "samples",
        "turn",
        "yields",
    )

    def __init__(self, gate: SampleGate, samples: int, turn: int, tokens: int, yields: bool) -> None:
        self.samples = samples
        self.turn = turn
        self.yields = yields
        self._gate = gate
        self._wanted = tokens
        self._flight: Flight | None = None
        self._admitted: anyio.Event | None = None
        self._delay = 0.0
        self._tokens = 0
        self._cached = 0

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

    Args:
        limit: how many samples may be in flight.
        sharing: decides :meth:`is_sharing_worth_it`.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        limit: SampleLimit | None = None,
        sharing: Sharing | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit or SampleLimit()
        self._sharing = sharing or Sharing()
        self._clock = clock
        self._probe = PushBackProbe()
        self._looked_at = 0.0
        self._order = itertools.count()
        self._queue: list[tuple[bool, int, int, int, Slot]] = []
        """Heap; cancelled entries stay until they reach the top."""
        self._waiting = 0
        self._samples = 0
        self._tokens = 0
        self._prompt_tokens = 0
        self._cached_prompt_tokens = 0
        self._failed = 0
        self._push_backs = 0
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

    def is_sharing_worth_it(self, members: int) -> bool:
        """Whether one shared request for the first turns of a group is cheaper than one per member."""
        return self._sharing.is_worth_it(self._clock(), members)

    def watch(self, client: Any) -> None:
        """Watches a sampling client for back-pressure from its service, which the SDK hides."""
        self._probe.watch(client)

    def client_is(self, reading: PulseReading) -> None:
        """Records the load of this process; a callback for :class:`~searchr1_async.rollout.event_loop.Pulse`."""
        now = self._clock()
        self._limit.client_is(now, cpu=reading.cpu, lag=reading.lag_p50)
        self._sharing.client_is(seconds=reading.seconds, cpu=reading.cpu, is_saturated=self._limit.is_saturated)
        self._look(now)

    def pause(self, is_paused: bool) -> None:
        """Stops admission until called with False; requests in flight finish."""
        self._is_paused = is_paused
        self._pump()

    @property
    def statistics(self) -> GateStatistics:
        now, limit, sharing = self._clock(), self._limit, self._sharing
        return GateStatistics(
            in_flight=limit.in_flight,
            requests=limit.requests,
            waiting=self._waiting,
            limit=limit.limit,
            cause=limit.cause(now, self._waiting),
            saturated_seconds=limit.saturated_for(now),
            samples=self._samples,
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            failed=self._failed,
            push_backs=self._push_backs,
            groups=sharing.asked,
            split_groups=sharing.split,
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
                self._limit.abandoned(slot._flight)
            self._pump()
            raise

    def _admit(self, slot: Slot, now: float) -> None:
        # A request reads its prompt once; the other samples' prompts are billed as cache hits.
        self._prompt_tokens += slot._wanted * slot.samples
        self._cached_prompt_tokens += slot._wanted * (slot.samples - 1)
        slot._flight = self._limit.begin(now, slot.samples)
        slot._delay = self._sharing.began(now, samples=slot.samples, turn=slot.turn)

    def _leave(self, slot: Slot, kind: type[BaseException] | None) -> None:
        flight = slot._flight
        assert flight is not None
        now = self._clock()
        if now - self._looked_at >= LOOK_EVERY:
            self._look(now)
        if kind is None:
            self._limit.finished(flight, now, is_short=self._waiting > 0)
            self._sharing.finished(now - flight.began, samples=slot.samples, turn=slot.turn, delay=slot._delay)
            self._samples += slot.samples
            self._tokens += slot._tokens
            self._cached_prompt_tokens += slot._cached
        elif issubclass(kind, Exception):
            self._limit.failed(flight)
            self._failed += slot.samples
        else:  # cancelled
            self._limit.abandoned(flight)
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
