"""Numbers, flags and texts as users and files give them: made plain Python values, or refused by the name of the argument.

numpy's and torch's numbers are taken as Python's: kept as they come, they fit into no JSON and fail after everything was played.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from searchr1_async.errors import ConfigurationError


def plain(value: Any) -> Any:
    """A number or flag of numpy, torch or pandas as Python's; everything else as it is.

    An array or tensor of one element and no dimension counts as its element.
    """
    if getattr(value, "shape", None) == () and callable(item := getattr(value, "item", None)):
        return item()
    return value


def as_integer(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """A whole number.

    Raises:
        ConfigurationError: ``8.0``, ``"8"`` and ``True`` are none; or it is outside of its bounds.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Integral):
        raise ConfigurationError(
            f"{name} is {shown_with_kind(value)}: give a whole number, such as {_example(at_least)}"
        )
    _check_bounds(name, int(found), at_least, None, at_most)
    return int(found)


def as_number(
    name: str, value: Any, *, at_least: float | None = None, over: float | None = None, at_most: float | None = None
) -> float:
    """A finite number.

    Raises:
        ConfigurationError: ``"1e-4"``, ``True``, infinity and NaN are none; or it is outside of its bounds.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: give a number")
    try:
        found = float(found)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ConfigurationError(f"{name} is {shown(value)}: give a finite number")
    _check_bounds(name, found, at_least, over, at_most)
    return found


def as_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        ConfigurationError: it is neither; ``"no"`` and ``0`` would count as something else than they say.
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: give True or False")
    return found


def as_text(name: str, value: Any) -> str:
    """Text that a file can hold.

    Raises:
        ConfigurationError: it is no text, or holds a lone surrogate (half of a character), which UTF-8 has no bytes for.
    """
    found = plain(value)
    if not isinstance(found, str):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: give text")
    if (place := half_a_character(found)) is not None:
        raise ConfigurationError(
            f"{name} is {shown(value)}, which holds half a character (a lone surrogate) at {place}: read its file as UTF-8"
        )
    return found


def as_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of several words.

    Raises:
        ConfigurationError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{name} is {shown(value)}: choose one of {', '.join(choices)}")
    return value


def half_a_character(text: str) -> int | None:
    """The index of the first lone surrogate, which UTF-8 has no bytes for; None where there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def shown(value: Any) -> str:
    """A value in a message: as Python writes it, cut after 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def shown_with_kind(value: Any) -> str:
    """As :func:`shown`, with the name of its class: ``8.0 (float)``."""
    return shown(value) if value is None else f"{shown(value)} ({type(value).__name__})"


def _example(at_least: int | None) -> int:
    return 8 if at_least is None else max(1, at_least)


def _check_bounds(name: str, value: float, at_least: float | None, over: float | None, at_most: float | None) -> None:
    if at_least is not None and value < at_least:
        raise ConfigurationError(f"{name} is {value}: it must be at least {at_least}")
    if over is not None and value <= over:
        raise ConfigurationError(f"{name} is {value}: it must be over {over}")
    if at_most is not None and value > at_most:
        raise ConfigurationError(f"{name} is {value}: it must be at most {at_most}")
