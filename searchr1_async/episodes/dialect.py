"""How a model asks for a search, reads its result and answers: the tool-call formats, token-exact.

A :class:`Dialect` turns a question into prompt tokens, reads a sampled turn, and gives the tokens that go *behind* it. It
never re-renders what was sampled, so the prompt of turn n + 1 is exactly prompt n + sampled n + appended n.

Two formats exist. ``hermes`` puts calls into ``<tool_call>`` JSON and results into tool messages, framed by a renderer of
the ``renderers`` package (or by ours, for plain ChatML). ``tags`` is Search-R1's own (Jin et al., 2025,
https://arxiv.org/abs/2503.09516): the whole episode is one assistant message, in which results are inserted after
``</search>``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from renderers import Message, Renderer, ToolCallParseStatus, ToolSpec, config_from_name, create_renderer
from renderers.base import MODEL_RENDERER_MAP

from searchr1_async.episodes.chatml import ChatMLRenderer
from searchr1_async.episodes.remembering import RememberingTokenizer
from searchr1_async.episodes.reward import answer_after_prefix
from searchr1_async.episodes.types import Passage, Question
from searchr1_async.errors import ModelError

HERMES_INSTRUCTIONS = (
    "You answer questions with the help of a search tool over an encyclopedia.\n"
    "Think about what you need to know, then call the tool with one or more queries. Read the passages it returns. "
    "Search again with better queries while something is missing, using what you have found. "
    'When you know the answer, write it after "Answer:" in one to five words.'
)
TAGS_INSTRUCTIONS = (
    "Answer the question. Search with <search>query</search>; "
    "what is found comes back in <information>. Then give the short answer: <answer>answer</answer>"
)

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
    """The turn tries to call a tool and cannot be understood; ``problem`` says why, in words."""

    problem: str


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """The turn calls nothing; ``answer`` is None where it gives no answer either."""

    answer: str | None


Reading = SearchRequest | MalformedCall | FinalAnswer


class Dialect(Protocol):
    """One tool-call format in one model's chat format. Methods are pure functions of their arguments."""

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> list[int] | list[str]:
        """What ends a turn, as Tinker's ``stop`` sampling parameter takes it."""
        ...

    def start(self, question: Question) -> list[int]:
        """The tokens of the first prompt."""
        ...

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        """What the turn says without chat markup and reasoning, and what it wants. Never raises on what a model wrote."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of sampled tokens, markup included."""
        ...

    def extend(
        self,
        prompt_tokens: Sequence[int],
        sampled_tokens: Sequence[int],
        queries: Sequence[str],
        results: Sequence[Sequence[Passage]],
    ) -> list[int] | None:
        """The tokens to append behind a sampled turn so that the next may begin; None where the chat format cannot."""
        ...

    def tell(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], problem: str) -> list[int] | None:
        """Like :meth:`extend`, telling the model what was wrong with its call."""
        ...

    def write_call(self, queries: Sequence[str]) -> list[int]:
        """The tokens of a turn that asks for these queries, as the model should sample it (for demonstrations)."""
        ...

    def write_answer(self, answer: str) -> list[int]:
        """The tokens of a turn that gives this answer, as the model should sample it (for demonstrations)."""
        ...


_MARKUP = tuple(
    f"<{slash}{tag}>"
    for tag in ("search", "information", "answer", "tool_call", "tool_response", "think")
    for slash in ("", "/")
)
"""Markup of both formats: defused wherever text that is not ours is shown to the model."""


@dataclass(frozen=True, slots=True)
class _Plain:
    """Encodes text that is not ours so that nothing in it can pass for markup."""

    tokenizer: Any
    markup: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> _Plain:
        added = [str(token) for token in tokenizer.get_added_vocab()]
        words = sorted({*added, *_MARKUP} - {""}, key=len, reverse=True)
        return cls(tokenizer, re.compile("|".join(map(re.escape, words))))

    def defuse(self, text: str) -> str:
        """The text with every special token and tag broken by a space: a passage cannot end its message or fake a call."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no tokens
        return self.markup.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _passage_lines(plain: _Plain, passages: Sequence[Passage]) -> str:
    """Passages as the model reads them: title and text, numbered only where there are several."""
    lines = []
    for number, passage in enumerate(passages, 1):
        text = (
            f"{passage.title}: {passage.text}" if passage.title and passage.title not in passage.text else passage.text
        )
        text = " ".join(plain.defuse(text).split())
        lines.append(f"({number}) {text}" if len(passages) > 1 else text)
    return "\n".join(lines) if lines else "Nothing was found."


class TagsDialect:
    """Search-R1's tags, inside one assistant message."""

    name = "tags"
    stop: list[int] | list[str]

    def __init__(self, renderer: Renderer, tokenizer: Any, instructions: str = TAGS_INSTRUCTIONS) -> None:
        self._renderer, self._tokenizer, self._instructions = renderer, tokenizer, instructions
        self._plain = _Plain.of(tokenizer)
        self._stop_tokens = frozenset(renderer.get_stop_token_ids())
        # The chat's own end still ends generation: a service adds its end-of-text tokens to stop strings only if told so,
        # hence their texts stand beside the tags.
        self.stop = ["</search>", "</answer>", *(tokenizer.decode([token]) for token in renderer.get_stop_token_ids())]

    def start(self, question: Question) -> list[int]:
        messages: list[Message] = [
            {"role": "system", "content": self._instructions},
            {"role": "user", "content": self._plain.defuse(question.question)},
        ]
        return self._renderer.render_ids(messages, add_generation_prompt=True)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        kept = [token for token in sampled_tokens if token not in self._stop_tokens]
        text = self._tokenizer.decode(kept)
        content = text.rpartition("</think>")[2].strip()
        return content, read_tags(content)

    def extend(
        self,
        prompt_tokens: Sequence[int],
        sampled_tokens: Sequence[int],
        queries: Sequence[str],
        results: Sequence[Sequence[Passage]],
    ) -> list[int] | None:
        found = "\n".join(_passage_lines(self._plain, passages) for passages in results)
        return self._append(sampled_tokens, f"\n<information>{found}</information>\n")

    def tell(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], problem: str) -> list[int] | None:
        return self._append(sampled_tokens, f"\n<information>That call was not valid: {problem}.</information>\n")

    def _append(self, sampled_tokens: Sequence[int], text: str) -> list[int] | None:
        if any(token in self._stop_tokens for token in sampled_tokens):
            return None  # the message is closed: nothing can be put inside it any more
        return self._plain.encode(text)

    def write_call(self, queries: Sequence[str]) -> list[int]:
        return self._plain.encode(f"<search>{self._plain.defuse(queries[0])}</search>")

    def write_answer(self, answer: str) -> list[int]:
        return self._plain.encode(f"<answer>{self._plain.defuse(answer)}</answer>")


def read_tags(content: str) -> Reading:
    """What a turn in the tags format wants: the last complete tag decides; an unfinished or blank one is malformed.

    Linear in the text's length, whatever the text.
    """
    search_end, answer_end = content.rfind("</search>"), content.rfind("</answer>")
    if search_end > answer_end:
        start = content.rfind("<search>", 0, search_end)
        if start < 0:
            return MalformedCall("</search> without <search>")
        query = content[start + len("<search>") : search_end].strip()
        return SearchRequest((query,)) if query else MalformedCall("an empty query")
    if answer_end >= 0:
        start = content.rfind("<answer>", 0, answer_end)
        answer = content[start + len("<answer>") : answer_end].strip() if start >= 0 else ""
        return FinalAnswer(answer or None)
    if "<search>" in content:
        return MalformedCall("<search> without </search>")
    return FinalAnswer(None)


class HermesDialect:
    """Hermes JSON calls and tool messages, framed by a renderer."""

    name = "hermes"
    stop: list[int] | list[str]

    def __init__(self, renderer: Renderer, tokenizer: Any, instructions: str = HERMES_INSTRUCTIONS) -> None:
        self._renderer, self._tokenizer, self._instructions = renderer, tokenizer, instructions
        self._plain = _Plain.of(tokenizer)
        self.stop = renderer.get_stop_token_ids()
        self._empty_prompt = renderer.render_ids([{"role": "user", "content": "?"}], add_generation_prompt=True)

    def start(self, question: Question) -> list[int]:
        messages: list[Message] = [
            {"role": "system", "content": self._instructions},
            {"role": "user", "content": self._plain.defuse(question.question)},
        ]
        return self._renderer.render_ids(messages, tools=[SEARCH_TOOL], add_generation_prompt=True)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        try:
            parsed = self._renderer.parse_response(
                list(sampled_tokens), tools=[SEARCH_TOOL], prompt_ids=list(prompt_tokens)
            )
        except Exception as error:  # renderers differ in what hostile output makes them raise
            return "", MalformedCall(f"the turn could not be parsed ({type(error).__name__})")
        content = parsed.content if isinstance(parsed.content, str) else ""
        if parsed.tool_calls:
            return content, _read_calls(parsed.tool_calls)
        return content, FinalAnswer(answer_after_prefix(content))

    def extend(
        self,
        prompt_tokens: Sequence[int],
        sampled_tokens: Sequence[int],
        queries: Sequence[str],
        results: Sequence[Sequence[Passage]],
    ) -> list[int] | None:
        blocks = [
            f"Query: {self._plain.defuse(query)}\n{_passage_lines(self._plain, passages)}"
            for query, passages in zip(queries, results, strict=True)
        ]
        return self._bridge(prompt_tokens, sampled_tokens, "\n\n".join(blocks))

    def tell(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], problem: str) -> list[int] | None:
        return self._bridge(prompt_tokens, sampled_tokens, f"That call was not valid: {problem}.")

    def _bridge(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int], content: str) -> list[int] | None:
        message: Message = {"role": "tool", "name": "search", "content": content}
        rendered = self._renderer.bridge_to_next_turn(
            list(prompt_tokens), list(sampled_tokens), [message], tools=[SEARCH_TOOL]
        )
        before = [*prompt_tokens, *sampled_tokens]
        if rendered is None or rendered.token_ids[: len(before)] != before:
            return None
        return rendered.token_ids[len(before) :]

    def write_call(self, queries: Sequence[str]) -> list[int]:
        call: Any = {
            "type": "function",
            "function": {
                "name": "search",
                "arguments": {"query_list": [self._plain.defuse(query) for query in queries]},
            },
        }
        return self._write({"role": "assistant", "content": "", "tool_calls": [call]})

    def write_answer(self, answer: str) -> list[int]:
        return self._write({"role": "assistant", "content": f"Answer: {self._plain.defuse(answer)}"})

    def _write(self, message: Message) -> list[int]:
        """What the model would sample for this message: everything behind the generation prompt, its stop token included."""
        whole = self._renderer.render_ids([{"role": "user", "content": "?"}, message])
        tokens = whole[len(self._empty_prompt) :]
        while tokens and tokens[-1] not in self.stop:
            tokens.pop()
        return tokens


def _read_calls(calls: Sequence[Any]) -> Reading:
    """All queries of all valid calls; malformed where no call is valid."""
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


FORMATS = ("hermes", "tags")


def make_dialect(
    format_name: str,
    model_name: str,
    tokenizer: Any,
    *,
    renderer_name: str | None = None,
    instructions: str | None = None,
) -> Dialect:
    """The dialect for a model.

    Args:
        format_name: ``"hermes"`` or ``"tags"``.
        model_name: as the Tinker service calls it; chooses the renderer.
        tokenizer: its Hugging Face tokenizer.
        renderer_name: a renderer of the ``renderers`` package, or ``"chatml"``; None chooses by the model's name.
        instructions: the system prompt; None is the format's own.

    Raises:
        ModelError: unknown format, or no renderer for the model.
    """
    if format_name not in FORMATS:
        raise ModelError(f"unknown tool-call format {format_name!r}: choose one of {', '.join(FORMATS)}")
    tokenizer = RememberingTokenizer(tokenizer)
    renderer = select_renderer(model_name, tokenizer, renderer_name)
    if format_name == "tags":
        return TagsDialect(renderer, tokenizer, instructions or TAGS_INSTRUCTIONS)
    return HermesDialect(renderer, tokenizer, instructions or HERMES_INSTRUCTIONS)
