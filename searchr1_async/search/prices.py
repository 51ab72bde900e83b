"""Known embedding prices."""

from __future__ import annotations

from dataclasses import dataclass

from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.embedders.sentence_transformer import SentenceTransformerEmbedder

BYTES_PER_TOKEN = 4
"""UTF-8 bytes per token of English text; an estimate, since tokenizers differ."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million input tokens."""

    dollars: float
    as_of: str
    """Month of the lookup."""

    def cost(self, tokens: int) -> float:
        """US dollars."""
        return self.dollars * tokens / 1e6


_PRICES = {"gemini-embedding-001": Price(0.15, "2025-07")}
"""List prices by model, without discounts for batch jobs or free quotas."""


def price_of(embedder: Embedder) -> Price | None:
    """The price of an embedder's tokens: 0 if it runs locally, None if unknown."""
    if isinstance(embedder, SentenceTransformerEmbedder):
        return Price(0.0, "")
    return _PRICES.get(embedder.name.partition(" (")[0])


def estimated_cost(tokens: int, price: Price | None) -> str:
    """Describes the estimate, its basis, and the date of the price."""
    words = f"about {tokens:,} tokens (bytes of UTF-8 / {BYTES_PER_TOKEN})"
    if price is None:
        return f"{words}, at an unknown price"
    if not price.dollars:
        return f"{words}, free on this machine"
    return f"{words}, about ${price.cost(tokens):,.2f} at ${price.dollars:g} per million (list price of {price.as_of})"
