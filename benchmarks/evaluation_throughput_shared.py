"""What both contenders of the evaluation benchmark do before and after their work; nothing of this project is used."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Marks:
    """When a contender's own call began and returned, in :func:`time.monotonic` seconds, and what it found."""

    began: float = 0.0
    ended: float = 0.0
    right: int = -1
    """Questions answered right, by its own scoring."""

    @staticmethod
    def read(path: Path) -> Marks:
        """What :func:`marking` wrote."""
        return Marks(**json.loads(path.read_text()))


@contextmanager
def marking(path: Path) -> Iterator[Marks]:
    """Takes the time of the block; writes ``path`` if it ends well."""
    marks = Marks(began=time.monotonic())
    yield marks
    marks.ended = time.monotonic()
    path.write_text(json.dumps(asdict(marks)))


def save_weights(url: str, model: str) -> str:
    """Weights for sampling on a fresh service: the ``tinker://`` path of what is evaluated. Not part of what is timed."""
    import tinker

    training: Any = tinker.ServiceClient(base_url=url).create_lora_training_client(base_model=model, rank=8)
    return training.save_weights_for_sampler(name="evaluated").result().path
