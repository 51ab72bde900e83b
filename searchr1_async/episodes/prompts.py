"""What a model is asked: the messages of the first prompt, by method, and the cleaning of everything untrusted in it.

A method is the search tool with its instructions, or a baseline (``direct``, ``rag``, ``recipe``). The prompt of ``recipe`` is read from
the source of the installed ``tinker_cookbook``: importing that would load Chroma's and Google's clients, pandas and a training loop.
Pure, but for that reading.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

from searchr1_async.config import EpisodeLimits, Method
from searchr1_async.episodes.types import Passage, Question, SearchCall
from searchr1_async.errors import ModelError

if TYPE_CHECKING:
    from renderers import Message, ToolSpec  # loads openai; a search needs none of it


@dataclass(frozen=True, slots=True)
class Tag:
    """A pair of tags in a model's text."""

    name: str

    @property
    def open(self) -> str:
        return f"<{self.name}>"

    @property
    def close(self) -> str:
        return f"</{self.name}>"

    def around(self, text: str) -> str:
        return f"<{self.name}>{text}</{self.name}>"


SEARCH, INFORMATION, ANSWER = Tag("search"), Tag("information"), Tag("answer")
TOOL_CALL, TOOL_RESPONSE, THINK = Tag("tool_call"), Tag("tool_response"), Tag("think")
TAGS = (SEARCH, INFORMATION, ANSWER, TOOL_CALL, TOOL_RESPONSE, THINK)
"""Markup of both formats, escaped in untrusted text."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """Encoder for untrusted text."""

    tokenizer: Any
    markup: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> PlainText:
        """For a Hugging Face tokenizer and its added tokens."""
        added = [str(token) for token in tokenizer.get_added_vocab()]
        words = sorted(
            {*added, *(text for tag in TAGS for text in (tag.open, tag.close))} - {""}, key=len, reverse=True
        )
        return cls(tokenizer, re.compile("|".join(map(re.escape, words))))

    def defuse(self, text: str) -> str:
        """Breaks every special token and tag with a space, so that a passage cannot end its message or fake a call."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no tokens
        return self.markup.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)

    def encode(self, text: str) -> list[int]:
        """Tokens of the text; untrusted parts must have been defused."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def query_blocks(plain: PlainText, queries: Sequence[str], results: Sequence[Sequence[Passage]]) -> str:
    """Formats each query with its passages below."""
    blocks = [
        f"Query: {plain.defuse(query)}\n{passage_lines(plain, passages)}"
        for query, passages in zip(queries, results, strict=True)
    ]
    return "\n\n".join(blocks)


def passage_lines(plain: PlainText, passages: Sequence[Passage]) -> str:
    """Formats passages with title and text, numbered if there are several."""
    lines = []
    for number, passage in enumerate(passages, 1):
        text = (
            f"{passage.title}: {passage.text}" if passage.title and passage.title not in passage.text else passage.text
        )
        text = " ".join(plain.defuse(text).split())
        lines.append(f"({number}) {text}" if len(passages) > 1 else text)
    return "\n".join(lines) if lines else "Nothing was found."


def all_passages(plain: PlainText, queries: Sequence[str], results: Sequence[Sequence[Passage]]) -> str:
    """Formats the passages of all queries, without the queries."""
    return "\n".join(passage_lines(plain, passages) for passages in results)


class RecipePrompt(NamedTuple):
    instructions: str
    """System prompt, verbatim."""
    tool: ToolSpec
    """Search tool as declared by the recipe, with its envelope."""


def load_recipe_prompt() -> RecipePrompt:
    """Loads the prompt of the installed recipe: a :class:`ModelError` if it is missing, or its version has no such prompt."""
    spec = importlib.util.find_spec("tinker_cookbook")  # locates the package without running it
    folders = [Path(place) / "recipes/search_tool" for place in (spec.submodule_search_locations or ())] if spec else []
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise ModelError(
            'the method "recipe" reads its prompt from the recipe\'s package, which is not installed: '
            "pip install 'searchr1_async[recipe]' (or, since it is only read, pip install --no-deps tinker-cookbook)"
        )
    try:
        return RecipePrompt(_instructions(folder / "search_env.py"), _tool(folder / "tools.py"))
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, StopIteration) as error:
        raise ModelError(
            f'the installed tinker_cookbook has no search prompt for the method "recipe" ({type(error).__name__}: {error}): '
            "pip install --no-deps tinker-cookbook==0.6.1 has one (it is read, not imported)"
        ) from error


def recipe_results(plain: PlainText, queries: Sequence[str], results: Sequence[Sequence[Passage]]) -> str:
    """Formats results as the recipe does: numbered documents on separate lines, title first."""
    lines: list[str] = []
    for query, passages in zip(queries, results, strict=True):
        lines.append(f"Query: {plain.defuse(query)}")
        for number, passage in enumerate(passages, 1):
            title = [passage.title] if passage.title and passage.title not in passage.text else []
            lines += [f"Document {number}:", *map(plain.defuse, [*title, passage.text])]
    return "".join(f"{line}\n" for line in lines)


def _instructions(file: Path) -> str:
    name, module = "SEARCH_TASK_INSTRUCTIONS", ast.parse(file.read_text(encoding="utf-8"))
    assigned = (node for node in module.body if isinstance(node, ast.Assign | ast.AnnAssign))
    found = next(node for node in assigned if ast.unparse(node).startswith((f"{name} =", f"{name}:")))
    text = ast.literal_eval(cast(ast.Assign, found).value)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is no text")
    return text


def _tool(file: Path) -> ToolSpec:
    """Tool declaration from the docstring and argument annotation, as pydantic builds the recipe's schema."""
    functions = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if hasattr(node, "args"))
    function: Any = next(node for node in functions if getattr(node, "name", "") == "search")
    annotation = next(arg.annotation for arg in function.args.args if arg.arg == "query_list")
    about, description = ast.literal_eval(annotation.slice.elts[-1]), ast.get_docstring(function, clean=False)
    if not isinstance(about, str) or not description:
        raise ValueError("search() is not described")
    values = {"description": about, "items": {"type": "string"}, "title": "Query List", "type": "array"}
    schema = {
        "properties": {"query_list": values},
        "required": ["query_list"],
        "title": "search_params",
        "type": "object",
    }
    tool = {"name": "search", "description": description, "parameters": schema}
    # Renderers accept both forms, but some print the tool verbatim, and the recipe includes the envelope.
    return cast("ToolSpec", {"type": "function", "function": tool})


METHODS: tuple[Method, ...] = get_args(Method)

WITHOUT_TOOL: tuple[Method, ...] = ("direct", "rag")
"""Single-turn methods without a tool."""

_TEXTS = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))
INSTRUCTIONS: Mapping[tuple[str, str], str] = {
    (format_name, method): text
    for format_name, methods in _TEXTS["instructions"].items()
    for method, text in methods.items()
}
"""System prompt per format and method; that of ``recipe`` is read from the recipe."""
EXAMPLES: tuple[tuple[Question, SearchCall], ...] = tuple(
    (
        Question(one["id"], one["question"], (one["answer"],)),
        SearchCall((one["question"],), (tuple(Passage(**passage) for passage in one["passages"]),)),
    )
    for one in _TEXTS["examples"]
)
"""Few-shot examples for methods without a tool, with passages if the question has some."""


def limits_for(method: Method, limits: EpisodeLimits) -> EpisodeLimits:
    """The method's limits: one turn for methods without a tool."""
    return replace(limits, max_turns=1) if method in WITHOUT_TOOL else limits


def with_tool(plain: PlainText, instructions: str, question: Question) -> list[Message]:
    """System prompt and question."""
    asked = plain.defuse(question.question)
    return [{"role": "system", "content": instructions}, {"role": "user", "content": asked}]


def without_tool(
    plain: PlainText, instructions: str, question: Question, given: SearchCall | None, answer: Callable[[str], str]
) -> list[Message]:
    """System prompt, worked examples and question, with passages if the question has some."""

    def asked(question: Question, given: SearchCall | None) -> Message:
        text = f"Question: {plain.defuse(question.question)}"
        if given is not None:
            found = [passage for passages in given.results for passage in passages]
            text = f"{passage_lines(plain, found)}\n\n{text}"
        return {"role": "user", "content": text}

    messages: list[Message] = [{"role": "system", "content": instructions}]
    for example, found in EXAMPLES:
        messages.append(asked(example, None if given is None else found))
        messages.append({"role": "assistant", "content": answer(example.golden_answers[0])})
    return [*messages, asked(question, given)]


MAX_QUERY_CHARACTERS = 2_000
_ASCII_CONTROLS = {code: " " for code in (*range(0x20), 0x7F)}


def clean_query(text: str) -> str | None:
    """The query as it is sent, or None if the call is malformed.

    Control characters and runs of whitespace become one space; lone surrogates and other code points that are not text
    (unassigned, private, non-characters) are dropped. Refuses queries without any letter, digit or symbol, and those of more
    than 2,000 characters.
    """
    if len(text) > 4 * MAX_QUERY_CHARACTERS:
        return None
    # Fast path: most queries are ASCII.
    kept = text.translate(_ASCII_CONTROLS) if text.isascii() else "".join(map(_clean_character, text))
    cleaned = " ".join(kept.split())
    if len(cleaned) > MAX_QUERY_CHARACTERS:
        return None
    if not any(unicodedata.category(character)[0] in "LNS" for character in cleaned):
        return None
    return cleaned


def _clean_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cc" or category[0] == "Z":
        return " "
    # Format characters (Cf) stay: many scripts need joiners and direction marks.
    return "" if category in {"Cs", "Cn", "Co"} else character
