"""Which chat format a model has: the renderer that frames its messages."""

from __future__ import annotations

from typing import Any, cast

from renderers import Renderer, config_from_name, create_renderer
from renderers.base import MODEL_RENDERER_MAP

from searchr1_async.episodes.chatml import ChatMLRenderer
from searchr1_async.errors import ModelError


def select_renderer(model_name: str, tokenizer: Any, renderer_name: str | None = None) -> Renderer:
    """The renderer for a model: the one named, else the package's for this model, else ChatML where the tokenizer speaks it.

    Raises:
        ModelError: no renderer is known for the model, or the one named does not exist or does not suit its tokenizer.
    """
    if renderer_name == "chatml":
        return ChatMLRenderer(tokenizer)
    known = renderer_name or MODEL_RENDERER_MAP.get(model_name)
    if known is not None:
        try:
            return create_renderer(tokenizer, cast(Any, config_from_name(known)))
        except Exception as error:
            raise ModelError(
                f"renderer {known!r} cannot be used with the tokenizer of {model_name!r}: {type(error).__name__}: {error}"
            ) from error
    vocabulary = tokenizer.get_added_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return ChatMLRenderer(tokenizer)
    raise ModelError(
        f"no chat format is known for {model_name!r}: name one with renderer=… (the names of the renderers package, or 'chatml')"
    )
