"""Single cells of a table: missing values, plain Python types, and numbers as text. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from searchr1_async.boundary.values import plain

_MISSING = frozenset({"NAType", "NaTType"})
"""Types of pandas' missing values, which do not support comparison."""


def is_missing(value: Any) -> bool:
    """Whether a cell is None, NaN of any type, ``pandas.NA`` or ``pandas.NaT``."""
    if value is None:
        return True
    if isinstance(value, str):
        return False
    if type(value).__name__ in _MISSING:
        return True
    found = plain(value)
    return isinstance(found, float | Decimal) and found != found


def plain_cell(value: Any) -> Any:
    """Converts a cell, recursively, to plain Python types; missing values become None."""
    if value is None or isinstance(value, str):
        return value
    if is_missing(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain_cell(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_cell(inner) for inner in value]
    if type(value).__module__ == "numpy" and callable(tolist := getattr(value, "tolist", None)):
        # Scalars go through str(): float() of a 32-bit 0.1 would be 0.10000000149011612.
        return plain_cell(tolist()) if getattr(value, "shape", ()) else _plain_scalar(value)
    return value


def number_text(value: Any) -> str | None:
    """A number without exponent or trailing zeros: 1990.0 is "1990", 1e-05 is "0.00001". None for bool, infinity and non-numbers."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, Real | Decimal):
        return None
    if isinstance(found, int):
        return str(found)
    try:
        number = Decimal(str(value if type(value).__module__ == "numpy" else found))
    except ArithmeticError:  # a fraction
        number = Decimal(repr(float(found)))
    if not number.is_finite():
        return None
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def name_text(value: Any) -> str | None:
    """An id or name: text, a number by :func:`number_text`, or "" if missing; None for other types."""
    if isinstance(value, str):
        return value
    return "" if is_missing(value) else number_text(value)


def _plain_scalar(value: Any) -> Any:
    found = plain(value)
    return float(str(value)) if isinstance(found, float) else found
