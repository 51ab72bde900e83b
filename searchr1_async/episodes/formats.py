"""Tool-call formats: how a model requests a search, reads its results and answers. Token-exact: sampled tokens are never re-rendered.

``hermes`` uses ``<tool_call>`` JSON and tool messages, framed by a renderer of the ``renderers`` package (or ours, for plain
ChatML). ``tags`` is the format of Search-R1 (Jin et al., 2025, https://arxiv.org/abs/2503.09516): the whole episode is one
assistant message, with results inserted after ``</search>``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from renderers import Message, Renderer, ToolCallParseStatus, ToolSpec

from searchr1_async.episodes.prompts import (
    ANSWER,
    INFORMATION,
    INSTRUCTIONS,
    METHODS,
    SEARCH,
    THINK,
    WITHOUT_TOOL,
    Method,
    PlainText,
    Tag,
    all_passages,
    load_recipe_prompt,
    query_blocks,
    recipe_results,
    with_tool,
    without_tool,
)
from searchr1_async.episodes.rendering import RememberingTokenizer, select_renderer
from searchr1_async.episodes.rewards import answer_after_prefix
from searchr1_async.episodes.types import Passage, Question, SearchCall
from searchr1_async.errors import ModelError
from searchr1_async.models import Thinking

SEARCH_TOOL: ToolSpec = {
    "name": "search",
    "description": "Searches the encyclopedia and returns the closest passages for each query.",
    "parameters": {
        "type": "object",
        "properties": {
            "query_list": {
                "type": "array",
                "items": {"type": "string"},
                "description": "Queries, each complete in itself.",
            }
        },
        "required": ["query_list"],
    },
}


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """The turn calls the search tool."""

    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """The turn contains an invalid tool call; ``problem`` describes why."""

    problem: str


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """The turn makes no call; ``answer`` is None if it gives no answer either."""

    answer: str | None


Reading = SearchRequest | MalformedCall | FinalAnswer


Layout = Callable[[PlainText, Sequence[str], Sequence[Sequence[Passage]]], str]
"""Writes queries and their passages."""


class Dialect(ABC):
    """A tool-call format in a model's chat format. Methods are pure."""

    name: ClassVar[str]
    stop: list[int] | list[str]
    """Stop tokens or strings for Tinker's ``stop`` sampling parameter."""

    def __init__(
        self, renderer: Renderer, tokenizer: Any, instructions: str, tool: ToolSpec | None, layout: Layout
    ) -> None:
        self._renderer, self._tokenizer, self._instructions = renderer, tokenizer, instructions
        self._tool, self._layout = tool, layout
        self._plain = PlainText.of(tokenizer)
        self._tools: list[ToolSpec] | None = None
        """Declared to the model."""

    def start(self, question: Question, given: SearchCall | None = None) -> list[int]:
        """Tokens of the first prompt, with the passages of ``given`` before the question."""
        if self._tool is None:
            messages = without_tool(self._plain, self._instructions, question, given, self._written)
        else:
            messages = with_tool(self._plain, self._instructions, question)
        return self._renderer.render_ids(messages, tools=self._tools, add_generation_prompt=True)

    @abstractmethod
    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        """A turn's text without chat markup and reasoning, and its parsed intent. Never raises on model output."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of sampled tokens, markup included."""
        return self._tokenizer.decode(list(tokens))

    def extend(
        self,
        prompt_tokens: Sequence[int],
        sampled_tokens: Sequence[int],
        queries: Sequence[str],
        results: Sequence[Sequence[Passage]],
    ) -> list[int] | None:
        """Tokens to append after a sampled turn to show its results; None if the chat format cannot."""
        return self._append(prompt_tokens, sampled_tokens, self._layout(self._plain, queries, results))

    def tell(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], problem: str) -> list[int] | None:
        """Like :meth:`extend`, to report an invalid call."""
        return self._append(prompt_tokens, sampled_tokens, f"That call was not valid: {problem}.")

    @abstractmethod
    def _append(
        self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], content: str
    ) -> list[int] | None: ...

    @abstractmethod
    def _written(self, answer: str) -> str:
        """An answer as the model should write it."""

    @abstractmethod
    def write_call(self, queries: Sequence[str]) -> list[int]:
        """Tokens of a turn with these queries, as the model would sample it (for demonstrations)."""

    @abstractmethod
    def write_answer(self, answer: str) -> list[int]:
        """Tokens of a turn with this answer, as the model would sample it (for demonstrations)."""


class TagsDialect(Dialect):
    """Search-R1's tags within one assistant message."""

    name = "tags"

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: Any,
        instructions: str = INSTRUCTIONS["tags", "search"],
        tool: ToolSpec | None = SEARCH_TOOL,
    ) -> None:
        super().__init__(renderer, tokenizer, instructions, tool, all_passages)
        stops = renderer.get_stop_token_ids()
        self._stop_tokens = frozenset(stops)
        # Services may ignore end-of-text tokens when given stop strings, so their texts are listed too.
        tags = [ANSWER.close] if tool is None else [SEARCH.close, ANSWER.close]
        self.stop = [*tags, *(tokenizer.decode([token]) for token in stops)]

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        text = self._tokenizer.decode([token for token in sampled_tokens if token not in self._stop_tokens])
        content = text.rpartition(THINK.close)[2].strip()
        return content, FinalAnswer(_tagged_answer(content)) if self._tool is None else read_tags(content)

    def _append(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], content: str) -> list[int] | None:
        if any(token in self._stop_tokens for token in sampled_tokens):
            return None  # the message is closed, so nothing can be inserted
        return self._plain.encode(f"\n{INFORMATION.around(content)}\n")

    def _written(self, answer: str) -> str:
        return ANSWER.around(answer)

    def write_call(self, queries: Sequence[str]) -> list[int]:
        return self._plain.encode(SEARCH.around(self._plain.defuse(queries[0])))

    def write_answer(self, answer: str) -> list[int]:
        return self._plain.encode(self._written(self._plain.defuse(answer)))


def read_tags(content: str) -> Reading:
    """Parses a turn in tags format: the last complete tag decides; unfinished or blank calls are malformed. Linear time."""
    search_end, answer_end = content.rfind(SEARCH.close), content.rfind(ANSWER.close)
    if search_end > answer_end:
        query = _last_inside(content, SEARCH)
        if query is None:
            return MalformedCall(f"{SEARCH.close} without {SEARCH.open}")
        return SearchRequest((query,)) if query else MalformedCall("an empty query")
    if answer_end >= 0:
        return FinalAnswer(_tagged_answer(content))
    if SEARCH.open in content:
        return MalformedCall(f"{SEARCH.open} without {SEARCH.close}")
    return FinalAnswer(None)


def _tagged_answer(content: str) -> str | None:
    return _last_inside(content, ANSWER) or None


def _last_inside(content: str, tag: Tag) -> str | None:
    """The text of the last complete tag; None if there is none."""
    end = content.rfind(tag.close)
    start = content.rfind(tag.open, 0, max(end, 0))
    return content[start + len(tag.open) : end].strip() if start >= 0 else None


class HermesDialect(Dialect):
    """Hermes JSON calls and tool messages, framed by a renderer."""

    name = "hermes"

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: Any,
        instructions: str = INSTRUCTIONS["hermes", "search"],
        tool: ToolSpec | None = SEARCH_TOOL,
        layout: Layout = query_blocks,
    ) -> None:
        super().__init__(renderer, tokenizer, instructions, tool, layout)
        # In the envelope that chat templates expect: those of Qwen and Llama print it verbatim.
        self._tools = None if tool is None else [cast(ToolSpec, {"type": "function", "function": tool})]
        self.stop = renderer.get_stop_token_ids()
        self._empty_prompt = renderer.render_ids([_ASKED], add_generation_prompt=True)
        self._has_call_ids = _shows_call_ids(renderer)

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        tools = None if self._tool is None else [SEARCH_TOOL]  # every declaration has the same argument
        try:
            parsed = self._renderer.parse_response(list(sampled_tokens), tools=tools, prompt_ids=list(prompt_tokens))
        except Exception as error:  # renderers raise different errors on hostile output
            unread = MalformedCall(f"the turn could not be parsed ({type(error).__name__})")
            return "", FinalAnswer(None) if self._tool is None else unread
        content = parsed.content if isinstance(parsed.content, str) else ""
        if parsed.tool_calls and self._tool is not None:
            return content, _read_calls(parsed.tool_calls)
        return content, FinalAnswer(answer_after_prefix(content))

    def _append(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], content: str) -> list[int] | None:
        call_id = self._call_id(prompt_tokens, sampled_tokens) if self._has_call_ids else None
        rendered = self._renderer.bridge_to_next_turn(
            list(prompt_tokens), list(sampled_tokens), [_result(call_id, content)], tools=self._tools
        )
        before = [*prompt_tokens, *sampled_tokens]
        if rendered is None or rendered.token_ids[: len(before)] != before:
            return None
        return rendered.token_ids[len(before) :]

    def _call_id(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> str | None:
        """The model's id of its call, for formats whose results refer to it."""
        try:
            parsed = self._renderer.parse_response(
                list(sampled_tokens), tools=self._tools, prompt_ids=list(prompt_tokens)
            )
        except Exception:  # an unparsable turn has no call id
            return None
        return next((call.id for call in parsed.tool_calls if call.id), None)

    def write_call(self, queries: Sequence[str]) -> list[int]:
        called = _call([self._plain.defuse(query) for query in queries])
        return self._write(called, "I should search for this.", _result(_CALL_ID, "?"))

    def _written(self, answer: str) -> str:
        return f"Answer: {answer}"

    def write_answer(self, answer: str) -> list[int]:
        message: Message = {"role": "assistant", "content": self._written(self._plain.defuse(answer))}
        return self._write(message, "I can answer this now.", _ASKED)

    def _write(self, message: Message, thought: str, following: Message) -> list[int]:
        """Tokens that the model would sample for this message: everything after the generation prompt, with its stop token.

        Args:
            thought: reasoning, for formats whose prompt opens a thought that cannot be empty.
            following: next message, for formats in which only that ends a message.
        """
        for written in (message, cast(Message, {**message, "reasoning_content": thought})):
            for behind in ((), (following,)):
                whole = self._renderer.render_ids([_ASKED, written, *behind])
                tokens = whole[len(self._empty_prompt) :]
                ends = [place for place, token in enumerate(tokens) if token in self.stop]
                if whole[: len(self._empty_prompt)] == self._empty_prompt and ends:
                    return tokens[: ends[0] + 1]
        raise ModelError("demonstrations cannot be rendered in this model's chat format: disable the warm-up")


_ASKED: Message = {"role": "user", "content": "?"}
_CALL_ID = "functions.search:0"
"""First call id in the format of Kimi's models; other formats do not show it."""


def _call(queries: Sequence[str]) -> Message:
    function: Any = {"name": "search", "arguments": {"query_list": list(queries)}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": _CALL_ID, "function": function}],
    }


def _result(call_id: str | None, content: str) -> Message:
    message: Message = {"role": "tool", "name": "search", "content": content}
    if call_id is not None:
        message["tool_call_id"] = call_id
    return message


def _shows_call_ids(renderer: Renderer) -> bool:
    """Whether tool results refer to call ids."""
    asked = [_ASKED, _call(["?"])]
    return renderer.render_ids([*asked, _result(_CALL_ID, "?")]) != renderer.render_ids(
        [*asked, _result("functions.search:1", "?")]
    )


def _read_calls(calls: Sequence[Any]) -> Reading:
    """Queries of all valid calls; malformed if there are none."""
    queries: list[str] = []
    problem = "the call is empty"
    for call in calls:
        if call.status is not ToolCallParseStatus.OK:
            problem = f"the call is not valid ({str(call.status).replace('_', ' ')})"
        elif call.name != "search":
            problem = "there is no such tool: the only one is search"
        elif not isinstance(call.arguments, dict) or "query_list" not in call.arguments:
            problem = "the argument query_list is missing"
        else:
            given = call.arguments["query_list"]
            given = [given] if isinstance(given, str) else given
            if not isinstance(given, list) or not given or not all(isinstance(query, str) for query in given):
                problem = "query_list is no list of strings"
            elif not all(query.strip() for query in given):
                problem = "an empty query"
            else:
                queries.extend(query.strip() for query in given)
    return SearchRequest(tuple(queries)) if queries else MalformedCall(problem)


FORMATS = ("hermes", "tags")


def check_format(name: str) -> None:
    """Raises :class:`ModelError` for an unknown tool-call format."""
    if name not in FORMATS:
        raise ModelError(f"unknown tool-call format {name!r}: choose one of {', '.join(FORMATS)}")


def make_dialect(
    format_name: str,
    model_name: str,
    tokenizer: Any,
    *,
    renderer_name: str | None = None,
    thinking: Thinking = None,
    instructions: str | None = None,
    method: Method = "search",
) -> Dialect:
    """Makes the dialect for a model."""
    check_format(format_name)
    if method not in METHODS:
        raise ModelError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if method == "recipe":
        check_recipe(format_name, instructions)
    tokenizer = RememberingTokenizer(tokenizer)
    renderer = select_renderer(model_name, tokenizer, renderer_name, thinking)
    if method == "recipe":
        return HermesDialect(renderer, tokenizer, *load_recipe_prompt(), recipe_results)
    kind = TagsDialect if format_name == "tags" else HermesDialect
    tool = None if method in WITHOUT_TOOL else SEARCH_TOOL
    return kind(renderer, tokenizer, instructions or INSTRUCTIONS[format_name, method], tool)


def check_recipe(format_name: str, instructions: str | None) -> None:
    """Refuses settings that conflict with the recipe's prompt."""
    if format_name != "hermes" or instructions is not None:
        raise ModelError(
            'the method "recipe" has the recipe\'s own prompt, which requests <tool_call> JSON and "Answer:": use the format '
            '"hermes", and leave instructions out'
        )
    load_recipe_prompt()
