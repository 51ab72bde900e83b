"""What a run's tokens cost at the Tinker service, as far as its prices are known. Pure.

The table (:mod:`searchr1_async.models`) holds only what a dated source says word for word; a model that is not in it has no
cost, and is shown as unknown. A variant with a longer context has a price of its own, and never that of the plain model.
Running on the embedded service costs nothing, whatever the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from searchr1_async.models import Price, known_prices

CACHED_PREFILL_DISCOUNT = 0.8
"""Of the prefill price, for the beginning of a prompt that the service has cached (2026-10-07). The service does not say
which tokens it found cached, so that no cost here assumes any."""

_LAST_RISE = "2026-07-17"
"""Prices rose on that day, most of them by half: an older price is no upper bound of today's."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What tokens came to."""

    dollars: float
    text: str
    """``$1.23 at most``, ``about $1.23`` where the price is old, ``nothing: this machine``."""
    note: str
    """What the figure rests on, in a sentence or two."""


def cost_of(
    model: str, is_embedded: bool, *, prompt_tokens: int, sampled_tokens: int, trained_tokens: int
) -> Cost | None:
    """What these tokens cost; None where the price is not known.

    Args:
        model: as the service calls it, with its ``:peft:`` suffix if it has one.
        is_embedded: it runs on this machine.
        prompt_tokens: sent to be sampled from, each turn's whole prompt.
        sampled_tokens: written by the model.
        trained_tokens: in forward-backward passes; prompt and answer count alike.
    """
    if is_embedded:
        return Cost(0.0, "nothing: this machine", "The model runs in the embedded service on this machine.")
    price = known_prices().get(model)
    if price is None or (price.train is None and trained_tokens):
        return None
    millionths = price.prefill * prompt_tokens + price.sample * sampled_tokens + (price.train or 0.0) * trained_tokens
    dollars = millionths / 1e6
    amount = f"${dollars:,.2f}"
    return Cost(dollars, f"{amount} at most" if price.as_of >= _LAST_RISE else f"about {amount}", _note(price))


def _note(price: Price) -> str:
    train = "" if price.train is None else f", training ${price.train:g}"
    note = (
        f"Prefill ${price.prefill:g}, sampling ${price.sample:g}{train} for a million tokens, as of {price.as_of}"
        f"{f' ({price.remark})' if price.remark else ''}. Every turn's whole prompt is counted at the full price, while the "
        f"service takes {CACHED_PREFILL_DISCOUNT:.0%} off what it has cached. Checkpoint storage and the search are not in it."
    )
    return note if price.as_of >= _LAST_RISE else f"{note} Prices have risen since, on {_LAST_RISE}."
