"""A run's curves in bounded memory: the values of each step, thinned where there are many steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

CURVES = {
    "reward": "env/all/reward/total",
    "exact_match": "env/all/correct",
    "turns": "env/all/turns_per_episode",
    "valid_calls": "env/all/valid_calls",
}
"""The curves of a live view, and the metric of a step that each shows."""

Row = dict[str, float | None]
"""``step`` and a value for each curve; None where the step has none."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How much of a series somebody has."""

    generation: int = -1
    settled: int = 0


class Series:
    """Rows of one step each; past ``limit`` of them, neighbours are merged into their means, again and again.

    A run of 10,000 steps is 313 rows of 32 steps at a limit of 500. The last row may still lack steps; all before it never
    change until the next merge, so that a page is sent only what is new to it (:meth:`since`).
    """

    def __init__(self, limit: int = 500) -> None:
        self._limit = max(2, limit + limit % 2)
        self._settled: list[Row] = []
        self._open: list[Row] = []
        self._stride = 1
        self._generation = 0
        self._last = -math.inf
        self.added = 0
        """Steps, in all."""

    def __len__(self) -> int:
        return len(self._settled) + bool(self._open)

    @property
    def steps_a_row(self) -> int:
        return self._stride

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step. One that is not after the last is passed over: it has been seen."""
        if step <= self._last:
            return
        self._last = step
        self.added += 1
        row: Row = {"step": float(step)}
        for curve, metric in CURVES.items():
            row[curve] = finite(metrics.get(metric))
        self._open.append(row)
        if len(self._open) < self._stride:
            return
        self._settled.append(mean_row(self._open))
        self._open = []
        if len(self._settled) >= self._limit:
            self._settled = [mean_row(self._settled[at : at + 2]) for at in range(0, len(self._settled), 2)]
            self._stride *= 2
            self._generation += 1

    def rows(self, first: int = 0) -> list[Row]:
        """From row ``first`` on, the unfinished last one included."""
        rows = self._settled[first:]
        return [*rows, mean_row(self._open)] if self._open else rows

    def since(self, mark: Mark) -> tuple[int, list[Row], Mark]:
        """What somebody who has ``mark`` lacks: from which row on, those rows, and what it then has."""
        first = mark.settled if mark.generation == self._generation else 0
        return first, self.rows(first), Mark(self._generation, len(self._settled))


def mean_row(rows: list[Row]) -> Row:
    """The mean of each value over the rows that have it."""
    if len(rows) == 1:
        return rows[0]
    merged: Row = {}
    for name in ("step", *CURVES):
        known = [value for row in rows if (value := row[name]) is not None]
        merged[name] = sum(known) / len(known) if known else None
    return merged


def finite(value: object) -> float | None:
    """``value`` as a number, or None where it is no finite one."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
