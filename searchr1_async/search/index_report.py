"""What building an index came to."""

from __future__ import annotations

from dataclasses import dataclass

from searchr1_async.search.prices import Price, estimated_cost

RECALL_WITHIN = 10
"""A passage counts as found among so many nearest ones to its own vector."""
RECALL_BOUND = 0.95
"""Of the sample; under it the graph of the store loses passages, and a warning says so. As this package makes it, Chroma's
graph found 99 % of a sample of 54,909 passages of Wikipedia."""


@dataclass(frozen=True, slots=True)
class IndexReport:
    """The outcome of :func:`~searchr1_async.search.building.build_index`."""

    store: str
    """Where the index is."""
    passages: int
    """In the corpus, and now in the index."""
    embedded: int
    """Of them, embedded by this call; the others were there before, or in the journal of an interrupted one."""
    seconds: float
    tokens: int
    """Embedded by this call, estimated: bytes of UTF-8 / 4."""
    price: Price | None
    """For a million tokens; None where it is not known."""
    recall: float | None
    """Share of the sample that is found by its own vector within the first 10; None where nothing was put in."""
    sample: int
    """Passages put in by this call and looked up, 200 at most."""

    @property
    def cost(self) -> float | None:
        """US dollars, estimated; None where the price is not known."""
        return None if self.price is None else self.price.cost(self.tokens)

    @property
    def warning(self) -> str | None:
        """What is wrong with the index, in words; None where nothing is."""
        if self.recall is None or self.recall >= RECALL_BOUND:
            return None
        return (
            f"only {self.recall:.1%} of {self.sample} passages of {self.store} are found within the first {RECALL_WITHIN} "
            f"by their own vector (at least {RECALL_BOUND:.0%} should be): the corpus holds many equal passages, or the "
            "collection's graph is too sparse (raise its ef_search, or make it anew with more max_neighbors)"
        )

    def __str__(self) -> str:
        parts = [f"{self.passages:,} passages in {self.store}", f"{self.embedded:,} embedded in {self.seconds:,.1f} s"]
        if self.embedded:
            parts.append(estimated_cost(self.tokens, self.price))
        if self.recall is not None:
            parts.append(
                f"{self.recall:.1%} of {self.sample} passages found within the first {RECALL_WITHIN} by their own vector"
            )
        return "; ".join(parts)
