"""The right to sample: as many at once as the service and this process carry, and the latest turns first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager


class Slot:
    """One request under way."""

    def finished(self, tokens: Sequence[int]) -> None:
        """Tells the gate what was sampled: the number of tokens of each sample of the request."""


class SampleGate:
    """Admits sampling requests; see :class:`~searchr1_async.rollout.limit.SampleLimit` for how many."""

    @asynccontextmanager
    async def slot(self, *, samples: int = 1, turn: int = 0, tokens: int = 0) -> AsyncIterator[Slot]:
        """Waits for the right to send one request, and holds it while the block runs.

        Args:
            samples: that the request asks for.
            turn: of the episode, from 0; later turns are admitted first.
            tokens: of the prompt; among equal turns longer prompts are admitted first.
        """
        yield Slot()

    def is_sharing_worth_it(self, members: int) -> bool:
        """Whether one request for the first turns of so many members costs less than one request each."""
        return True
