"""A run's curves in bounded memory; old steps are merged pairwise."""

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
"""The live view's curves, and the step metric behind each."""

Row = dict[str, float | None]
"""``step`` and a value per curve; None where the step has none."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How much of a series a reader has received."""

    generation: int = -1
    settled: int = 0


class Series:
    """One row per step; past ``limit`` rows, neighbouring rows are merged into their means, repeatedly.

    The last row may be incomplete. All earlier rows stay fixed until the next merge, so a page only needs the new ones
    (:meth:`since`).
    """

    def __init__(self, limit: int = 500) -> None:
        self._limit = max(2, limit + limit % 2)
        self._settled: list[Row] = []
        self._open: list[Row] = []
        self._stride = 1
        self._generation = 0
        self._last = -math.inf
        self.added = 0
        """Total steps added."""

    def __len__(self) -> int:
        return len(self._settled) + bool(self._open)

    @property
    def steps_per_row(self) -> int:
        return self._stride

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step; steps not after the last one are ignored."""
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
        """Rows from ``first`` on, including the incomplete last one."""
        rows = self._settled[first:]
        return [*rows, mean_row(self._open)] if self._open else rows

    def since(self, mark: Mark) -> tuple[int, list[Row], Mark]:
        """What a reader at ``mark`` lacks: the first new row's index, the new rows, and the new mark."""
        first = mark.settled if mark.generation == self._generation else 0
        return first, self.rows(first), Mark(self._generation, len(self._settled))


def mean_row(rows: list[Row]) -> Row:
    """Mean of each value over the rows that have it."""
    if len(rows) == 1:
        return rows[0]
    merged: Row = {}
    for name in ("step", *CURVES):
        known = [value for row in rows if (value := row[name]) is not None]
        merged[name] = sum(known) / len(known) if known else None
    return merged


def finite(value: object) -> float | None:
    """``value`` as a float; None unless it is a finite number."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
