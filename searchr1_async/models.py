"""Facts about Tinker's models: family, chat format, thinking, price, retirement.

The data is in ``models.json``, with source and date. What a service offers, only the service knows
(:func:`searchr1_async.service.startup.open_service` asks it).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from searchr1_async.boundary.settings import NotNegative, check_settings

Thinking = bool | str | None
"""Whether and how hard a model thinks before it answers: True, False, an effort such as ``"low"``, or None for its format's
default: off if possible, else the lowest effort."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens.

    Raises:
        ConfigurationError: not a number, or below 0.
    """

    prefill: NotNegative
    sample: NotNegative
    train: NotNegative | None = None
    """None if the source gives only the price of sampling."""
    as_of: str = ""
    """Date of the source, ``YYYY-MM-DD``."""
    remark: str = ""

    def __post_init__(self) -> None:
        check_settings(self, "the price's ")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model's messages are rendered as tokens."""

    name: str
    renderer: str | None
    """Of the ``renderers`` package, or ``"chatml"``; None if neither supports the format."""
    thinking: Mapping[str, Mapping[str, Any]]
    """Supported modes (``"off"``, ``"on"`` or an effort), with the renderer's options for each."""
    default: str | None
    """Key of ``thinking`` used by default."""
    checked: str
    """What the format was checked against, or why it was not."""
    refusal: str = ""
    """Why there is no renderer."""

    @property
    def choices(self) -> tuple[bool | str, ...]:
        """Accepted values of ``thinking=``, besides None."""
        return tuple({"off": False, "on": True}.get(name, name) for name in self.thinking)


@dataclass(frozen=True, slots=True)
class Model:
    """A model, by its name at the service."""

    name: str
    """With its suffix, if any."""
    family: str
    format: ChatFormat
    parameters: float
    """Billions, over all experts."""
    is_base: bool
    """Pretrained on text only, not tuned for chat."""
    is_offered: bool
    """Listed by Tinker at the table's date."""
    retired: str | None
    """Date of retirement by Tinker, ``YYYY-MM-DD``."""
    replacements: tuple[str, ...]
    """Tinker's recommended replacements."""
    replacement_note: str
    """How to use the replacement, such as ``thinking off``."""
    price: Price | None
    """Of exactly this name: a variant with a suffix does not have the plain model's price."""
    variants: tuple[str, ...]
    """Suffixes it is also offered with, such as ``:peft:262144`` for a context of 262,144 tokens."""


def plain_name(name: str) -> str:
    """The name without a variant's suffix: the part before the first ``:``."""
    return name.partition(":")[0]


def find_model(name: str) -> Model | None:
    """The table's entry for a model, or None. A suffix changes only the price."""
    table, plain = _table(), plain_name(name)
    model = table.models.get(plain)
    if model is None or name == plain:
        return model
    return replace(model, name=name, price=table.prices.get(name))


def known_models() -> tuple[Model, ...]:
    """The whole table by plain name, offered models first."""
    return tuple(_table().models.values())


def known_prices() -> Mapping[str, Price]:
    """All prices of the table, by model name."""
    return _table().prices


def find_format(name: str) -> ChatFormat | None:
    """The chat format of this name (often its renderer's name), or None."""
    return _table().formats.get(name)


def format_named_for(model: str) -> ChatFormat | None:
    """The format the table gives for a model that Tinker never offered, or None."""
    return _table().others.get(plain_name(model))


def default_cloud_model() -> str:
    """The default model: that of tinker-cookbook's search recipe."""
    return _table().default


def nearest_names(name: str, offered: Iterable[str], count: int = 5) -> list[str]:
    """The most similar offered names, best first: variants of the same model, then its family."""
    wanted = plain_name(name)
    model = find_model(name)

    def likeness(other: str) -> tuple[bool, float]:
        found = find_model(other)
        is_kin = model is not None and found is not None and found.family == model.family
        alike = difflib.SequenceMatcher(None, wanted.lower(), plain_name(other).lower()).ratio()
        return (is_kin, alike)

    return sorted(offered, key=lambda other: (*likeness(other), plain_name(other) == other), reverse=True)[:count]


def nearest_of_family(name: str, offered: Iterable[str]) -> str | None:
    """The best offered substitute: of the same family, tuned for chat, in a supported format. None if the family is not offered.

    Nearest in size first (on a tie the smaller), then the same chat format, then the table's order.
    """
    model = find_model(name)
    if model is None:
        return None
    order = list(_table().models)

    def distance(other: Model) -> tuple[float, float, bool, int]:
        apart = abs(math.log(other.parameters / model.parameters))
        return (apart, other.parameters, other.format != model.format, order.index(plain_name(other.name)))

    kin = [found for other in offered if (found := find_model(other)) is not None]
    kin = [other for other in kin if other.family == model.family and not other.is_base and other.format.renderer]
    # A variant with a longer context costs more: only if the plain model is not offered.
    kin.sort(key=lambda other: (distance(other)[:2], other.name != plain_name(other.name), distance(other)))
    return kin[0].name if kin else None


def replacements_for(name: str, offered: Iterable[str] | None = None) -> list[str]:
    """Tinker's recommended replacements of a retired model; retired ones are replaced in turn.

    Args:
        offered: the service's models, to filter by; None: no filter.
    """
    names = None if offered is None else set(offered)
    found: list[str] = []
    waiting = [plain_name(name)]
    seen = set(waiting)
    while waiting:
        model = find_model(waiting.pop(0))
        for other in () if model is None else model.replacements:
            if other in seen:
                continue
            seen.add(other)
            successor = find_model(other)
            is_here = other in names if names is not None else successor is None or successor.retired is None
            if is_here:
                found.append(other)
            else:
                waiting.append(other)
    return found


@dataclass(frozen=True, slots=True)
class _Table:
    default: str
    formats: Mapping[str, ChatFormat]
    models: Mapping[str, Model]
    prices: Mapping[str, Price]
    others: Mapping[str, ChatFormat]


@cache
def _table() -> _Table:
    data = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    formats = {
        name: ChatFormat(
            name,
            given["renderer"],
            given.get("thinking", {}),
            given.get("default"),
            given.get("checked", ""),
            given.get("refusal", ""),
        )
        for name, given in data["formats"].items()
    }
    models = {given["name"]: _model(given, formats) for given in data["models"]}
    prices = {name: model.price for name, model in models.items() if model.price is not None}
    for given in data["models"]:
        for suffix, variant in given.get("variants", {}).items():
            if "price" in variant:
                prices[given["name"] + suffix] = _price(variant["price"])
    others = {name: formats[key] for key, given in data["formats"].items() for name in given.get("models", ())}
    return _Table(data["default"], formats, models, prices, others)


def _model(given: Mapping[str, Any], formats: Mapping[str, ChatFormat]) -> Model:
    return Model(
        name=given["name"],
        family=given["family"],
        format=formats[given["format"]],
        parameters=given["parameters"],
        is_base=given.get("base", False),
        is_offered=given["offered"],
        retired=given.get("retired"),
        replacements=tuple(given.get("replacements", ())),
        replacement_note=given.get("replacement_note", ""),
        price=_price(given["price"]) if "price" in given else None,
        variants=tuple(given.get("variants", ())),
    )


def _price(given: Mapping[str, Any]) -> Price:
    return Price(given["prefill"], given["sample"], given.get("train"), given["as_of"], given.get("remark", ""))
