"""A run in the hand: what ``train()`` gives back at once, to await, to stop and to read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path

import anyio
import polars as pl

from searchr1_async.job import StopRequest, TrainingResult
from searchr1_async.watch.records import RunRecords


class Run:
    """A training run under way.

    It starts at once, in a task of its own; ``await run`` waits for its result. Cancelling that wait (an interrupted cell,
    Ctrl-C) cancels the run and waits until it has closed everything; finished steps are kept. A run whose result is never
    awaited is logged by asyncio if it fails, like any task.
    """

    def __init__(self, work: Callable[[StopRequest], Awaitable[TrainingResult]], out_dir: Path) -> None:
        self._stop = StopRequest()
        self._out_dir = out_dir
        self._task = asyncio.ensure_future(work(self._stop))

    @property
    def out_dir(self) -> Path:
        """The run's folder: settings, resume point, records, checkpoints of the embedded service."""
        return self._out_dir

    @property
    def done(self) -> bool:
        return self._task.done()

    def __await__(self) -> Generator[object, None, TrainingResult]:
        # Awaiting a task directly would hand a cancellation on to it and return before it has closed its services.
        return self._result().__await__()

    async def _result(self) -> TrainingResult:
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if not self._task.done():
                self._task.cancel()
                # Shielded: a cancelled anyio scope cancels again at every turn of the loop.
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([self._task])
            raise

    async def stop(self) -> TrainingResult:
        """Stops at once and cleanly; returns what the run came to. ``train(..., resume=True)`` goes on from there."""
        self._stop.request()
        return await self

    @property
    def metrics(self) -> pl.DataFrame:
        """One row a finished step, with the recipe's metric names as columns."""
        return RunRecords(self._out_dir).metrics()

    def episodes(self) -> pl.LazyFrame:
        """One row an episode of every finished step, scanned from the run's Parquet files."""
        return RunRecords(self._out_dir).episodes()

    def groups(self) -> pl.LazyFrame:
        """One row a group of every finished step: trained on, or dropped and why; the weights that it was sampled from."""
        return RunRecords(self._out_dir).groups()

    def __repr__(self) -> str:
        state = "ended" if self.done else "running"
        return f"Run({str(self._out_dir)!r}, {state})"
