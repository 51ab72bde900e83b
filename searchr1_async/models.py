"""Facts about Tinker's models: family, chat format, thinking, price, retirement.

The data is in ``models.json``, with source and date. What a service offers, only the service knows
(:func:`searchr1_async.service.opening.open_service` asks it).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from searchr1_async.boundary.settings import NotNegative, check_settings

Thinking = bool | str | None
"""Whether and how hard a model thinks before it answers: True, False, an effort such as ``"low"``, or None for its format's
default: off if possible, else the lowest effort."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens. Raises ConfigurationError: not a number, or below 0."""

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
    thinking: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Supported modes (``"off"``, ``"on"`` or an effort), with the renderer's options for each."""
    default: str | None = None
    """Key of ``thinking`` used by default."""
    checked: str = ""
    """What the format was checked against, or why it was not."""
    refusal: str = ""
    """Why there is no renderer."""
    models: Sequence[str] = ()
    """Models with this format that Tinker never offered."""

    @property
    def choices(self) -> tuple[bool | str, ...]:
        """Accepted values of ``thinking=``, besides None."""
        return tuple({"off": False, "on": True}.get(name, name) for name in self.thinking)


@dataclass(frozen=True, slots=True)
class Model:
    """A model, by its name at the service (with its suffix, if any)."""

    name: str
    family: str
    format: ChatFormat
    parameters: float
    """Billions, over all experts."""
    is_offered: bool
    """Listed by Tinker at the table's date."""
    is_base: bool = False
    """Pretrained on text only, not tuned for chat."""
    retired: str | None = None
    """Date of retirement by Tinker, ``YYYY-MM-DD``."""
    replacements: Sequence[str] = ()
    """Recommended by Tinker."""
    replacement_note: str = ""
    """How to use the replacement, such as ``thinking off``."""
    price: Price | None = None
    """Of exactly this name: a variant with a suffix does not have the plain model's price."""
    variants: tuple[str, ...] = ()
    """Suffixes it is also offered with, such as ``:peft:262144`` for a context of 262,144 tokens."""


class _Table(NamedTuple):
    default: str
    formats: dict[str, ChatFormat]
    models: dict[str, Model]
    """By plain name, offered models first."""
    prices: dict[str, Price]
    """By exact name."""


@cache
def _table() -> _Table:
    data = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    table = _Table(
        data["default"], {name: ChatFormat(name, **given) for name, given in data["formats"].items()}, {}, {}
    )
    for given in data["models"]:
        name, variants = given["name"], given.get("variants", {})
        for suffix, priced in {"": given, **variants}.items():
            if "price" in priced:
                table.prices[name + suffix] = Price(**priced["price"])
        chosen = {
            "format": table.formats[given["format"]],
            "price": table.prices.get(name),
            "variants": tuple(variants),
        }
        table.models[name] = Model(**given | chosen)
    return table


def plain_name(name: str) -> str:
    """The name without a variant's suffix: the part before the first ``:``."""
    return name.partition(":")[0]


def find_model(name: str) -> Model | None:
    """The table's entry for a model, or None. A suffix changes only the price."""
    model = _table().models.get(plain_name(name))
    return model and replace(model, name=name, price=find_price(name))


def known_models() -> tuple[Model, ...]:
    """The whole table by plain name, offered models first."""
    return tuple(_table().models.values())


def find_price(name: str) -> Price | None:
    """Tinker's price of a model by its exact name, suffix included; None if unknown."""
    return _table().prices.get(name)


def find_format(name: str) -> ChatFormat | None:
    """The chat format of this name (often its renderer's name), or None."""
    return _table().formats.get(name)


def format_named_for(model: str) -> ChatFormat | None:
    """The format the table gives for a model that Tinker never offered, or None."""
    return next((chat for chat in _table().formats.values() if plain_name(model) in chat.models), None)


def default_cloud_model() -> str:
    """The default model: that of tinker-cookbook's search recipe."""
    return _table().default


def nearest_names(name: str, offered: Iterable[str], count: int = 5) -> list[str]:
    """The most similar offered names, best first: its family, and of that the most similar names."""
    model = find_model(name)

    def likeness(other: str) -> tuple[bool, float, bool]:
        found, plain = find_model(other), plain_name(other)
        is_kin = model is not None and found is not None and found.family == model.family
        alike = difflib.SequenceMatcher(None, plain_name(name).lower(), plain.lower()).ratio()
        return is_kin, alike, plain == other

    return sorted(offered, key=likeness, reverse=True)[:count]


def nearest_of_family(name: str, offered: Iterable[str]) -> str | None:
    """The best offered substitute: of the same family, tuned for chat, in a supported format. None if the family is not offered.

    Nearest in size first, on a tie the smaller; then the plain model, whose context costs less; then the same chat format.
    """
    if (model := find_model(name)) is None:
        return None

    def distance(other: Model) -> tuple[float, float, bool, bool]:
        apart = abs(math.log(other.parameters / model.parameters))
        return apart, other.parameters, other.name != plain_name(other.name), other.format != model.format

    known = [found for other in offered if (found := find_model(other)) is not None]
    fitting = [each for each in known if each.family == model.family and not each.is_base and each.format.renderer]
    return min(fitting, key=distance).name if fitting else None


def replacements_for(name: str, offered: Iterable[str] | None = None) -> list[str]:
    """Tinker's recommended replacements of a retired model; retired ones are replaced in turn.

    Args:
        offered: the service's models, to filter by; None: those of the table that are not retired.
    """
    names = {each.name for each in known_models() if not each.retired} if offered is None else set(offered)
    model, found = find_model(plain_name(name)), dict[str, None]()
    for other in () if model is None else model.replacements:
        found |= dict.fromkeys([other] if other in names else replacements_for(other, names))
    return list(found)
