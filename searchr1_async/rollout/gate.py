"""The right to sample: as many at once as the service and this process carry, and the latest turns first."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import anyio

from searchr1_async.rollout.limit import Cause, Flight, SampleLimit
from searchr1_async.rollout.pulse import PulseReading
from searchr1_async.rollout.push_back import PushBackProbe
from searchr1_async.rollout.sharing import Sharing
from searchr1_async.usage import TokenUsage

LOOK_EVERY = 0.25
"""Seconds between two looks for a push-back; the SDK backs off for 1 s at least after one, so none is missed."""


@dataclass(frozen=True, slots=True)
class GateStatistics:
    """What goes through the gate: now, and in all so far."""

    in_flight: int
    """Samples on their way."""
    requests: int
    """That carry them."""
    waiting: int
    """Samples that wait for room."""
    limit: int
    """Samples in flight at most, now."""
    cause: Cause
    """Why no more are in flight."""
    saturated_seconds: float
    """For how long this process has been saturated without a break; 0 while it is not."""
    samples: int
    """Sampled in all."""
    tokens: int
    """In those."""
    prompt_tokens: int
    """Of all requests that were sent, a shared prompt once for each of its samples."""
    cached_prompt_tokens: int
    """Among ``prompt_tokens``, those billed as cache hits: what the service answered, and the prompt of every further sample of
    a request. Of a request that failed or was cancelled the service's count is not known, and taken as 0."""
    failed: int
    """Samples that the service failed."""
    push_backs: int
    """Looks at which the service had pushed back since the one before."""
    groups: int
    """Whose first turns were to be sampled as ``first_turn="auto"`` finds best."""
    split_groups: int
    """Of which so many got one request a member."""
    is_paused: bool
    """Nobody is let in."""

    @property
    def usage(self) -> TokenUsage:
        """The tokens that a service bills for what went through the gate."""
        return TokenUsage(self.prompt_tokens, self.cached_prompt_tokens, self.tokens)


def gate_metrics(gates: Sequence[GateStatistics]) -> dict[str, float]:
    """Of the gates of all processes that play, by the names under which a run reports them.

    Sums; ``rollout/limited_by/<cause>`` is the fraction of the gates with that cause.
    """
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
    """The right to send one request: an asynchronous context manager, which waits for it and gives it back. Made by
    :meth:`SampleGate.slot`; used once."""

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
        """Tells the gate what the service answered.

        Args:
            tokens: the number of tokens of each sample of the request.
            cached_prompt_tokens: prompt tokens billed as cache hits, counted on one prompt as the service does.
        """
        self._tokens = sum(tokens)
        self._cached = cached_prompt_tokens

    async def __aenter__(self) -> Slot:
        # No checkpoint where there is room: the request that follows is one, and it would cost more than all the rest.
        if not self._gate._enter(self, self._wanted):
            await self._gate._wait(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate._leave(self, kind)


class SampleGate:
    """Admits sampling requests; see :class:`~searchr1_async.rollout.limit.SampleLimit` for how many.

    Those that wait are admitted in order: later turns first, then longer prompts, then first come. An episode near its end
    completes its group, and learning waits for groups; long prompts take longest. Nothing overtakes what comes before it in
    that order, so a group's first turns get their places as soon as so many are free.

    Those that yield (an evaluation beside training) come behind all others, whatever their turns: they get the room that
    nobody else waits for.

    To be used in one event loop. A gate is made outside of any.

    Args:
        limit: how many.
        sharing: decides :meth:`is_sharing_worth_it`.
        clock: in seconds, monotonic.
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
        """A heap; it also holds those that were cancelled, until they come up."""
        self._waiting = 0
        self._samples = 0
        self._tokens = 0
        self._prompt_tokens = 0
        self._cached_prompt_tokens = 0
        self._failed = 0
        self._push_backs = 0
        self._is_paused = False

    def slot(self, *, samples: int = 1, turn: int = 0, tokens: int = 0, yields: bool = False) -> Slot:
        """Waits for the right to send one request, and holds it while the block runs.

        Args:
            samples: that the request asks for; it takes as many places. Where there never are as many, it goes alone.
            turn: of the episode, from 0; later turns are admitted first.
            tokens: of the prompt; among equal turns longer prompts are admitted first.
            yields: to every request that does not; among those that yield the order is the same.
        """
        return Slot(self, samples, turn, tokens, yields)

    def is_sharing_worth_it(self, members: int) -> bool:
        """Whether one request for the first turns of so many members costs less than one request each."""
        return self._sharing.is_worth_it(self._clock(), members)

    def watch(self, client: Any) -> None:
        """Has a sampling client looked at for push-backs of its service, which the SDK hides."""
        self._probe.watch(client)

    def client_is(self, reading: PulseReading) -> None:
        """How this process is doing: for :class:`~searchr1_async.rollout.pulse.Pulse` to call."""
        now = self._clock()
        self._limit.client_is(now, cpu=reading.cpu, lag=reading.lag_p50)
        self._sharing.client_is(seconds=reading.seconds, cpu=reading.cpu, is_saturated=self._limit.is_saturated)
        self._look(now)

    def pause(self, is_paused: bool) -> None:
        """Lets nobody in until it is called again with False; requests on their way come to their end."""
        self._is_paused = is_paused
        self._pump()

    @property
    def statistics(self) -> GateStatistics:
        """How it stands now, and totals."""
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
        """Lets it in where there is room and nobody before it; else it is put in line."""
        if not self._waiting and not self._is_paused and self._limit.may_begin(slot.samples):
            self._admit(slot, self._clock())
            return True
        heapq.heappush(self._queue, (slot.yields, -slot.turn, -tokens, next(self._order), slot))
        self._waiting += slot.samples
        slot._admitted = anyio.Event()
        self._pump()
        return slot._flight is not None

    async def _wait(self, slot: Slot) -> None:
        """Until it is let in. One that is cancelled gives up its place in line, or the room that it had just been given."""
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
        # One prompt is read for all samples of a request; the others' are billed as cache hits.
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
        """Lets in those that come first, as far as there is room."""
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
