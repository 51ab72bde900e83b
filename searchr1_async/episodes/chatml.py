"""ChatML renderer with Hermes tool calls, for Qwen2.5, SmolLM2 and similar models.

Implements the interface of the ``renderers`` package, which supports Qwen3 and later. Qwen2.5's template
(https://huggingface.co/Qwen/Qwen2.5-7B-Instruct, ``chat_template``) has no reasoning block, and SmolLM2 has no tool tokens:
here tool markup is text and only the turn markers are tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from renderers import Message, ParsedResponse, ParsedToolCall, RenderedTokens, ToolCallParseStatus, ToolSpec

from searchr1_async.errors import ModelError

_TOOLS_HEADER = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_FOOTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ChatMLRenderer:
    """Renders and parses messages of ChatML models.

    Args:
        tokenizer: a Hugging Face tokenizer with ``<|im_start|>`` and ``<|im_end|>``.

    Raises:
        ModelError: a token is missing.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._start = self._token("<|im_start|>")
        self._end = self._token("<|im_end|>")
        stops = [self._end]
        if isinstance(tokenizer.eos_token_id, int) and tokenizer.eos_token_id != self._end:
            stops.append(tokenizer.eos_token_id)
        self._stops = stops

    def _token(self, text: str) -> int:
        token = self._tokenizer.convert_tokens_to_ids(text)
        if not isinstance(token, int) or token == self._tokenizer.unk_token_id:
            raise ModelError(
                f"the tokenizer {self._tokenizer.name_or_path!r} has no {text} token: it is not a ChatML model"
            )
        return token

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    @property
    def is_prefix_stable(self) -> bool:
        """Messages are rendered independently, so appending never changes earlier tokens."""
        return True

    def get_stop_token_ids(self) -> list[int]:
        return list(self._stops)

    def render_ids(
        self, messages: list[Message], *, tools: list[ToolSpec] | None = None, add_generation_prompt: bool = False
    ) -> list[int]:
        return self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt).token_ids

    def render(
        self, messages: list[Message], *, tools: list[ToolSpec] | None = None, add_generation_prompt: bool = False
    ) -> RenderedTokens:
        """Renders messages; the signatures of ``tools`` go into the system message, as in Qwen2.5."""
        tokens: list[int] = []
        indices: list[int] = []
        sampled: list[bool] = []
        rest = list(enumerate(messages))
        if tools:
            system = ""
            index = -1
            if messages and messages[0].get("role") == "system":
                (index, first), *rest = rest
                system = _text(first)
            specs = "".join("\n" + json.dumps(_wrapped(tool), ensure_ascii=False) for tool in tools)
            self._emit(tokens, indices, sampled, index, "system", system + _TOOLS_HEADER + specs + _TOOLS_FOOTER)
        self._emit_all(tokens, indices, sampled, rest)
        if add_generation_prompt:
            self._open(tokens, indices, sampled)
        return RenderedTokens(
            token_ids=tokens,
            message_indices=indices,
            sampled_mask=sampled,
            message_roles=[message.get("role") or "" for message in messages],
        )

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
        tokens.extend(self._encode("\n"))
        indices, sampled = [-1] * len(tokens), [False] * len(tokens)
        self._emit_all(tokens, indices, sampled, list(enumerate(new_messages)))
        self._open(tokens, indices, sampled)
        return RenderedTokens(
            token_ids=tokens,
            message_indices=indices,
            sampled_mask=sampled,
            message_roles=[message.get("role") or "" for message in new_messages],
        )

    def parse_response(
        self, token_ids: list[int], *, tools: list[ToolSpec] | None = None, prompt_ids: list[int] | None = None
    ) -> ParsedResponse:
        """Text and tool calls of a sampled turn, including malformed calls with their status."""
        for position, token in enumerate(token_ids):
            if token in self._stops:
                token_ids = token_ids[:position]
                break
        content, calls = split_tool_calls(self._tokenizer.decode(token_ids))
        return ParsedResponse(content=content.strip(), tool_calls=calls)

    def _open(self, tokens: list[int], indices: list[int], sampled: list[bool]) -> None:
        header = [self._start, *self._encode("assistant\n")]
        tokens.extend(header)
        indices.extend([-1] * len(header))
        sampled.extend([False] * len(header))

    def _emit(
        self, tokens: list[int], indices: list[int], sampled: list[bool], index: int, role: str, text: str
    ) -> None:
        header = [self._start, *self._encode(role + "\n")]
        body = [*self._encode(text), self._end]
        close = self._encode("\n")
        tokens.extend(header + body + close)
        indices.extend([index] * (len(header) + len(body) + len(close)))
        sampled.extend([False] * len(header) + [role == "assistant"] * len(body) + [False] * len(close))

    def _emit_all(
        self, tokens: list[int], indices: list[int], sampled: list[bool], messages: Sequence[tuple[int, Message]]
    ) -> None:
        responses: list[str] = []
        for place, (index, message) in enumerate(messages):
            role, text = message.get("role") or "user", _text(message)
            if role == "tool":
                # Consecutive tool results share a user message, as in Qwen2.5's template.
                responses.append(f"<tool_response>\n{text}\n</tool_response>")
                following = messages[place + 1][1].get("role") if place + 1 < len(messages) else None
                if following != "tool":
                    self._emit(tokens, indices, sampled, index, "user", "\n".join(responses))
                    responses.clear()
                continue
            if role == "assistant":
                text = "\n".join([text] * bool(text) + [_call_text(call) for call in message.get("tool_calls") or []])
            self._emit(tokens, indices, sampled, index, role, text)


def split_tool_calls(text: str) -> tuple[str, list[ParsedToolCall]]:
    """The text outside ``<tool_call>`` blocks, and all blocks in order, including malformed ones. Linear time."""
    outside: list[str] = []
    calls: list[ParsedToolCall] = []
    position = 0
    while (start := text.find(_OPEN, position)) >= 0:
        outside.append(text[position:start])
        end = text.find(_CLOSE, start)
        if end < 0:
            calls.append(ParsedToolCall(raw=text[start:], status=ToolCallParseStatus.UNCLOSED_BLOCK))
            position = len(text)
            break
        position = end + len(_CLOSE)
        calls.append(_parse_call(text[start + len(_OPEN) : end], text[start:position]))
    outside.append(text[position:])
    return "".join(outside), calls


def _parse_call(body: str, raw: str) -> ParsedToolCall:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return ParsedToolCall(raw=raw, status=ToolCallParseStatus.INVALID_JSON)
    if not isinstance(value, dict):
        return ParsedToolCall(raw=raw, status=ToolCallParseStatus.MALFORMED_STRUCTURE)
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not name:
        return ParsedToolCall(raw=raw, status=ToolCallParseStatus.MISSING_NAME)
    if not isinstance(arguments, dict):
        return ParsedToolCall(raw=raw, name=name, status=ToolCallParseStatus.MALFORMED_STRUCTURE)
    return ParsedToolCall(raw=raw, name=name, arguments=arguments)


def _call_text(call: Any) -> str:
    function = call.get("function") or call
    arguments = function.get("arguments", {})
    body = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{_OPEN}\n{{"name": "{function.get("name", "")}", "arguments": {body}}}\n{_CLOSE}'


def _wrapped(tool: ToolSpec) -> dict[str, Any]:
    spec: dict[str, Any] = dict(tool)
    return spec if spec.get("type") == "function" else {"type": "function", "function": spec}


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""
