"""The chat format of a model: its renderer, its thinking mode and its tokenizer.

Models are looked up in :mod:`searchr1_async.models`; one that is not known, or whose format is not, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import anyio.to_thread
from renderers import Message, RenderedTokens, Renderer, ToolSpec, config_from_name, create_renderer
from renderers.base import MODEL_RENDERER_MAP

from searchr1_async.episodes.chatml import ChatMLRenderer
from searchr1_async.errors import ModelError
from searchr1_async.models import (
    ChatFormat,
    Thinking,
    find_format,
    find_model,
    format_named_for,
    known_models,
    plain_name,
)

CHATML = "chatml"
AS_TEMPLATE = "template"
"""Value of ``thinking`` that leaves it to the chat template, as in runs of earlier versions."""


def select_renderer(
    model_name: str, tokenizer: Any, renderer_name: str | None = None, thinking: Thinking = None
) -> Renderer:
    """The renderer for a model: the named one, else that of its format, else ChatML if its chat template is ChatML.

    Args:
        thinking: see :data:`~searchr1_async.models.Thinking`.

    Raises:
        ModelError: no renderer is known for the model, the named one does not exist or fit its tokenizer, or the format does not
            support this ``thinking``.
    """
    chat = known_format(model_name, renderer_name) or _chatml_format(model_name, tokenizer)
    options = thinking_options(chat, thinking, model_name)
    if chat.renderer == CHATML:
        return ChatMLRenderer(tokenizer)
    named = _Named(tokenizer, plain_name(model_name))
    try:
        kind: Any = type(config_from_name(cast(str, chat.renderer)))
        renderer = create_renderer(named, kind(**options))
        if _EFFORT_HINTS.isdisjoint(options):
            return renderer
        unhinted = {name: value for name, value in options.items() if name not in _EFFORT_HINTS}
        return cast(Renderer, _EffortRenderer(renderer, create_renderer(named, kind(**unhinted))))
    except Exception as error:
        raise ModelError(
            f"renderer {chat.renderer!r} cannot be used with the tokenizer of {model_name!r}: {type(error).__name__}: {error}"
        ) from error


def known_format(model_name: str, renderer_name: str | None = None) -> ChatFormat | None:
    """The model's format, if its name or ``renderer_name`` determines it; None if only the tokenizer can.

    Raises:
        ModelError: the model is known to have no renderer.
    """
    model, plain = find_model(model_name), plain_name(model_name)
    own = model.format if model is not None else format_named_for(plain)
    if renderer_name is not None:
        # If two formats share a renderer name (qwen3), prefer the model's own.
        is_own = own is not None and own.renderer == renderer_name
        return own if is_own else find_format(renderer_name) or ChatFormat(renderer_name, renderer_name, {}, None, "")
    if own is None and (mapped := MODEL_RENDERER_MAP.get(plain)) is not None:
        own = find_format(mapped) or ChatFormat(mapped, mapped, {}, None, "")
    if own is not None and own.renderer is None:
        kin = [other for other in known_models() if other.is_offered and other.format.renderer and not other.is_base]
        kin.sort(key=lambda other: model is None or other.family != model.family)
        raise ModelError(
            f"{model_name} has no chat format that can be rendered: {own.refusal}. Choose another model, such as "
            f"{kin[0].name}, or name a renderer that is known to fit with renderer=…"
        )
    return own


def thinking_options(chat: ChatFormat, thinking: Thinking, model_name: str) -> Mapping[str, Any]:
    """Renderer options for a value of ``thinking``.

    Raises:
        ModelError: the format does not support it; the message lists the supported values.
    """
    _check_kind(thinking)
    if thinking == AS_TEMPLATE:
        return {}
    name = chat.default if thinking is None else thinking if isinstance(thinking, str) else "on" if thinking else "off"
    if name is None:
        return {}
    if name not in chat.thinking:
        there = ", ".join(map(repr, chat.choices)) or "no other value is known for it"
        raise ModelError(
            f"{model_name} (chat format {chat.name}) does not have thinking={thinking!r}. It has: {there}; "
            f"None is its default, {AS_TEMPLATE!r} leaves it to the chat template"
        )
    return chat.thinking[name]


def check_thinking(model_name: str | None, renderer_name: str | None, thinking: Thinking) -> None:
    """Checks ``thinking`` before the tokenizer is loaded, as far as the names allow.

    Raises:
        ModelError: the value is invalid or unsupported by the model's format, or the model cannot be rendered.
    """
    _check_kind(thinking)
    if model_name is not None and (chat := known_format(model_name, renderer_name)) is not None:
        thinking_options(chat, thinking, model_name)


def _check_kind(thinking: object) -> None:
    if thinking is not None and not isinstance(thinking, bool | str):
        raise ModelError(f"thinking is {thinking!r}: give True, False, an effort such as 'low', or None")


def _chatml_format(model_name: str, tokenizer: Any) -> ChatFormat:
    """Plain ChatML, for a model of unknown family whose tokenizer supports it.

    Raises:
        ModelError: it does not.
    """
    names = "the names of the renderers package, or 'chatml'"
    vocabulary = tokenizer.get_added_vocab()
    if "<|im_start|>" not in vocabulary or "<|im_end|>" not in vocabulary:
        raise ModelError(f"no chat format is known for {model_name!r}: name one with renderer=… ({names})")
    if not _template_is_chatml(tokenizer):
        raise ModelError(
            f"no chat format is known for {model_name!r}: its tokenizer has the tokens of ChatML, but its chat template writes "
            f"something else. Name its format with renderer=… ({names}, which would override its template)"
        )
    chat = find_format(CHATML)
    assert chat is not None
    return chat


_SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("system", "Be brief."), ("user", "Who?"), ("assistant", "Me."), ("user", "Why?"), ("assistant", "So."),
)  # fmt: skip


def _template_is_chatml(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template is plain ChatML, or missing."""
    if not getattr(tokenizer, "chat_template", None):
        return True
    for count in (2, 4, 5):  # up to a question, a second question, an answer
        spoken = _SMALL_TALK[:count]
        opens = spoken[-1][0] == "user"
        expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in spoken)
        expected += "<|im_start|>assistant\n" * opens
        messages = [{"role": role, "content": text} for role, text in spoken]
        try:
            written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        except Exception:  # templates raise arbitrary errors
            return False
        if str(written).rstrip("\n") != expected.rstrip("\n"):
            return False
    return True


_EFFORT_HINTS = frozenset({"low_effort", "medium_effort"})
"""Options of Nemotron's renderers that add a hint after the last user message."""


class _EffortRenderer:
    """Renderer with an effort hint that can still continue after a tool result.

    Such renderers refuse to extend a conversation, since a new user message would move the hint. A tool result does not, and
    renders the same without the hint.
    """

    def __init__(self, renderer: Renderer, unhinted: Renderer) -> None:
        self._renderer, self._unhinted = renderer, unhinted

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: list[Message],
        *,
        tools: list[ToolSpec] | None = None,
    ) -> RenderedTokens | None:
        """Delegates to the renderer without the hint; None for user messages."""
        if any(message.get("role") == "user" for message in new_messages):
            return None
        return self._unhinted.bridge_to_next_turn(
            previous_prompt_ids, previous_completion_ids, new_messages, tools=tools
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)


class _Named:
    """Tokenizer that reports the model's name, from which renderers infer the format variant."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self.name_or_path = tokenizer, name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


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


REMEMBERED = 2048
"""Cached texts; about 15 MB with three passages each."""


class RememberingTokenizer:
    """A Hugging Face tokenizer whose ``encode`` caches recent texts.

    Members of a group search for much the same, and encoding is a large part of an episode's CPU time. Cached tokens are also
    shared objects, which saves memory.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._encode = lru_cache(maxsize=REMEMBERED)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> list[int]:
        """As the tokenizer's; cached only without special tokens and options."""
        if add_special_tokens or options:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, **options)
        return list(self._encode(text))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
