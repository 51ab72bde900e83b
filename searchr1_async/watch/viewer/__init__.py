"""Episode viewer: in a notebook cell, in a terminal, and as one page over a whole run."""

from __future__ import annotations

from searchr1_async.watch.viewer.cell import (
    episode_html,
    episode_text,
    group_html,
    group_text,
)
from searchr1_async.watch.viewer.episodes_page import CellView, in_cell, load_tokenizer, page_of, view_run
from searchr1_async.watch.viewer.parts import remember_tokenizer, token_pieces

__all__ = [
    "CellView",
    "episode_html",
    "episode_text",
    "group_html",
    "group_text",
    "in_cell",
    "load_tokenizer",
    "page_of",
    "remember_tokenizer",
    "token_pieces",
    "view_run",
]
