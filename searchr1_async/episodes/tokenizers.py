"""Loads a model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.to_thread

from searchr1_async.errors import ModelError
from searchr1_async.models import plain_name


def load_pretrained_tokenizer(source: str) -> Any:
    """Loads the Hugging Face tokenizer of a folder or model. Blocking: call it in a worker thread.

    Args:
        source: a folder or model name; a variant suffix (``…:peft:262144``) is ignored.

    Raises:
        ModelError: no tokenizer can be loaded.
    """
    # Knows which models need custom code, at a reviewed revision (Kimi-K2).
    from renderers.base import load_tokenizer as load_reviewed

    try:
        return load_reviewed(source if Path(source).is_dir() else plain_name(source))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {source!r} ({type(error).__name__}): name a folder or a model with tokenizer=…"
        ) from error


async def load_tokenizer(source: str) -> Any:
    """Runs :func:`load_pretrained_tokenizer` in a worker thread.

    Raises:
        ModelError: no tokenizer can be loaded.
    """
    return await anyio.to_thread.run_sync(load_pretrained_tokenizer, source)
