"""Log of a scripted backend's requests and drawn latencies, from which a run's lower-bound time can be computed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TimedReply:
    """A script's reply with an explicit latency and a label for the log."""

    content: list[int] | str
    """New tokens, or text."""
    seconds: float | None = None
    """None draws it from the latency model."""
    label: str = ""
    """Only written to the log."""


@dataclass(frozen=True, slots=True)
class ServedSequence:
    label: str
    seconds: float
    """Its own latency; the request takes as long as its slowest sequence."""
    tokens: int
    """New tokens."""


@dataclass(frozen=True, slots=True)
class Served:
    kind: str
    """``sample``, ``forward_backward``, ``forward``, ``optim_step``, ``snapshot`` (weights for sampling), ``export``
    (a checkpoint), ``import`` or ``create``."""
    began: float
    """Start, in :func:`time.monotonic` seconds (shared by all processes of a machine on Linux)."""
    seconds: float
    version: int
    """Optimizer steps of the weights sampled from or saved, or of those before the training call."""
    tokens: int = 0
    """Prompt tokens, or tokens of all examples."""
    examples: int = 0
    sequences: tuple[ServedSequence, ...] = ()

    @property
    def ended(self) -> float:
        """When its result was ready, unless cancelled."""
        return self.began + self.seconds


def write_log(path: Path, served: Iterable[Served]) -> None:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(asdict(request)) + "\n" for request in served))


def read_log(path: Path) -> list[Served]:
    """Reads :func:`write_log`'s file."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [
        Served(**{**row, "sequences": tuple(ServedSequence(**sequence) for sequence in row["sequences"])})
        for row in rows
    ]
