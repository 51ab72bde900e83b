"""The table of prices."""

from __future__ import annotations

import datetime as dt

from searchr1_async.watch.prices import PRICES


def test_the_table_is_dated_and_in_order() -> None:
    for price in PRICES.values():
        dt.date.fromisoformat(price.as_of)
        assert 0 < price.prefill < price.sample
        assert price.train is None or price.train > 0
