"""The embedded service with a function in place of a model: whole runs in seconds, without weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread

from searchr1_async.local import LocalService, Scripted, local_service
from searchr1_async.testing.tiny_model import make_tiny_tokenizer


@asynccontextmanager
async def scripted_service(
    folder: Path,
    reply: str,
    *,
    words: Sequence[str] = (),
    training: Mapping[str, float] | None = None,
    **options: Any,
) -> AsyncIterator[LocalService]:
    """Runs a Tinker service, in a process of its own, whose model is a function; yields its ``url`` and ``api_key``.

    Point a run at it by ``service=running.url`` and the environment variable ``TINKER_API_KEY``. Training moves one number,
    so that versions of the weights differ.

    Args:
        folder: of checkpoints and of the tokenizer.
        reply: ``package.module:function``, importable in that process: from the prompt's tokens and a seeded ``random.Random``
            to new tokens, text, or a :class:`TimedReply`, which also says how long it takes.
        words: each is one token, beside the tokenizer's common words; empty: a tokenizer of bytes, which takes any text.
        training: seconds of training, as fields of :class:`~searchr1_async.local.scripted_backend.TrainingTimes`.
        options: of :func:`~searchr1_async.local.process.local_service`.

    Raises:
        ServiceError: as :func:`~searchr1_async.local.process.local_service`.
    """
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        await anyio.to_thread.run_sync(lambda: make_tiny_tokenizer(tokenizer, words=words, byte_level=not words))
    scripted = Scripted(reply, training=training or {}, tokenizer_path=str(tokenizer))
    async with local_service("scripted", folder=folder / "service", scripted=scripted, threads=1, **options) as running:
        yield running
