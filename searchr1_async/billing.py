"""Tokens by kind, and what they cost: prices, the bill of a service, estimates, and what a run has spent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError
from searchr1_async.models import Price, find_price


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens a service was asked to process, by kinds that have a price."""

    prompt: int = 0
    """Prompt tokens for sampling: the whole prompt of every turn of every sample."""
    cached: int = 0
    """The part of ``prompt`` billed as prefix-cache hits."""
    sampled: int = 0
    """Tokens the model generated."""
    trained: int = 0
    """Input tokens of forward-backward passes, prompt and answer alike; an input lacks its example's last token."""

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __sub__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))

    def __str__(self) -> str:
        return (
            f"{self.prompt:,} prompt tokens ({self.cached:,} of them cached), {self.sampled:,} sampled and "
            f"{self.trained:,} trained tokens"
        )


def total_usage(usages: Iterable[TokenUsage]) -> TokenUsage:
    """Sum of usages."""
    return sum(usages, start=TokenUsage())


def prompt_lengths(episode: Episode) -> Iterator[int]:
    """Prompt tokens of each turn."""
    length = len(episode.prompt_tokens)
    for turn in episode.turns:
        yield length
        length += len(turn.sampled_tokens) + len(turn.appended_tokens)


def sampling_usage(episode: Episode) -> TokenUsage:
    """Usage of an episode's recorded turns, without a failed or cancelled turn."""
    return TokenUsage(
        prompt=sum(prompt_lengths(episode)),
        cached=sum(turn.cached_prompt_tokens for turn in episode.turns),
        sampled=episode.action_token_count,
    )


CACHED_PREFILL_DISCOUNT = 0.8
"""Discount on the prefill price for cached prompt prefixes (2026-10-07)."""

_TINKER_HOSTS = ("thinkingmachines.dev", "thinkingmachines.ai")


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of tokens."""

    dollars: float | None
    """US dollars; None if the price is unknown."""
    tokens: TokenUsage
    """The tokens counted, by kind."""
    text: str
    """Short text: ``$1.23``, ``nothing: this machine``, ``unknown``."""
    note: str
    """The prices behind the figure, or why there is none."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Billing:
    """How a service bills a model's tokens."""

    price: Price | None = None
    """None if nothing is billed, or if the price is unknown."""
    is_free: bool = False
    """The model runs in the embedded service on this machine."""
    reason: str = ""
    """Why the price is unknown; else empty."""

    @property
    def problem(self) -> str:
        """Why the cost of training is unknown; else empty."""
        if self.price is not None and self.price.train is None:
            return "only the price of sampling is known, not that of training"
        return self.reason

    def dollars(self, tokens: TokenUsage) -> float | None:
        """US dollars for these tokens; None if a price they need is unknown."""
        if self.is_free:
            return 0.0
        price = self.price
        if price is None or (price.train is None and tokens.trained):
            return None
        prefilled = tokens.prompt - CACHED_PREFILL_DISCOUNT * tokens.cached
        return (price.prefill * prefilled + price.sample * tokens.sampled + (price.train or 0.0) * tokens.trained) / 1e6

    def cost(self, tokens: TokenUsage) -> Cost:
        """The cost of these tokens."""
        return self.cost_of(self.dollars(tokens), tokens)

    def cost_of(self, dollars: float | None, tokens: TokenUsage) -> Cost:
        """The cost of tokens whose dollars are already known, since a run's sessions may have had different prices."""
        if self.is_free:
            return Cost(0.0, tokens, "nothing: this machine", "The model runs in the embedded service on this machine.")
        if dollars is None:
            return Cost(None, tokens, "unknown", self.problem or "earlier sessions did not record their usage")
        return Cost(dollars, tokens, amount(dollars), self.note)

    @property
    def note(self) -> str:
        """The prices used, in one or two sentences; empty if unknown."""
        price = self.price
        if price is None:
            return ""
        train = "" if price.train is None else f", training ${price.train:g}"
        source = ", ".join(filter(None, [f"as of {price.as_of}" if price.as_of else "as given", price.remark]))
        return (
            f"Prefill ${price.prefill:g} (${price.prefill * (1 - CACHED_PREFILL_DISCOUNT):.3g} if cached), sampling "
            f"${price.sample:g}{train} per million tokens ({source}). A failed or cancelled request counts with its prompt at the "
            "full price. Checkpoint storage and the search are not included."
        )


def billing_of(model: str, *, is_embedded: bool, is_tinker: bool, price: Price | None = None) -> Billing:
    """How a service bills a model.

    Args:
        model: the service's name, ``:peft:`` suffix included: each variant has its own price.
        is_embedded: it runs on this machine, for free.
        is_tinker: it runs in Tinker's cloud, at the table's prices.
        price: the user's price, which overrides the table.
    """
    if is_embedded:
        return Billing(is_free=True)
    if price is not None:
        return Billing(price)
    if not is_tinker:
        return Billing(reason=f"the price of {model} on this server is unknown: pass price=Price(...)")
    found = find_price(model)
    return Billing(found, reason="" if found else f"the price of {model} is unknown: pass price=Price(...)")


def is_tinker_host(host: str | None) -> bool:
    """Whether a host (None: the SDK's default) belongs to Tinker's cloud."""
    return host is None or any(host == name or host.endswith(f".{name}") for name in _TINKER_HOSTS)


def amount(dollars: float) -> str:
    """``$1.23``."""
    return f"${dollars:,.2f}" if dollars >= 0.1 or not dollars else f"${dollars:.2g}"


def check_max_cost(limit: float | None, billing: Billing) -> None:
    """Refuses a ``max_cost`` where the price is unknown."""
    if limit is not None and not billing.is_free and billing.problem:
        raise ConfigurationError(f"max_cost needs a known price: {billing.problem}")


class Spending:
    """Tokens and cost of a run over all its sessions.

    All requested tokens count, those of evaluations and of dropped or cancelled groups too. What a killed session used after
    its last recorded step is lost.

    Args:
        billing: how the service bills the model.
        step_dollars: expected US dollars of a step, until one has finished; None if unknown.
        limit: US dollars, as ``max_cost`` of :func:`searchr1_async.train`; None: no limit.
        used: tokens of earlier sessions.
        spent: US dollars of earlier sessions; None if not recorded.
        dearest_step: US dollars of their most expensive step; None if there was none.
    """

    def __init__(
        self,
        billing: Billing,
        step_dollars: float | None,
        *,
        limit: float | None = None,
        used: TokenUsage | None = None,
        spent: float | None = 0.0,
        dearest_step: float | None = None,
    ) -> None:
        self._billing, self._step_dollars, self._limit = billing, step_dollars, limit
        self._before = used or TokenUsage()
        self._spent_before = billing.dollars(self._before) if spent is None else spent
        self._sources: list[Callable[[], TokenUsage]] = []
        self._dearest_step = dearest_step
        self.begin()

    def count(self, source: Callable[[], TokenUsage]) -> None:
        """Adds a source of this session's token usage."""
        self._sources.append(source)

    def begin(self) -> None:
        """The session's first step starts: earlier usage belongs to no step."""
        self._at_last_step = self.cost

    @property
    def cost(self) -> Cost:
        """Cost of all sessions so far."""
        session = total_usage(source() for source in self._sources)
        dollars = self._billing.dollars(session)
        total = None if dollars is None or self._spent_before is None else self._spent_before + dollars
        return self._billing.cost_of(total, self._before + session)

    @property
    def is_billed(self) -> bool:
        """The service is not the embedded one."""
        return not self._billing.is_free

    def as_fields(self) -> dict[str, Any]:
        """The tokens and cost so far, as fields of a resume point."""
        cost = self.cost
        return {"tokens": cost.tokens, "dollars": cost.dollars, "dearest_step": self._dearest_step}

    def step_recorded(self) -> dict[str, float]:
        """Metrics of a recorded step: usage since the previous step, and totals.

        ``cost/dollars`` and ``cost/total_dollars`` are left out if nothing is billed or a price is unknown.
        """
        before, now = self._at_last_step, self.cost
        self._at_last_step = now
        new = now.tokens - before.tokens
        metrics = {
            "cost/prompt_tokens": float(new.prompt),
            "cost/cached_prompt_tokens": float(new.cached),
            "cost/sampled_tokens": float(new.sampled),
            "cost/trained_tokens": float(new.trained),
        }
        if now.dollars is not None and before.dollars is not None and self.is_billed:
            own = now.dollars - before.dollars
            self._dearest_step = max(self._dearest_step or 0.0, own)
            metrics |= {"cost/dollars": own, "cost/total_dollars": now.dollars}
        return metrics

    def problem(self, to_come: TokenUsage) -> str | None:
        """Why no further step may start; None if one may.

        A step is expected to cost as much as the most expensive so far, the first as much as estimated.

        Args:
            to_come: usage that follows even without another step.
        """
        spent = self.cost.dollars
        if self._limit is None or spent is None or not self.is_billed:
            return None
        step = self._step_dollars if self._dearest_step is None else self._dearest_step
        needed = (step or 0.0) + (self._billing.dollars(to_come) or 0.0)
        if spent < self._limit and spent + needed <= self._limit:
            return None
        return (
            f"the cost limit is near: {amount(spent)} of ${self._limit:,.2f} spent, and another step with its "
            f"evaluations may cost {amount(needed)}"
        )


@dataclass(frozen=True, slots=True, repr=False)
class CostEstimate:
    """Estimated cost of a run, shown as text."""

    dollars: float | None
    """Expected US dollars; None if the price is unknown."""
    dollars_per_step: float | None
    """Expected, for training only: without the warm-up and evaluations."""
    tokens: TokenUsage
    """Expected, by kind."""
    steps: int
    """Optimizer steps."""
    assumptions: tuple[str, ...]
    """The assumptions, as sentences."""
    text: str
    """One-line summary."""

    def __str__(self) -> str:
        return "\n".join([f"Estimated cost: {self.text}.", *(f"  - {sentence}" for sentence in self.assumptions)])

    __repr__ = __str__
