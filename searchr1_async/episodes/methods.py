"""The ways in which a model is asked: with the search tool, and the baselines that it is compared with."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["search", "direct", "rag", "recipe"]
"""How a question is put to a model.

- ``search``: with the search tool, which the model calls as it sees fit, turn by turn.
- ``direct``: without a tool; it answers at once from what it knows. One turn.
- ``rag``: plain retrieval-augmented generation. One search with the question itself, whose passages stand in the prompt; then
  it answers at once. One turn.
- ``recipe``: with the search tool, and with the prompt of the ancestor recipe (``tinker_cookbook.recipes.search_tool``).
"""

METHODS: tuple[Method, ...] = get_args(Method)
