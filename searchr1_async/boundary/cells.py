"""One cell of a table: whether it holds anything, and the text that its number stands for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from searchr1_async.boundary.values import plain

_MISSING = frozenset({"NAType", "NaTType"})
"""Types of pandas' own missing values, which answer no comparison."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN in any of its types, ``pandas.NA`` or ``pandas.NaT``."""
    if value is None:
        return True
    if isinstance(value, str):
        return False
    if type(value).__name__ in _MISSING:
        return True
    found = plain(value)
    return isinstance(found, float | Decimal) and found != found


def plain_cell(value: Any) -> Any:
    """A cell in Python's own types: arrays and numbers of numpy as lists and numbers, a missing value as None, also within."""
    if value is None or isinstance(value, str):
        return value
    if is_missing(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain_cell(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_cell(inner) for inner in value]
    if type(value).__module__ == "numpy" and callable(tolist := getattr(value, "tolist", None)):
        # str() first: the double nearest to a 32-bit 0.1 is 0.10000000149011612.
        return plain_cell(tolist()) if getattr(value, "shape", ()) else _plain_scalar(value)
    return value


def number_text(value: Any) -> str | None:
    """A number as a person writes it: 1990.0 is "1990", 1e-05 is "0.00001". None for all else, also for True and infinity."""
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
    """An id or a name: text as it is, a number as :func:`number_text` writes it, "" for a missing one; None for all else."""
    if isinstance(value, str):
        return value
    return "" if is_missing(value) else number_text(value)


def _plain_scalar(value: Any) -> Any:
    found = plain(value)
    return float(str(value)) if isinstance(found, float) else found
