from __future__ import annotations

import json
from collections import deque
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.episodes.table import metadata_json

carried = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=())),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)


def joined(value: Any) -> Any:
    """Text after a JSON round trip: surrogate pairs become one character."""
    return json.loads(json.dumps(value))


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=6), carried, max_size=4))
def test_json_values_round_trip(values: dict[str, Any]) -> None:
    text = metadata_json(values)
    assert json.loads(text) == joined(values)
    assert text.isascii()
    beside_a_set = json.loads(metadata_json({**values, "a set": frozenset()}))
    assert beside_a_set == joined(values) | {"a set": []}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"p10", "p2", "p2 b", "é"}, ["p10", "p2", "p2 b", "é"]),
        (frozenset({10, 2}), [2, 10]),
        (deque([1]), "deque([1])"),
        (np.int64(3), 3),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.longdouble(0.5), "0.5"),
        ({None: 2, 7: 3}, {"null": 2, "7": 3}),
        ({(1, "a"): 1}, {'[1, "a"]': 1}),
        (date(2026, 1, 2), "2026-01-02"),
        (b"ab", "b'ab'"),
    ],
)
def test_other_values_are_converted(value: Any, written: Any) -> None:
    assert json.loads(metadata_json({"value": value})) == {"value": written}


def test_object_addresses_are_removed() -> None:
    class Thing:
        pass

    first, second = metadata_json({"value": Thing()}), metadata_json({"value": Thing()})
    assert first == second
    assert "Thing object" in first
