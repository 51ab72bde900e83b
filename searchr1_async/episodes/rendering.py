"""Which chat format a model has, whether it thinks, and the renderer that frames its messages so.

A model is rendered in its own format or refused: never in one that only resembles it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

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
"""The value of ``thinking`` that leaves it to the chat template, as runs did that were begun before there was a choice."""


def select_renderer(
    model_name: str, tokenizer: Any, renderer_name: str | None = None, thinking: Thinking = None
) -> Renderer:
    """The renderer for a model: the one named, else that of its format, else ChatML where its chat template is ChatML.

    Args:
        thinking: see :data:`~searchr1_async.models.Thinking`.

    Raises:
        ModelError: no renderer is known for the model, the one named does not exist or does not suit its tokenizer, or the
            format does not have this value of ``thinking``.
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
    """The format of a model as far as its name, or the renderer named for it, tells; None where only its tokenizer can.

    Raises:
        ModelError: the name tells that there is no renderer for it.
    """
    model, plain = find_model(model_name), plain_name(model_name)
    own = model.format if model is not None else format_named_for(plain)
    if renderer_name is not None:
        # A name that two formats share (qwen3) means the model's own among them.
        is_own = own is not None and own.renderer == renderer_name
        return own if is_own else find_format(renderer_name) or ChatFormat(renderer_name, renderer_name, {}, None, "")
    if own is None and (mapped := MODEL_RENDERER_MAP.get(plain)) is not None:
        own = find_format(mapped) or ChatFormat(mapped, mapped, {}, None, "")
    if own is not None and own.renderer is None:
        kin = [other for other in known_models() if other.is_offered and other.format.renderer and not other.is_base]
        kin.sort(key=lambda other: model is None or other.family != model.family)
        raise ModelError(
            f"{model_name} has no chat format that can be rendered: {own.refusal}. Choose another model, such as "
            f"{kin[0].name}, or name a renderer that you know to fit with renderer=…"
        )
    return own


def thinking_options(chat: ChatFormat, thinking: Thinking, model_name: str) -> Mapping[str, Any]:
    """The options of a format's renderer for a value of ``thinking``.

    Raises:
        ModelError: the format does not have it; the message names those that it has.
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
    """Refuses a value of ``thinking`` as early as what is named allows; what no name tells is checked with the tokenizer.

    Raises:
        ModelError: no such value at all, none of the model's format, or a model that cannot be rendered.
    """
    _check_kind(thinking)
    if model_name is not None and (chat := known_format(model_name, renderer_name)) is not None:
        thinking_options(chat, thinking, model_name)


def _check_kind(thinking: object) -> None:
    if thinking is not None and not isinstance(thinking, bool | str):
        raise ModelError(f"thinking is {thinking!r}: give True, False, an effort such as 'low', or None")


def _chatml_format(model_name: str, tokenizer: Any) -> ChatFormat:
    """Plain ChatML, for a model of no known family whose tokenizer speaks it.

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
            f"something else. Name its format with renderer=… ({names}, which would be used against its template)"
        )
    chat = find_format(CHATML)
    assert chat is not None
    return chat


_SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("system", "Be brief."), ("user", "Who?"), ("assistant", "Me."), ("user", "Why?"), ("assistant", "So."),
)  # fmt: skip


def _template_is_chatml(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes plain ChatML, in the middle, at the end and before an answer of the model.

    True as well where it has no template: then nothing speaks against it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return True
    for count in (2, 4, 5):  # up to a question, to a second one, to an answer
        spoken = _SMALL_TALK[:count]
        opens = spoken[-1][0] == "user"
        expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in spoken)
        expected += "<|im_start|>assistant\n" * opens
        messages = [{"role": role, "content": text} for role, text in spoken]
        try:
            written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        except Exception:  # templates raise what they like about a conversation that they do not know
            return False
        if str(written).rstrip("\n") != expected.rstrip("\n"):
            return False
    return True


_EFFORT_HINTS = frozenset({"low_effort", "medium_effort"})
"""Options of Nemotron's renderers that put a hint behind the last message of the user."""


class _EffortRenderer:
    """A renderer that hints at an effort behind the user's last message, and goes on after a tool's result.

    The renderers with such a hint extend no conversation, since a new message of the user would take the hint with it. The result
    of a tool is no such message: what comes behind it is the same with the hint and without.
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
        """As the renderer's own without the hint; None where a message is the user's."""
        if any(message.get("role") == "user" for message in new_messages):
            return None
        return self._unhinted.bridge_to_next_turn(
            previous_prompt_ids, previous_completion_ids, new_messages, tools=tools
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)


class _Named:
    """A tokenizer under the model's name, wherever its files are: renderers read from it which variant of a format is meant."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self.name_or_path = tokenizer, name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
