"""Numbers as people give them, numpy's among them, made plain ones: those of numpy play everything and then fit into no JSON."""

from __future__ import annotations

import operator
from typing import Any

from searchr1_async.errors import ConfigurationError


def whole(name: str, value: Any) -> int:
    """An integer of any library as Python's.

    Raises:
        ConfigurationError: it is none, naming it.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigurationError(f"{name} is {value!r}: it must be a whole number") from None


def number(name: str, value: Any) -> float:
    """A number of any library as Python's; a text is none, though it may look like one.

    Raises:
        ConfigurationError: it is none, naming it.
    """
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name} is {value!r}: it must be a number") from None
