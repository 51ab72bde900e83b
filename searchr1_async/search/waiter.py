"""A pending call of a dispatcher."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio
from anyio.abc import TaskGroup

from searchr1_async.errors import SearchError

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(eq=False, slots=True)
class Waiter(Generic[Key, Item, Value]):
    """One call of :meth:`~searchr1_async.search.dispatch.Dispatcher.fetch`, until all items are answered or one fails."""

    number: int
    """Increases with every call."""
    items: Mapping[Key, Item]
    tasks: TaskGroup
    """Its task group, which runs batches while it waits."""
    answers: dict[Key, Value] = field(default_factory=dict)
    failure: SearchError | None = None
    carrying: int = 0
    """Batches running in its task group."""
    done: anyio.Event = field(default_factory=anyio.Event)

    def answer(self, key: Key, value: Value) -> None:
        self.answers[key] = value
        if len(self.answers) == len(self.items):
            self.done.set()

    def fail(self, failure: SearchError) -> None:
        self.failure = self.failure or failure
        self.done.set()

    def result(self) -> dict[Key, Value]:
        """The values by key. Raises a copy of the failure: a shared exception would collect all callers' tracebacks."""
        if self.failure is not None:
            raise _own_copy(self.failure) from (self.failure.__cause__ or self.failure)
        return self.answers


def _own_copy(failure: SearchError) -> SearchError:
    try:
        return copy.copy(failure)
    except TypeError:  # a subclass with other constructor arguments
        return SearchError(str(failure), is_fatal=failure.is_fatal)
