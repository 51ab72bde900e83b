"""What a question holds beside its text and its answers, as JSON. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """A question's metadata as JSON, in every process the same: ASCII, with lone surrogates escaped.

    Tuples become lists, sets sorted lists, numpy's values Python's, and any other value its text, less the address that a
    default ``repr`` has. A key that is no text becomes that of its JSON.

    Raises:
        RecursionError, ValueError: a value holds itself.
    """
    try:
        return json.dumps(dict(metadata))
    except TypeError:
        return json.dumps(_plain(metadata))


def _plain(value: Any) -> Any:
    """``value`` as JSON can carry it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.ndarray | np.generic):
        inner = value.tolist()
        return str(inner) if isinstance(inner, np.generic) else _plain(inner)  # a longdouble stays one
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
    """Numbers by value, then texts, then everything else by its JSON: a total order, as ``<`` of sets and of NaN is none."""
    is_number = isinstance(value, int | float) and not math.isnan(value)
    is_text = isinstance(value, str)
    return value if is_number else math.inf, not is_text, value if is_text else json.dumps(value)
