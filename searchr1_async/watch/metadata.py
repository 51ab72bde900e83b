"""Question metadata as JSON. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """Question metadata as deterministic ASCII JSON, lone surrogates escaped.

    Tuples become lists, sets sorted lists, numpy values Python values, and other values their ``str`` without the address of a
    default ``repr``. Non-string keys become their JSON.

    Raises:
        RecursionError, ValueError: a value contains itself.
    """
    try:
        return json.dumps(dict(metadata))
    except TypeError:
        return json.dumps(_plain(metadata))


def _plain(value: Any) -> Any:
    """``value`` as JSON-compatible data."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.ndarray | np.generic):
        inner = value.tolist()
        return str(inner) if isinstance(inner, np.generic) else _plain(inner)  # tolist() keeps a longdouble
    if isinstance(value, Mapping):
        return {_key(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Set):
        return sorted(map(_plain, value), key=_set_order)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(inner) for inner in value]
    return _ADDRESS.sub("", str(value))


def _key(value: Any) -> str:
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _set_order(value: Any) -> tuple[float, bool, str]:
    """Numbers by value, then strings, then everything else by its JSON: a total order, which ``<`` on sets and NaN is not."""
    is_number = isinstance(value, int | float) and not math.isnan(value)
    is_text = isinstance(value, str)
    return value if is_number else math.inf, not is_text, value if is_text else json.dumps(value)
