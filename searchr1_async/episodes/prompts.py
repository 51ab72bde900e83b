"""What a model is asked: the messages of the first prompt, by method, and the cleaning of everything untrusted in it.

A method is the search tool with its instructions, or a baseline (``direct``, ``rag``, ``recipe``). The prompt of ``recipe`` is read from
the source of the installed ``tinker_cookbook``: importing that would load Chroma's and Google's clients, pandas and a training loop.
Pure, but for that reading.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from searchr1_async.config import EpisodeLimits, Method
from searchr1_async.episodes.types import Passage, Question, SearchCall
from searchr1_async.errors import ModelError

if TYPE_CHECKING:
    from renderers import Message, ToolSpec  # loads openai; a search needs none of it

_MARKUP = tuple(
    f"<{slash}{tag}>"
    for tag in ("search", "information", "answer", "tool_call", "tool_response", "think")
    for slash in ("", "/")
)
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
        words = sorted({*added, *_MARKUP} - {""}, key=len, reverse=True)
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


_PACKAGE = "tinker_cookbook"
_FOLDER = "recipes/search_tool"
_PROMPT = ("search_env.py", "SEARCH_TASK_INSTRUCTIONS")
_TOOL = ("tools.py", "search", "query_list")


@dataclass(frozen=True, slots=True)
class RecipePrompt:
    """The recipe's prompt and tool."""

    instructions: str
    """System prompt, verbatim."""
    tool: ToolSpec
    """Search tool as declared by the recipe, with its envelope."""


def load_recipe_prompt() -> RecipePrompt:
    """Loads the prompt of the installed recipe.

    Raises:
        ModelError: ``tinker_cookbook`` is not installed, or its version has no such prompt.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # locates the package without running it
    folders = [Path(place) / _FOLDER for place in (spec.submodule_search_locations or ())] if spec else []
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise ModelError(
            'the method "recipe" reads its prompt from the recipe\'s package, which is not installed: '
            "pip install 'searchr1_async[recipe]' (or, since it is only read, pip install --no-deps tinker-cookbook)"
        )
    try:
        return RecipePrompt(_constant(_parsed(folder, _PROMPT[0])), _tool(_parsed(folder, _TOOL[0])))
    except (OSError, SyntaxError, ValueError, LookupError) as error:
        raise ModelError(
            f'the installed tinker_cookbook has no search prompt for the method "recipe" ({error}): '
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


def _parsed(folder: Path, name: str) -> ast.Module:
    return ast.parse((folder / name).read_text(encoding="utf-8"), name)


def _constant(module: ast.Module) -> str:
    name = _PROMPT[1]
    for node in module.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = ast.literal_eval(cast(ast.Assign, node).value)
            if isinstance(value, str) and value.strip():
                return value
    raise LookupError(f"no text {name} in {_PROMPT[0]}")


def _tool(module: ast.Module) -> ToolSpec:
    """Tool declaration from the docstring and argument annotation, as pydantic builds the recipe's schema."""
    _, name, argument = _TOOL
    for node in ast.walk(module):
        if not isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef) or node.name != name:
            continue
        notes = {arg.arg: arg.annotation for arg in node.args.args}
        annotation, description = notes.get(argument), ast.get_docstring(node, clean=False)
        if description and isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
            about = ast.literal_eval(annotation.slice.elts[-1])
            if isinstance(about, str):
                return _declaration(name, description, argument, about)
    raise LookupError(f"no tool {name}({argument}) in {_TOOL[0]}")


def _declaration(name: str, description: str, argument: str, about: str) -> ToolSpec:
    title = argument.replace("_", " ").title()
    values = {"description": about, "items": {"type": "string"}, "title": title, "type": "array"}
    schema = {"properties": {argument: values}, "required": [argument], "title": f"{name}_params", "type": "object"}
    tool = {"name": name, "description": description, "parameters": schema}
    # Renderers accept both forms, but some print the tool verbatim, and the recipe includes the envelope.
    return cast("ToolSpec", {"type": "function", "function": tool})


METHODS: tuple[Method, ...] = get_args(Method)

WITHOUT_TOOL: tuple[Method, ...] = ("direct", "rag")
"""Single-turn methods without a tool."""

INSTRUCTIONS: Mapping[tuple[str, str], str] = {
    ("hermes", "search"): (
        "You answer questions with the help of a search tool over an encyclopedia.\n"
        "Think about what you need to know, then call the tool with one or more queries. Read the passages it returns. "
        "Search again with better queries while something is missing, using what you have found. "
        'When you know the answer, write it after "Answer:" in one to five words.'
    ),
    ("hermes", "direct"): (
        "You answer questions from what you know, in one to five words. "
        'Write "Answer:" and the answer, and nothing else.'
    ),
    ("hermes", "rag"): (
        "You answer questions in one to five words, with the help of the passages given. "
        'Write "Answer:" and the answer, and nothing else.'
    ),
    ("tags", "search"): (
        "Answer the question. Search with <search>query</search>; "
        "what is found comes back in <information>. Then give the short answer: <answer>answer</answer>"
    ),
    ("tags", "direct"): "Answer the question from what you know. Give only the short answer: <answer>answer</answer>",
    ("tags", "rag"): (
        "Answer the question with the help of the passages. Give only the short answer: <answer>answer</answer>"
    ),
}
"""System prompt per format and method; that of ``recipe`` is read from the recipe."""


EXAMPLES: tuple[tuple[Question, SearchCall], ...] = (
    (
        Question("example-1", "Which is the highest mountain on Earth?", ("Mount Everest",)),
        SearchCall(
            ("Which is the highest mountain on Earth?",),
            (
                (
                    Passage("e1", "Mount Everest", "The peak of Mount Everest is the highest point above sea level."),
                    Passage("e2", "K2", "K2 is second in height, and harder to climb."),
                ),
            ),
        ),
    ),
    (
        Question("example-2", "What colour is an emerald?", ("green",)),
        SearchCall(
            ("What colour is an emerald?",),
            ((Passage("e3", "Emerald", "An emerald is a gem, a beryl that chromium makes green."),),),
        ),
    ),
)
"""Few-shot examples for methods without a tool, with passages if the question has some. Without them, a small model (SmolLM2-135M)
does not follow either answer format at all."""


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
    """System prompt, worked examples and question, with passages if the question has some.

    Args:
        answer: formats an answer.
    """

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


def tagged(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def prefixed(answer: str) -> str:
    return f"Answer: {answer}"


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
