"""Loading a model's tokenizer, in this process and in rollout workers alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.to_thread

from searchr1_async.errors import ModelError
from searchr1_async.models import plain_name


def load_pretrained_tokenizer(source: str) -> Any:
    """The Hugging Face tokenizer in a folder, or of a model. Blocks: call it in a worker thread.

    Args:
        source: a folder or a model's name; the suffix of a variant is no part of the name there (``…:peft:262144``).

    Raises:
        ModelError: none can be loaded from it.
    """
    # It knows which models need code of their own, and at which revision that was reviewed (Kimi-K2).
    from renderers.base import load_tokenizer as load_reviewed

    try:
        return load_reviewed(source if Path(source).is_dir() else plain_name(source))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {source!r} ({type(error).__name__}): name a folder or a model with tokenizer=…"
        ) from error


async def load_tokenizer(source: str) -> Any:
    """The Hugging Face tokenizer in a folder or under a model's name, loaded in a worker thread.

    Raises:
        ModelError: there is none.
    """
    return await anyio.to_thread.run_sync(load_pretrained_tokenizer, source)
