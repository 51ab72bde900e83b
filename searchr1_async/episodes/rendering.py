"""The chat format of a model: its renderer, its thinking mode and its tokenizer.

Models are looked up in :mod:`searchr1_async.models`; one whose format is not known is refused. Renderers come from the ``renderers``
package, which supports Qwen3 and later; the one of plain ChatML is here.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import anyio.to_thread
from renderers import (
    Message,
    ParsedResponse,
    ParsedToolCall,
    RenderedTokens,
    Renderer,
    ToolCallParseStatus,
    ToolSpec,
    config_from_name,
    create_renderer,
)
from renderers.base import MODEL_RENDERER_MAP

from searchr1_async.episodes.prompts import TOOL_CALL, TOOL_RESPONSE
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

_TOOLS_HEADER = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_FOOTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


class ChatMLRenderer:
    """Renders and parses messages of plain ChatML models with Hermes tool calls: Qwen2.5, SmolLM2 and similar ones.

    As in Qwen2.5's template (https://huggingface.co/Qwen/Qwen2.5-7B-Instruct, ``chat_template``), without reasoning blocks. Only the
    turn markers are tokens; tool markup is text, since SmolLM2 has no tokens for it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._start = self._token("<|im_start|>")
        self._end = self._token("<|im_end|>")
        self._stops = [self._end]
        if isinstance(tokenizer.eos_token_id, int) and tokenizer.eos_token_id != self._end:
            self._stops.append(tokenizer.eos_token_id)

    def _token(self, text: str) -> int:
        token = self._tokenizer.convert_tokens_to_ids(text)
        if not isinstance(token, int) or token == self._tokenizer.unk_token_id:
            raise ModelError(
                f"the tokenizer {self._tokenizer.name_or_path!r} has no {text} token: it is not a ChatML model"
            )
        return token

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def get_stop_token_ids(self) -> list[int]:
        return list(self._stops)

    def render_ids(
        self, messages: list[Message], *, tools: list[ToolSpec] | None = None, add_generation_prompt: bool = False
    ) -> list[int]:
        """Tokens of messages; the signatures of ``tools`` go into the system message, as in Qwen2.5."""
        tokens: list[int] = []
        if tools:
            system = ""
            if messages and messages[0].get("role") == "system":
                system, messages = _text(messages[0]), messages[1:]
            specs = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            tokens += self._message("system", system + _TOOLS_HEADER + specs + _TOOLS_FOOTER)
        tokens += self._messages(messages)
        return tokens + self._header("assistant") if add_generation_prompt else tokens

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: list[Message],
        *,
        tools: list[ToolSpec] | None = None,
    ) -> RenderedTokens | None:
        """Appends new messages and the next turn's header to the unchanged previous tokens.

        None if a new message is the assistant's, which must be sampled.
        """
        if not previous_prompt_ids or any(message.get("role") == "assistant" for message in new_messages):
            return None
        tokens = [*previous_prompt_ids, *previous_completion_ids]
        if not previous_completion_ids or previous_completion_ids[-1] not in self._stops:
            tokens.append(self._end)
        tokens += self._encode("\n")
        return RenderedTokens(token_ids=tokens + self._messages(new_messages) + self._header("assistant"))

    def parse_response(
        self, token_ids: list[int], *, tools: list[ToolSpec] | None = None, prompt_ids: list[int] | None = None
    ) -> ParsedResponse:
        """Text and tool calls of a sampled turn, including malformed calls with their status."""
        said = list(itertools.takewhile(lambda token: token not in self._stops, token_ids))
        content, calls = split_tool_calls(self._tokenizer.decode(said))
        return ParsedResponse(content=content.strip(), tool_calls=calls)

    def _header(self, role: str) -> list[int]:
        return [self._start, *self._encode(role + "\n")]

    def _message(self, role: str, text: str) -> list[int]:
        return [*self._header(role), *self._encode(text), self._end, *self._encode("\n")]

    def _messages(self, messages: Sequence[Message]) -> list[int]:
        tokens: list[int] = []
        for role, group in itertools.groupby(messages, key=lambda message: message.get("role") or "user"):
            if role == "tool":
                # Consecutive tool results share a user message, as in Qwen2.5's template.
                responses = (TOOL_RESPONSE.around(f"\n{_text(message)}\n") for message in group)
                tokens += self._message("user", "\n".join(responses))
                continue
            for message in group:
                calls = map(_call_text, message.get("tool_calls") or []) if role == "assistant" else ()
                parts = (_text(message), *calls)
                tokens += self._message(role, "\n".join(filter(None, parts)))
        return tokens


_CALL = re.compile(f"{TOOL_CALL.open}(.*?)({TOOL_CALL.close}|\\Z)", re.DOTALL)


def split_tool_calls(text: str) -> tuple[str, list[ParsedToolCall]]:
    """The text outside ``<tool_call>`` blocks, and all blocks in order, including malformed ones. Linear time."""
    return _CALL.sub("", text), list(map(_parse_call, _CALL.finditer(text)))


def _parse_call(found: re.Match[str]) -> ParsedToolCall:
    if not found[2]:
        return ParsedToolCall(raw=found[0], status=ToolCallParseStatus.UNCLOSED_BLOCK)
    try:
        value = json.loads(found[1])
    except (ValueError, RecursionError):
        return ParsedToolCall(raw=found[0], status=ToolCallParseStatus.INVALID_JSON)
    if not isinstance(value, dict):
        return ParsedToolCall(raw=found[0], status=ToolCallParseStatus.MALFORMED_STRUCTURE)
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not name:
        return ParsedToolCall(raw=found[0], status=ToolCallParseStatus.MISSING_NAME)
    if not isinstance(arguments, dict):
        return ParsedToolCall(raw=found[0], name=name, status=ToolCallParseStatus.MALFORMED_STRUCTURE)
    return ParsedToolCall(raw=found[0], name=name, arguments=arguments)


def _call_text(call: Any) -> str:
    function = call["function"]
    body = {"name": function["name"], "arguments": function["arguments"]}
    return TOOL_CALL.around(f"\n{json.dumps(body, ensure_ascii=False)}\n")


def _text(message: Message) -> str:
    content = message.get("content") or ""
    assert isinstance(content, str)
    return content


CHATML = "chatml"
AS_TEMPLATE = "template"
"""Value of ``thinking`` that leaves it to the chat template, as in runs of earlier versions."""


def select_renderer(
    model_name: str, tokenizer: Any, renderer_name: str | None = None, thinking: Thinking = None
) -> Renderer:
    """The renderer for a model: the named one, else that of its format, else ChatML if its chat template is ChatML."""
    chat = known_format(model_name, renderer_name) or _chatml_format(model_name, tokenizer)
    options = thinking_options(chat, thinking, model_name)
    if chat.renderer == CHATML:
        return cast(Renderer, ChatMLRenderer(tokenizer))
    named = _Named(tokenizer, plain_name(model_name))
    try:
        kind: Any = type(config_from_name(cast(str, chat.renderer)))
        return create_renderer(named, kind(**options))
    except Exception as error:
        raise ModelError(
            f"renderer {chat.renderer!r} cannot be used with the tokenizer of {model_name!r}: {type(error).__name__}: {error}"
        ) from error


def known_format(model_name: str, renderer_name: str | None = None) -> ChatFormat | None:
    """The model's format, if its name or ``renderer_name`` determines it; None if only the tokenizer can."""
    model, plain = find_model(model_name), plain_name(model_name)
    own = model.format if model is not None else format_named_for(plain)
    if renderer_name is not None:
        # If two formats share a renderer name (qwen3), prefer the model's own.
        is_own = own is not None and own.renderer == renderer_name
        return own if is_own else find_format(renderer_name) or _format_named(renderer_name)
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


def _format_named(renderer_name: str) -> ChatFormat:
    """A renderer of the library that no known model uses."""
    try:
        config_from_name(renderer_name)
    except ValueError as error:
        raise ModelError(f"there is no renderer {renderer_name!r}: {error}") from error
    return ChatFormat(renderer_name, renderer_name, {}, None, "")


def thinking_options(chat: ChatFormat, thinking: Thinking, model_name: str) -> Mapping[str, Any]:
    """Renderer options for a value of ``thinking``."""
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
    """Checks ``thinking`` before the tokenizer is loaded, as far as the names allow."""
    if model_name is not None and (chat := known_format(model_name, renderer_name)) is not None:
        thinking_options(chat, thinking, model_name)


def _chatml_format(model_name: str, tokenizer: Any) -> ChatFormat:
    """Plain ChatML, for a model of unknown family whose tokenizer supports it."""
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


class _TokenizerProxy:
    """A Hugging Face tokenizer, for subclasses that change something about it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class _Named(_TokenizerProxy):
    """Tokenizer that reports the model's name, from which renderers infer the format variant."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        super().__init__(tokenizer)
        self.name_or_path = name


def load_pretrained_tokenizer(source: str) -> Any:
    """Loads the Hugging Face tokenizer of a folder or model. Blocking: call it in a worker thread.

    Args:
        source: a folder or model name; a variant suffix (``…:peft:262144``) is ignored.
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
    """Runs :func:`load_pretrained_tokenizer` in a worker thread."""
    return await anyio.to_thread.run_sync(load_pretrained_tokenizer, source)


REMEMBERED = 2048
"""Cached texts."""


class RememberingTokenizer(_TokenizerProxy):
    """A Hugging Face tokenizer whose ``encode`` caches recent texts.

    Members of a group search for much the same, and encoding is a large part of an episode's CPU time. Cached tokens are also
    shared objects, which saves memory.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._encode = lru_cache(maxsize=REMEMBERED)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> list[int]:
        """As the tokenizer's; cached only without special tokens and options."""
        if add_special_tokens or options:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, **options)
        return list(self._encode(text))
