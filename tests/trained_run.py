"""A run of the tiny world that has learned to search and to answer, with a search that its folder can describe."""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import searchr1_async as sr
from searchr1_async.search import retrievers
from searchr1_async.testing import HashingEmbedder
from tests import tiny_world

SERVICE_KEY = "TINKER_API_KEY"


@dataclass(frozen=True)
class TrainedRun:
    folder: Path
    corpus: Path

    def search(self) -> sr.Search:
        """Of the corpus file; only where embedders are those of the tiny world, see :func:`with_hashed_words`."""
        return sr.Search.local(self.corpus, path=self.corpus.with_name("index"), embedder="hashed words", n_results=1)


def with_hashed_words(patch: pytest.MonkeyPatch) -> None:
    """An embedder of any name is the tiny world's, so that a search can be described."""
    patch.setattr(retrievers, "make_embedder", lambda embedder: HashingEmbedder())


def settings(**changes: Any) -> dict[str, Any]:
    """Of a run that knows its format after its warm-up."""
    warm_up = sr.WarmUp(steps=20, batch_size=16, learning_rate=4e-3)
    return tiny_world.served_settings(**({"warm_up": warm_up, "steps": 1, "max_tokens": 11} | changes))


@functools.cache
def trained_run() -> TrainedRun:
    """Trained once a process, on the shared service; call it outside of any event loop."""
    scratch = tempfile.TemporaryDirectory(prefix="trained-run-")
    atexit.register(scratch.cleanup)
    made = TrainedRun(Path(scratch.name) / "run", Path(scratch.name) / "corpus.jsonl")
    rows = [
        {"id": f"{kind}-{place}", "title": "", "text": f"{kind} {place} {thing}"}
        for (kind, place), thing in tiny_world.make_facts().items()
    ]
    made.corpus.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    async def train() -> None:
        await sr.train(
            tiny_world.make_questions()[0],
            made.search(),
            out_dir=made.folder,
            **tiny_world.given(sr.TrainConfig, settings()),
        )

    with pytest.MonkeyPatch.context() as patch:
        with_hashed_words(patch)
        patch.setenv(SERVICE_KEY, tiny_world.shared_service().api_key)
        asyncio.run(train())
    return made
