"""What a service bills for tokens: fresh and cached prompt tokens, sampled and trained ones, each at its own price. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from searchr1_async.models import Price, known_prices
from searchr1_async.usage import TokenUsage

CACHED_PREFILL_DISCOUNT = 0.8
"""Of the prefill price, for the beginning of a prompt that the service has cached (2026-10-07)."""
LAST_RISE = "2026-07-17"
"""Prices rose on that day, most of them by half: an older price is no upper bound of today's."""

_TINKER_HOSTS = ("thinkingmachines.dev", "thinkingmachines.ai")


@dataclass(frozen=True, slots=True)
class Cost:
    """What tokens cost."""

    dollars: float | None
    """US dollars; None where the price is not known."""
    tokens: TokenUsage
    """What was counted, by kind."""
    text: str
    """In a few words: ``$1.23``, ``about $1.23`` where the price is old, ``nothing: this machine``, ``unknown``."""
    note: str
    """What the figure rests on, or why there is none, in a sentence or two."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Billing:
    """How the tokens of one model are billed on one service."""

    price: Price | None = None
    """None where nothing is billed, or where the price is not known."""
    is_free: bool = False
    """The model runs in the embedded service on this machine."""
    reason: str = ""
    """Why the price is not known, in words; empty where it is."""

    @property
    def problem(self) -> str:
        """Why the cost of a training run cannot be told, in words; empty where it can."""
        if self.price is not None and self.price.train is None:
            return "only the price of sampling is known, not that of training"
        return self.reason

    def dollars(self, tokens: TokenUsage) -> float | None:
        """US dollars for these tokens; None where a price that they need is not known."""
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
        """The cost in words, of an amount that is known already: sessions of a run may have had other prices.

        Args:
            dollars: None where it is not known.
        """
        if self.is_free:
            return Cost(0.0, tokens, "nothing: this machine", "The model runs in the embedded service on this machine.")
        if dollars is None:
            return Cost(None, tokens, "unknown", _sentence(self.problem or "what was used before was not recorded"))
        return Cost(dollars, tokens, self.amount(dollars), self.note)

    def amount(self, dollars: float) -> str:
        """``$1.23``, or ``about $1.23`` where the price is old."""
        shown = f"${dollars:,.2f}" if dollars >= 0.1 or not dollars else f"${dollars:.2g}"
        return f"about {shown}" if self.price is not None and _is_old(self.price) else shown

    @property
    def note(self) -> str:
        """The prices that figures rest on, in a sentence or two; empty where none is known."""
        price = self.price
        if price is None:
            return ""
        train = "" if price.train is None else f", training ${price.train:g}"
        remark = f" ({price.remark})" if price.remark else ""
        as_of = f", as of {price.as_of}" if price.as_of else ", as it was given"
        note = (
            f"Prefill ${price.prefill:g} (${price.prefill * (1 - CACHED_PREFILL_DISCOUNT):.3g} where it is cached), sampling "
            f"${price.sample:g}{train} for a million tokens{as_of}{remark}. A request that failed or was "
            "cancelled counts with its prompt at the full price. Checkpoint storage and the search are not in it."
        )
        return f"{note} Prices have risen since, on {LAST_RISE}." if _is_old(price) else note


def find_price(model: str) -> Price | None:
    """Tinker's price of a model by its exact name, with its ``:peft:`` suffix if it has one; None where it is not known."""
    return known_prices().get(model)


def billing_of(model: str, *, is_embedded: bool, is_tinker: bool, price: Price | None = None) -> Billing:
    """How a service bills a model.

    Args:
        model: as the service calls it, with its ``:peft:`` suffix if it has one: each has its own price.
        is_embedded: it runs on this machine, which costs nothing.
        is_tinker: it runs in Tinker's cloud, whose prices are in the table.
        price: what the user says that it costs; goes before the table.
    """
    if is_embedded:
        return Billing(is_free=True)
    if price is not None:
        return Billing(price)
    if not is_tinker:
        return Billing(reason=f"the price of {model} on a server of one's own is not known: give price=Price(...)")
    found = find_price(model)
    return Billing(found, reason="" if found else f"the price of {model} is not known: give price=Price(...)")


def is_tinker_host(host: str | None) -> bool:
    """Whether a host, or None for the SDK's own choice, belongs to Tinker's cloud."""
    return host is None or any(host == name or host.endswith(f".{name}") for name in _TINKER_HOSTS)


def _is_old(price: Price) -> bool:
    return bool(price.as_of) and price.as_of < LAST_RISE


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
