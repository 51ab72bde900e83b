"""Messages of the first prompt. Pure."""

from __future__ import annotations

from collections.abc import Callable

from renderers import Message

from searchr1_async.episodes.methods import EXAMPLES
from searchr1_async.episodes.plain_text import PlainText, passage_lines
from searchr1_async.episodes.types import Question, SearchCall


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
