"""What is known of the models of Tinker: family, chat format, thinking, price, retirement. Pure.

The facts are data, in ``models.json`` beside this module, each with its source and date. The table is no list of what a
service offers: only the service can say that (:func:`searchr1_async.service.open_service` asks it). It says what a name means.
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
"""Whether and how hard a model thinks before it answers: True, False, an effort such as ``"low"``, or None for the default of
its format: off where it can be off, else the lowest effort."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens.

    Raises:
        ConfigurationError: no number, or one under 0.
    """

    prefill: NotNegative
    sample: NotNegative
    train: NotNegative | None = None
    """None where the sources give only what sampling costs."""
    as_of: str = ""
    """The day on which the source said so, ``YYYY-MM-DD``."""
    remark: str = ""

    def __post_init__(self) -> None:
        check_settings(self, "the price's ")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model's messages become tokens."""

    name: str
    renderer: str | None
    """Of the ``renderers`` package, or ``"chatml"``; None where neither has this format."""
    thinking: Mapping[str, Mapping[str, Any]]
    """What the format can do, ``"off"``, ``"on"`` or an effort, and the renderer's options for it."""
    default: str | None
    """The key of ``thinking`` that is taken where nothing is asked for."""
    checked: str
    """Against what the format was checked, or why it was not."""
    refusal: str = ""
    """Why there is no renderer."""

    @property
    def choices(self) -> tuple[bool | str, ...]:
        """The values of ``thinking=`` that this format takes, None apart."""
        return tuple({"off": False, "on": True}.get(name, name) for name in self.thinking)


@dataclass(frozen=True, slots=True)
class Model:
    """A model by the name that a service knows it by."""

    name: str
    """With its suffix, where it has one."""
    family: str
    format: ChatFormat
    parameters: float
    """Billions, all experts of a mixture together."""
    is_base: bool
    """Trained on text only, not to chat."""
    is_offered: bool
    """Listed by Tinker at the table's date."""
    retired: str | None
    """The day on which Tinker took it off, ``YYYY-MM-DD``."""
    replacements: tuple[str, ...]
    """What Tinker recommends in its place."""
    replacement_note: str
    """How the replacement should be used, such as ``thinking off``."""
    price: Price | None
    """Of this very name: a variant with a suffix never has the price of the plain model."""
    variants: tuple[str, ...]
    """Suffixes under which it is offered too, such as ``:peft:262144`` for a context of 262,144 tokens."""


def plain_name(name: str) -> str:
    """The name without the suffix of a variant: what stands before the first ``:``."""
    return name.partition(":")[0]


def find_model(name: str) -> Model | None:
    """What the table says of a model; None where it does not know it.

    Args:
        name: as the service calls it. A suffix changes only the price.
    """
    table, plain = _table(), plain_name(name)
    model = table.models.get(plain)
    if model is None or name == plain:
        return model
    return replace(model, name=name, price=table.prices.get(name))


def known_models() -> tuple[Model, ...]:
    """The whole table, under plain names: what is offered first, what was retired last."""
    return tuple(_table().models.values())


def known_prices() -> Mapping[str, Price]:
    """Every price of the table, by the name that the service knows the model by."""
    return _table().prices


def find_format(name: str) -> ChatFormat | None:
    """The chat format of this name, which is often that of its renderer; None where there is none."""
    return _table().formats.get(name)


def format_named_for(model: str) -> ChatFormat | None:
    """The format that the table gives to a model that Tinker never offered; None where it gives none."""
    return _table().others.get(plain_name(model))


def default_cloud_model() -> str:
    """The model of a run that names none: that of the search recipe of tinker-cookbook."""
    return _table().default


def nearest_names(name: str, offered: Iterable[str], count: int = 5) -> list[str]:
    """The offered names that are most like this one, the most alike first: its own variants, then those of its family."""
    wanted = plain_name(name)
    model = find_model(name)

    def likeness(other: str) -> tuple[bool, float]:
        found = find_model(other)
        is_kin = model is not None and found is not None and found.family == model.family
        alike = difflib.SequenceMatcher(None, wanted.lower(), plain_name(other).lower()).ratio()
        return (is_kin, alike)

    return sorted(offered, key=lambda other: (*likeness(other), plain_name(other) == other), reverse=True)[:count]


def nearest_of_family(name: str, offered: Iterable[str]) -> str | None:
    """The offered model that can best stand in for this one: of its family, trained to chat, in a format that can be rendered.

    The nearest in size is taken (of two equally near the smaller), then the one in the same chat format, then the table's order.
    None where the family is not offered.
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
    # A variant with a longer context costs more: only where the plain model is not offered.
    kin.sort(key=lambda other: (distance(other)[:2], other.name != plain_name(other.name), distance(other)))
    return kin[0].name if kin else None


def replacements_for(name: str, offered: Iterable[str] | None = None) -> list[str]:
    """What Tinker recommends in place of a retired model, the retired ones among them replaced in turn.

    Args:
        offered: what the service has, to which the answer is cut; None for no such list.
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
