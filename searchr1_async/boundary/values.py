"""Numbers, flags and texts from users and files: converted to plain Python values, or rejected with the argument's name.

numpy and torch scalars are converted, since JSON cannot hold them and writing results would fail after the work is done.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from searchr1_async.errors import ConfigurationError


def plain(value: Any) -> Any:
    """Converts a scalar of numpy, torch or pandas (or a zero-dimensional array) to Python; returns other values unchanged."""
    if getattr(value, "shape", None) == () and callable(item := getattr(value, "item", None)):
        return item()
    return value


def as_integer(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """An integer.

    Raises:
        ConfigurationError: another type (also ``8.0``, ``"8"`` and ``True``), or out of bounds.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Integral):
        raise ConfigurationError(
            f"{name} is {shown_with_kind(value)}: expected an integer, such as {_example(at_least)}"
        )
    _check_bounds(name, int(found), at_least, None, at_most)
    return int(found)


def as_number(
    name: str, value: Any, *, at_least: float | None = None, over: float | None = None, at_most: float | None = None
) -> float:
    """A finite number.

    Raises:
        ConfigurationError: another type (also ``"1e-4"`` and ``True``), infinite or NaN, or out of bounds.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected a number")
    try:
        found = float(found)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ConfigurationError(f"{name} is {shown(value)}: expected a finite number")
    _check_bounds(name, found, at_least, over, at_most)
    return found


def as_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        ConfigurationError: any other value; truthiness of ``"no"`` or ``0`` may not be what was meant.
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected True or False")
    return found


def as_text(name: str, value: Any) -> str:
    """Text that can be encoded.

    Raises:
        ConfigurationError: not text, or it has a lone surrogate (half a character), which UTF-8 cannot encode.
    """
    found = plain(value)
    if not isinstance(found, str):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected text")
    if (place := half_a_character(found)) is not None:
        raise ConfigurationError(
            f"{name} is {shown(value)}, which has a lone surrogate (half a character) at {place}: read its file as UTF-8"
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
    """Index of the first lone surrogate, which UTF-8 cannot encode; None if there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def shown(value: Any) -> str:
    """A value's repr for messages, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def shown_with_kind(value: Any) -> str:
    """Like :func:`shown`, with the type: ``8.0 (float)``."""
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
