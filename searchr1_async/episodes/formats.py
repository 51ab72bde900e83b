"""Tool-call formats: how a model requests a search, reads its results and answers. Token-exact.

A :class:`Dialect` renders the first prompt, parses sampled turns, and produces the tokens appended *after* them. Sampled tokens
are never re-rendered, so the prompt of turn n + 1 is exactly prompt n + sampled n + appended n.

``hermes`` uses ``<tool_call>`` JSON and tool messages, framed by a renderer of the ``renderers`` package (or ours, for plain
ChatML). ``tags`` is the format of Search-R1 (Jin et al., 2025, https://arxiv.org/abs/2503.09516): the whole episode is one
assistant message, with results inserted after ``</search>``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from renderers import Message, Renderer, ToolCallParseStatus, ToolSpec

from searchr1_async.episodes.prompts import (
    INSTRUCTIONS,
    METHODS,
    WITHOUT_TOOL,
    Method,
    PlainText,
    load_recipe_prompt,
    passage_lines,
    prefixed,
    query_blocks,
    recipe_results,
    tagged,
    with_tool,
    without_tool,
)
from searchr1_async.episodes.rendering import RememberingTokenizer, select_renderer
from searchr1_async.episodes.reward import answer_after_prefix
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


class Dialect(Protocol):
    """A tool-call format in a model's chat format. Methods are pure."""

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> list[int] | list[str]:
        """Stop tokens or strings for Tinker's ``stop`` sampling parameter."""
        ...

    def start(self, question: Question, given: SearchCall | None = None) -> list[int]:
        """Tokens of the first prompt, with the passages of ``given`` before the question."""
        ...

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        """A turn's text without chat markup and reasoning, and its parsed intent. Never raises on model output."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of sampled tokens, markup included."""
        ...

    def extend(
        self,
        prompt_tokens: Sequence[int],
        sampled_tokens: Sequence[int],
        queries: Sequence[str],
        results: Sequence[Sequence[Passage]],
    ) -> list[int] | None:
        """Tokens to append after a sampled turn to show its results; None if the chat format cannot."""
        ...

    def tell(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], problem: str) -> list[int] | None:
        """Like :meth:`extend`, to report an invalid call."""
        ...

    def write_call(self, queries: Sequence[str]) -> list[int]:
        """Tokens of a turn with these queries, as the model would sample it (for demonstrations)."""
        ...

    def write_answer(self, answer: str) -> list[int]:
        """Tokens of a turn with this answer, as the model would sample it (for demonstrations)."""
        ...


class TagsDialect:
    """Search-R1's tags within one assistant message.

    Args:
        instructions: system prompt.
        has_tool: whether calls are parsed; if not, every turn is an answer.
    """

    name = "tags"
    stop: list[int] | list[str]

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: Any,
        instructions: str = INSTRUCTIONS["tags", "search"],
        *,
        has_tool: bool = True,
    ) -> None:
        self._renderer, self._tokenizer, self._instructions = renderer, tokenizer, instructions
        self._has_tool = has_tool
        self._plain = PlainText.of(tokenizer)
        self._stop_tokens = frozenset(renderer.get_stop_token_ids())
        # Services may ignore end-of-text tokens when given stop strings, so their texts are listed too.
        tags = ["</search>", "</answer>"] if has_tool else ["</answer>"]
        self.stop = [*tags, *(tokenizer.decode([token]) for token in renderer.get_stop_token_ids())]

    def start(self, question: Question, given: SearchCall | None = None) -> list[int]:
        if not self._has_tool:
            messages = without_tool(self._plain, self._instructions, question, given, tagged)
        else:
            messages = with_tool(self._plain, self._instructions, question)
        return self._renderer.render_ids(messages, add_generation_prompt=True)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        kept = [token for token in sampled_tokens if token not in self._stop_tokens]
        text = self._tokenizer.decode(kept)
        content = text.rpartition("</think>")[2].strip()
        return content, read_tags(content) if self._has_tool else FinalAnswer(_tagged_answer(content))

    def extend(
        self,
        prompt_tokens: Sequence[int],
        sampled_tokens: Sequence[int],
        queries: Sequence[str],
        results: Sequence[Sequence[Passage]],
    ) -> list[int] | None:
        found = "\n".join(passage_lines(self._plain, passages) for passages in results)
        return self._append(sampled_tokens, f"\n<information>{found}</information>\n")

    def tell(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], problem: str) -> list[int] | None:
        return self._append(sampled_tokens, f"\n<information>That call was not valid: {problem}.</information>\n")

    def _append(self, sampled_tokens: Sequence[int], text: str) -> list[int] | None:
        if any(token in self._stop_tokens for token in sampled_tokens):
            return None  # the message is closed, so nothing can be inserted
        return self._plain.encode(text)

    def write_call(self, queries: Sequence[str]) -> list[int]:
        return self._plain.encode(f"<search>{self._plain.defuse(queries[0])}</search>")

    def write_answer(self, answer: str) -> list[int]:
        return self._plain.encode(tagged(self._plain.defuse(answer)))


def read_tags(content: str) -> Reading:
    """Parses a turn in tags format: the last complete tag decides; unfinished or blank calls are malformed. Linear time."""
    search_end, answer_end = content.rfind("</search>"), content.rfind("</answer>")
    if search_end > answer_end:
        start = content.rfind("<search>", 0, search_end)
        if start < 0:
            return MalformedCall("</search> without <search>")
        query = content[start + len("<search>") : search_end].strip()
        return SearchRequest((query,)) if query else MalformedCall("an empty query")
    if answer_end >= 0:
        return FinalAnswer(_tagged_answer(content))
    if "<search>" in content:
        return MalformedCall("<search> without </search>")
    return FinalAnswer(None)


def _tagged_answer(content: str) -> str | None:
    end = content.rfind("</answer>")
    start = content.rfind("<answer>", 0, max(end, 0))
    return content[start + len("<answer>") : end].strip() or None if start >= 0 else None


class HermesDialect:
    """Hermes JSON calls and tool messages, framed by a renderer.

    Args:
        instructions: system prompt.
        tool: tool declaration; None for no tool: every turn is an answer.
        layout: formats queries and their passages.
    """

    name = "hermes"
    stop: list[int] | list[str]

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: Any,
        instructions: str = INSTRUCTIONS["hermes", "search"],
        *,
        tool: ToolSpec | None = SEARCH_TOOL,
        layout: Callable[[PlainText, Sequence[str], Sequence[Sequence[Passage]]], str] = query_blocks,
    ) -> None:
        self._renderer, self._tokenizer, self._instructions = renderer, tokenizer, instructions
        # In the envelope that chat templates expect: those of Qwen and Llama print it verbatim.
        self._tools = None if tool is None else [cast(ToolSpec, {"type": "function", "function": tool})]
        self._layout = layout
        self._plain = PlainText.of(tokenizer)
        self.stop = renderer.get_stop_token_ids()
        self._empty_prompt = renderer.render_ids([_ASKED], add_generation_prompt=True)
        self._has_call_ids = _shows_call_ids(renderer)

    def start(self, question: Question, given: SearchCall | None = None) -> list[int]:
        if self._tools is None:
            messages = without_tool(self._plain, self._instructions, question, given, prefixed)
        else:
            messages = with_tool(self._plain, self._instructions, question)
        return self._renderer.render_ids(messages, tools=self._tools, add_generation_prompt=True)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        tools = None if self._tools is None else [SEARCH_TOOL]  # every declaration has the same argument
        try:
            parsed = self._renderer.parse_response(list(sampled_tokens), tools=tools, prompt_ids=list(prompt_tokens))
        except Exception as error:  # renderers raise different errors on hostile output
            if self._tools is None:
                return "", FinalAnswer(None)
            return "", MalformedCall(f"the turn could not be parsed ({type(error).__name__})")
        content = parsed.content if isinstance(parsed.content, str) else ""
        if parsed.tool_calls and self._tools is not None:
            return content, _read_calls(parsed.tool_calls)
        return content, FinalAnswer(answer_after_prefix(content))

    def extend(
        self,
        prompt_tokens: Sequence[int],
        sampled_tokens: Sequence[int],
        queries: Sequence[str],
        results: Sequence[Sequence[Passage]],
    ) -> list[int] | None:
        return self._bridge(prompt_tokens, sampled_tokens, self._layout(self._plain, queries, results))

    def tell(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], problem: str) -> list[int] | None:
        return self._bridge(prompt_tokens, sampled_tokens, f"That call was not valid: {problem}.")

    def _bridge(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], content: str) -> list[int] | None:
        message: Message = {"role": "tool", "name": "search", "content": content}
        if self._has_call_ids and (called := self._call_id(prompt_tokens, sampled_tokens)) is not None:
            message["tool_call_id"] = called
        rendered = self._renderer.bridge_to_next_turn(
            list(prompt_tokens), list(sampled_tokens), [message], tools=self._tools
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
        call: Any = {
            "type": "function",
            "id": _CALL_ID,
            "function": {
                "name": "search",
                "arguments": {"query_list": [self._plain.defuse(query) for query in queries]},
            },
        }
        result: Message = {"role": "tool", "name": "search", "tool_call_id": _CALL_ID, "content": "?"}
        return self._write(
            {"role": "assistant", "content": "", "tool_calls": [call]}, "I should search for this.", result
        )

    def write_answer(self, answer: str) -> list[int]:
        message: Message = {"role": "assistant", "content": prefixed(self._plain.defuse(answer))}
        return self._write(message, "I can answer this now.", _ASKED)

    def _write(self, message: Message, thought: str, following: Message) -> list[int]:
        """Tokens that the model would sample for this message: everything after the generation prompt, with its stop token.

        Args:
            thought: reasoning, for formats whose prompt opens a thought that cannot be empty.
            following: next message, for formats in which only that ends a message.

        Raises:
            ModelError: the format's generation prompt is not a prefix of the rendered message.
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


def _shows_call_ids(renderer: Renderer) -> bool:
    """Whether tool results refer to call ids."""
    call: Any = {"type": "function", "id": _CALL_ID, "function": {"name": "search", "arguments": {"query_list": ["?"]}}}
    asked: list[Message] = [_ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
    first, second = (
        renderer.render_ids([*asked, {"role": "tool", "name": "search", "tool_call_id": called, "content": "?"}])
        for called in (_CALL_ID, "functions.search:1")
    )
    return first != second


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
    """Makes the dialect for a model.

    Args:
        format_name: ``"hermes"`` or ``"tags"``.
        model_name: model name at the Tinker service; chooses the renderer.
        tokenizer: its Hugging Face tokenizer.
        renderer_name: a renderer of the ``renderers`` package, or ``"chatml"``; None chooses by model name.
        thinking: thinking mode; see :data:`~searchr1_async.models.Thinking`.
        instructions: system prompt; None uses the default of the format and method.
        method: prompting method; see :data:`~searchr1_async.episodes.prompts.Method`.

    Raises:
        ModelError: unknown format or method, no renderer for the model, unsupported ``thinking``, or, with ``recipe``, a missing
            recipe prompt or settings that conflict with it.
    """
    if format_name not in FORMATS:
        raise ModelError(f"unknown tool-call format {format_name!r}: choose one of {', '.join(FORMATS)}")
    if method not in METHODS:
        raise ModelError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if method == "recipe":
        check_recipe(format_name, instructions)
    tokenizer = RememberingTokenizer(tokenizer)
    renderer = select_renderer(model_name, tokenizer, renderer_name, thinking)
    if method == "recipe":
        recipe = load_recipe_prompt()
        return HermesDialect(renderer, tokenizer, recipe.instructions, tool=recipe.tool, layout=recipe_results)
    instructions = instructions or INSTRUCTIONS[format_name, method]
    has_tool = method not in WITHOUT_TOOL
    if format_name == "tags":
        return TagsDialect(renderer, tokenizer, instructions, has_tool=has_tool)
    return HermesDialect(renderer, tokenizer, instructions, tool=SEARCH_TOOL if has_tool else None)


def check_recipe(format_name: str, instructions: str | None) -> None:
    """Refuses settings that conflict with the recipe's prompt.

    Raises:
        ModelError: a format other than ``hermes``, custom instructions, or a missing recipe package.
    """
    if format_name != "hermes":
        raise ModelError(
            f'the prompt of the method "recipe" requests <tool_call> JSON and "Answer:", which the format {format_name!r} '
            f'cannot parse: use the format "hermes"'
        )
    if instructions is not None:
        raise ModelError('the method "recipe" uses the recipe\'s own prompt: leave instructions out')
    load_recipe_prompt()
