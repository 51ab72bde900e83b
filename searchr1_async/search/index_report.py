"""Outcome of an index build."""

from __future__ import annotations

from dataclasses import dataclass

from searchr1_async.search.prices import Price, estimated_cost

RECALL_WITHIN = 10
"""A passage is found if it is among so many nearest neighbours of its own vector."""
RECALL_BOUND = 0.95
"""Below this sample recall the store's graph loses passages, and a warning is emitted."""


@dataclass(frozen=True, slots=True)
class IndexReport:
    """Outcome of :func:`~searchr1_async.search.building.build_index`."""

    store: str
    """Name and place of the index."""
    passages: int
    """In the corpus and the index."""
    embedded: int
    """By this call; the others existed before, or were in the journal of an interrupted build."""
    seconds: float
    tokens: int
    """Embedded by this call, estimated as UTF-8 bytes / 4."""
    price: Price | None
    """None if unknown."""
    recall: float | None
    """Share of the sample that is among the first 10 results for its own vector; None if nothing was added."""
    sample: int
    """Passages added by this call and looked up, at most 200."""

    @property
    def cost(self) -> float | None:
        """Estimated US dollars; None if the price is unknown."""
        return None if self.price is None else self.price.cost(self.tokens)

    @property
    def warning(self) -> str | None:
        """What is wrong with the index, or None."""
        if self.recall is None or self.recall >= RECALL_BOUND:
            return None
        return (
            f"only {self.recall:.1%} of {self.sample} passages of {self.store} are among the first {RECALL_WITHIN} results for "
            f"their own vector (expected at least {RECALL_BOUND:.0%}): the corpus has many duplicates, or the collection's "
            "graph is too sparse (raise ef_search, or rebuild it with more max_neighbors)"
        )

    def __str__(self) -> str:
        parts = [f"{self.passages:,} passages in {self.store}", f"{self.embedded:,} embedded in {self.seconds:,.1f} s"]
        if self.embedded:
            parts.append(estimated_cost(self.tokens, self.price))
        if self.recall is not None:
            parts.append(
                f"{self.recall:.1%} of {self.sample} passages are among the first {RECALL_WITHIN} results for their own vector"
            )
        return "; ".join(parts)
