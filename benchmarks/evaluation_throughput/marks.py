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
    imports: float = 0.0
    """Seconds that a fresh process took before to import what both use."""

    @staticmethod
    def read(path: Path) -> Marks:
        """What :func:`marking` wrote."""
        return Marks(**json.loads(path.read_text()))


def import_all(tokenizer: str) -> float:
    """Imports what both contenders use: the seconds that it took.

    Before the time is taken: a notebook does so once, and it is no matter of how evaluation goes. Reading a tokenizer brings torch
    into the process (3 s of CPU), and chromadb's schemas compile a grammar of URIs where JupyterLab is installed (4 s of CPU).
    """
    began = time.monotonic()
    import chromadb  # noqa: F401
    import google.genai  # noqa: F401
    import tinker  # noqa: F401
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer)
    return time.monotonic() - began


@contextmanager
def marking(path: Path, imports: float) -> Iterator[Marks]:
    """Takes the time of the block; writes ``path`` if it ends well."""
    marks = Marks(began=time.monotonic(), imports=imports)
    yield marks
    marks.ended = time.monotonic()
    path.write_text(json.dumps(asdict(marks)))


def prepare_service(url: str, model: str) -> str:
    """Saves what is evaluated on a fresh service: its ``tinker://`` path. Not part of what is timed.

    It also samples once, since the scripted model reads its tokenizer and its world then (5 to 14 s while the machine is busy).
    """
    import tinker

    service = tinker.ServiceClient(base_url=url)
    training: Any = service.create_lora_training_client(base_model=model, rank=8)
    path: str = training.save_weights_for_sampler(name="evaluated").result().path
    sampling: Any = service.create_sampling_client(model_path=path)
    prompt, parameters = tinker.ModelInput.from_ints([1]), tinker.SamplingParams(max_tokens=1)
    sampling.sample(prompt=prompt, num_samples=1, sampling_params=parameters).result()
    return path
