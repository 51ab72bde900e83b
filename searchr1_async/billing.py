"""Tokens by kind, and what they cost: fresh and cached prompt, sampled and trained tokens, each at its own price."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from searchr1_async.episodes.types import Episode
from searchr1_async.models import Price, known_prices


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

    @property
    def fresh(self) -> int:
        """Prompt tokens billed at the full price."""
        return self.prompt - self.cached

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.sampled + other.sampled,
            self.trained + other.trained,
        )

    def __sub__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.prompt - other.prompt,
            self.cached - other.cached,
            self.sampled - other.sampled,
            self.trained - other.trained,
        )

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
LAST_RISE = "2026-07-17"
"""Date of a price increase, mostly by half: an older price is no upper bound."""

_TINKER_HOSTS = ("thinkingmachines.dev", "thinkingmachines.ai")


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of tokens."""

    dollars: float | None
    """US dollars; None if the price is unknown."""
    tokens: TokenUsage
    """The tokens counted, by kind."""
    text: str
    """Short text: ``$1.23``, ``about $1.23`` for an old price, ``nothing: this machine``, ``unknown``."""
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
        return (
            price.prefill * tokens.fresh
            + price.prefill * (1 - CACHED_PREFILL_DISCOUNT) * tokens.cached
            + price.sample * tokens.sampled
            + (price.train or 0.0) * tokens.trained
        ) / 1e6

    def cost(self, tokens: TokenUsage) -> Cost:
        """The cost of these tokens."""
        return self.cost_of(self.dollars(tokens), tokens)

    def cost_of(self, dollars: float | None, tokens: TokenUsage) -> Cost:
        """The cost of tokens whose dollars are already known, since a run's sessions may have had different prices."""
        if self.is_free:
            return Cost(0.0, tokens, "nothing: this machine", "The model runs in the embedded service on this machine.")
        if dollars is None:
            return Cost(
                None, tokens, "unknown", _sentence(self.problem or "earlier sessions did not record their usage")
            )
        return Cost(dollars, tokens, self.amount(dollars), self.note)

    def amount(self, dollars: float) -> str:
        """``$1.23``, or ``about $1.23`` for an old price."""
        shown = f"${dollars:,.2f}" if dollars >= 0.1 or not dollars else f"${dollars:.2g}"
        return f"about {shown}" if self.price is not None and _is_old(self.price) else shown

    @property
    def note(self) -> str:
        """The prices used, in one or two sentences; empty if unknown."""
        price = self.price
        if price is None:
            return ""
        train = "" if price.train is None else f", training ${price.train:g}"
        remark = f" ({price.remark})" if price.remark else ""
        as_of = f", as of {price.as_of}" if price.as_of else ", as given"
        note = (
            f"Prefill ${price.prefill:g} (${price.prefill * (1 - CACHED_PREFILL_DISCOUNT):.3g} if cached), sampling "
            f"${price.sample:g}{train} per million tokens{as_of}{remark}. A failed or cancelled request counts with its "
            "prompt at the full price. Checkpoint storage and the search are not included."
        )
        return f"{note} Prices have risen since, on {LAST_RISE}." if _is_old(price) else note


def find_price(model: str) -> Price | None:
    """Tinker's price of a model by its exact name, ``:peft:`` suffix included; None if unknown."""
    return known_prices().get(model)


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


def _is_old(price: Price) -> bool:
    return bool(price.as_of) and price.as_of < LAST_RISE


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
