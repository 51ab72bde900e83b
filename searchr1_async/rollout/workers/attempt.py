"""One attempt to roll out a group on a worker."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup

from searchr1_async import errors
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import SearchError
from searchr1_async.rollout.player import Finished, GroupTask
from searchr1_async.rollout.workers.messages import Ended, Found, Played, SearchAsked, SearchFailed
from searchr1_async.rollout.workers.packing import Unpacker

Reply = Callable[[Found | SearchFailed], None]
"""Answers a search without waiting."""


class Attempt:
    """Pool side of a running group. Searches and ``finished`` run in the caller's task group."""

    def __init__(self, number: int, task: GroupTask, search: SearchTool, finished: Finished, tasks: TaskGroup) -> None:
        self.number = number
        self.left = dict.fromkeys(task.members)
        """Unfinished members, in order."""
        self.is_lost = False
        self._search = search
        self._finished = finished
        self._tasks = tasks
        self._unpacker = Unpacker(task.question)
        self._over = anyio.Event()
        self._failure: str | None = None

    async def over(self) -> None:
        """Returns when the group has ended or its worker is gone.

        Raises:
            RuntimeError: a bug in the worker.
        """
        await self._over.wait()
        if self._failure is not None or (self.left and not self.is_lost):
            raise RuntimeError(f"a rollout worker failed: {self._failure or 'a member is missing'}")

    def lose(self) -> None:
        self.is_lost = True
        self._over.set()

    def receive(self, message: Played | Ended | SearchAsked, reply: Reply) -> None:
        """Handles a message about this group without waiting."""
        match message:
            case SearchAsked():
                self._tasks.start_soon(self._answer, message, reply)
            case Played() if message.member in self.left:
                del self.left[message.member]
                self._tasks.start_soon(self._deliver, message.member, self._unpacker.unpack(message))
            case Ended():
                self._failure = message.failure
                self._over.set()

    async def _deliver(self, member: int, episode: Episode) -> None:
        await self._finished(member, episode)

    async def _answer(self, asked: SearchAsked, reply: Reply) -> None:
        """Runs a search; a fatal error ends the group."""
        try:
            found = await self._search.search(asked.queries)
        except SearchError as error:
            if error.is_fatal:
                raise
            reply(SearchFailed(self.number, asked.search, _kind(error), str(error), error.is_fatal))
            return
        results = tuple(tuple(passages) for passages in found)
        self._unpacker.found[asked.search] = results
        reply(Found(self.number, asked.search, results))


def _kind(error: SearchError) -> str:
    """Name of the nearest error class that the other side knows."""
    names = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return next(names, SearchError.__name__)
