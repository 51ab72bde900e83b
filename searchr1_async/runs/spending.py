"""Tracks a run's tokens and cost, and decides when ``max_cost`` ends it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from searchr1_async.billing import Billing, Cost, TokenUsage, total_usage
from searchr1_async.errors import ConfigurationError
from searchr1_async.runs.checkpoints import ResumePoint
from searchr1_async.runs.estimate import CostEstimate


def check_max_cost(limit: float | None, billing: Billing) -> None:
    """Refuses a ``max_cost`` that is not above 0, or whose price is unknown."""
    if limit is None:
        return
    if not 0 < limit < math.inf:
        raise ConfigurationError(f"max_cost is {limit} US dollars: it must be above 0, or None for no limit")
    if not billing.is_free and billing.problem:
        raise ConfigurationError(f"max_cost needs a known price: {billing.problem}")


class Spending:
    """Tokens and cost of a run over all its sessions.

    All requested tokens count, those of evaluations and of dropped or cancelled groups too. What a killed session used after
    its last recorded step is lost.

    Args:
        billing: how the service bills the model.
        estimate: expected cost of the run, and of a step until one has finished.
        limit: US dollars, as ``max_cost`` of :func:`searchr1_async.train`; None: no limit.
        used: tokens of earlier sessions.
        spent: US dollars of earlier sessions; None if not recorded.
        dearest_step: US dollars of their most expensive step; None if there was none.
    """

    def __init__(
        self,
        billing: Billing,
        estimate: CostEstimate,
        *,
        limit: float | None = None,
        used: TokenUsage | None = None,
        spent: float | None = 0.0,
        dearest_step: float | None = None,
    ) -> None:
        self.estimate = estimate
        self._billing, self._limit = billing, limit
        self._before = used or TokenUsage()
        self._spent_before = billing.dollars(self._before) if spent is None else spent
        self._sources: list[Callable[[], TokenUsage]] = []
        self._dearest_step = dearest_step
        self._at_last_step: tuple[TokenUsage, float | None] = (self.tokens, self.dollars)

    def count(self, source: Callable[[], TokenUsage]) -> None:
        """Adds a source of this session's token usage."""
        self._sources.append(source)

    @property
    def _session(self) -> TokenUsage:
        return total_usage(source() for source in self._sources)

    @property
    def tokens(self) -> TokenUsage:
        return self._before + self._session

    @property
    def dollars(self) -> float | None:
        """US dollars of all sessions so far; None if a price is unknown."""
        dollars = self._billing.dollars(self._session)
        return None if dollars is None or self._spent_before is None else self._spent_before + dollars

    @property
    def cost(self) -> Cost:
        """Cost of all sessions so far."""
        return self._billing.cost_of(self.dollars, self.tokens)

    @property
    def is_billed(self) -> bool:
        """The service is not the embedded one."""
        return not self._billing.is_free

    def written_into(self, point: ResumePoint) -> ResumePoint:
        """The resume point with the tokens and cost so far."""
        return replace(point, tokens=self.tokens, dollars=self.dollars, dearest_step=self._dearest_step)

    def begin(self) -> None:
        """The session's first step starts: earlier usage belongs to no step."""
        self._at_last_step = (self.tokens, self.dollars)

    def step_recorded(self) -> dict[str, float]:
        """Metrics of a recorded step: usage since the previous step, and totals.

        ``cost/dollars`` and ``cost/total_dollars`` are left out if nothing is billed or a price is unknown.
        """
        tokens, dollars = self.tokens, self.dollars
        tokens_before, dollars_before = self._at_last_step
        self._at_last_step = (tokens, dollars)
        new = tokens - tokens_before
        metrics = {
            "cost/prompt_tokens": float(new.prompt),
            "cost/cached_prompt_tokens": float(new.cached),
            "cost/sampled_tokens": float(new.sampled),
            "cost/trained_tokens": float(new.trained),
        }
        if dollars is not None and dollars_before is not None and self.is_billed:
            own = dollars - dollars_before
            self._dearest_step = max(self._dearest_step or 0.0, own)
            metrics |= {"cost/dollars": own, "cost/total_dollars": dollars}
        return metrics

    def problem(self, to_come: TokenUsage) -> str | None:
        """Why no further step may start; None if one may.

        A step is expected to cost as much as the most expensive so far, the first as much as estimated.

        Args:
            to_come: usage that follows even without another step.
        """
        spent = self.dollars
        if self._limit is None or spent is None or not self.is_billed:
            return None
        step = self.estimate.dollars_per_step if self._dearest_step is None else self._dearest_step
        needed = (step or 0.0) + (self._billing.dollars(to_come) or 0.0)
        if spent < self._limit and spent + needed <= self._limit:
            return None
        amount = self._billing.amount
        return (
            f"the cost limit is near: {amount(spent)} of ${self._limit:,.2f} spent, and another step with its "
            f"evaluations may cost {amount(needed)}"
        )
