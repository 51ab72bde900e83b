"""Cells of tables: what is missing, and which text a number stands for."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.boundary.tables import is_missing, name_text, number_text, plain_cell


class NAType:
    """As pandas' own missing value: it has no truth value, and equals nothing."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None  # type: ignore[assignment]


MISSING = [None, math.nan, np.float32("nan"), np.float64("nan"), Decimal("nan"), NAType()]


@pytest.mark.parametrize("value", MISSING, ids=lambda value: type(value).__name__)
def test_what_is_missing(value: Any) -> None:
    assert is_missing(value)
    assert plain_cell(["x", value]) == ["x", None]
    assert name_text(value) == ""


@pytest.mark.parametrize("value", ["", "nan", 0, False, [], np.array([math.nan]), math.inf])
def test_what_is_there(value: Any) -> None:
    assert not is_missing(value)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1990.0, "1990"),
        (np.float64(1990), "1990"),
        (np.int32(7), "7"),
        (np.float32(0.1), "0.1"),
        (-0.0, "0"),
        (1e-05, "0.00001"),
        (1e22, "10000000000000000000000"),
        (Decimal("3.50"), "3.5"),
        (True, None),
        (np.bool_(True), None),
        (math.inf, None),
        ("7", None),
    ],
)
def test_a_number_is_written_as_people_write_it(number: Any, text: str | None) -> None:
    assert number_text(number) == text


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_no_number_is_changed_by_its_text(number: float) -> None:
    text = number_text(number)
    assert text is not None
    assert float(text) == float(number) if isinstance(number, float) else int(text) == number
    assert "e" not in text


def test_arrays_become_lists() -> None:
    assert plain_cell({"a": np.array(["x", "y"], dtype=object), "b": (np.int8(3), np.float32(0.1))}) == {
        "a": ["x", "y"],
        "b": [3, 0.1],
    }
