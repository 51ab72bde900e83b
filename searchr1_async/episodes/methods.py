"""Prompting methods: with the search tool, and baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.types import Passage, Question, SearchCall

Method = Literal["search", "direct", "rag", "recipe"]
"""Prompting method.

- ``search``: multi-turn, with the search tool.
- ``direct``: without a tool; one turn, from the model's own knowledge.
- ``rag``: plain retrieval-augmented generation: one search for the question itself, with its passages in the prompt; one turn.
- ``recipe``: with the search tool and the original recipe's prompt (``tinker_cookbook.recipes.search_tool``), verbatim from
  the installed package. Requires the format ``hermes``.
"""

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
