"""What embedding costs, as far as it is known."""

from __future__ import annotations

from dataclasses import dataclass

from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.embedders.sentence_transformer import SentenceTransformerEmbedder

BYTES_A_TOKEN = 4
"""Of UTF-8: what English comes to. An estimate: services count with tokenizers of their own."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for a million input tokens."""

    dollars: float
    as_of: str
    """The month in which the price was looked up."""

    def cost(self, tokens: int) -> float:
        """US dollars."""
        return self.dollars * tokens / 1e6


_PRICES = {"gemini-embedding-001": Price(0.15, "2025-07")}
"""By model; list prices without discounts for batch jobs or free quotas."""


def price_of(embedder: Embedder) -> Price | None:
    """The price of an embedder's tokens: 0 where it runs on this machine, None where it is not known."""
    if isinstance(embedder, SentenceTransformerEmbedder):
        return Price(0.0, "")
    return _PRICES.get(embedder.name.partition(" (")[0])


def estimated_cost(tokens: int, price: Price | None) -> str:
    """In words: the estimate, what it rests on, and how old the price is."""
    words = f"about {tokens:,} tokens (bytes of UTF-8 / {BYTES_A_TOKEN})"
    if price is None:
        return f"{words}, at a price that is not known here"
    if not price.dollars:
        return f"{words}, free of charge on this machine"
    return f"{words}, about ${price.cost(tokens):,.2f} at ${price.dollars:g} a million (list price of {price.as_of})"
