"""The ways in which a model is asked: with the search tool, and the baselines that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.types import Passage, Question, SearchCall

Method = Literal["search", "direct", "rag", "recipe"]
"""How a question is put to a model.

- ``search``: with the search tool, which the model calls as it sees fit, turn by turn.
- ``direct``: without a tool; it answers at once from what it knows. One turn.
- ``rag``: plain retrieval-augmented generation. One search with the question itself, whose passages stand in the prompt; then
  it answers at once. One turn.
- ``recipe``: with the search tool, and with the prompt of the ancestor recipe (``tinker_cookbook.recipes.search_tool``), word
  for word, from the installed package. It asks for calls as JSON and for "Answer:", so it needs the format ``hermes``.
"""

METHODS: tuple[Method, ...] = get_args(Method)

WITHOUT_TOOL: tuple[Method, ...] = ("direct", "rag")
"""Methods in which the model has no tool to call: its first turn is its last."""

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
"""The system prompt of each tool-call format and method; that of ``recipe`` is read from the recipe."""


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
"""Worked examples that stand before the question where there is no tool; their passages where passages are given.

Told in words alone, in the system prompt or behind the question, SmolLM2-135M-Instruct kept to either format for 0 of 18
questions, so that the baseline would have measured that; with these examples for 18 (``hermes``) and 16 (``tags``)."""


def limits_for(method: Method, limits: EpisodeLimits) -> EpisodeLimits:
    """The limits of a method's episodes: without a tool there is one turn, whatever ``limits`` say."""
    return replace(limits, max_turns=1) if method in WITHOUT_TOOL else limits
