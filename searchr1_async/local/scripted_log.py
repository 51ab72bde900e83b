"""What a scripted backend was asked and what it drew for it: enough to compute the best possible time of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TimedReply:
    """A reply of a script that says how long it takes, and of which chain of turns it is."""

    content: list[int] | str
    """New tokens, or text."""
    seconds: float | None = None
    """None draws it, as for any other reply."""
    label: str = ""
    """Put into the log; the backend does not read it."""


@dataclass(frozen=True, slots=True)
class ServedSequence:
    """One continuation of a sample request."""

    label: str
    seconds: float
    """Drawn for it alone; the request takes as long as its slowest."""
    tokens: int
    """New ones."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request that was given its time."""

    kind: str
    """``sample``, ``forward_backward``, ``forward``, ``optim_step``, ``snapshot`` (weights for sampling), ``export``
    (a checkpoint), ``import`` or ``create``."""
    began: float
    """When its time began to run, in :func:`time.monotonic` seconds, which all processes of a machine share on Linux."""
    seconds: float
    version: int
    """Optimiser steps behind the weights that were sampled from or saved, or that were there before the training call."""
    tokens: int = 0
    """Of the prompt, or of all examples."""
    examples: int = 0
    sequences: tuple[ServedSequence, ...] = ()

    @property
    def ended(self) -> float:
        """When its answer was there, unless it was cancelled."""
        return self.began + self.seconds


def write_log(path: Path, served: Iterable[Served]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(request)) + "\n" for request in served))


def read_log(path: Path) -> list[Served]:
    """What :func:`write_log` wrote."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [
        Served(**{**row, "sequences": tuple(ServedSequence(**sequence) for sequence in row["sequences"])})
        for row in rows
    ]
