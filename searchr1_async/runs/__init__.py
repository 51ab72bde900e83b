"""Runs: handles, folders, checkpoints and costs.

As ``sr.runs``: what a run or its folder gives back, and prices.
"""

from typing import TYPE_CHECKING

from searchr1_async.boundary.lazy import lazy_names

if TYPE_CHECKING:
    from searchr1_async.billing import Cost as Cost
    from searchr1_async.models import Price as Price
    from searchr1_async.runs.estimate import CostEstimate as CostEstimate
    from searchr1_async.runs.recorded import RecordedRun as RecordedRun
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "searchr1_async.billing": "Cost",
            "searchr1_async.models": "Price",
            "searchr1_async.runs.estimate": "CostEstimate",
            "searchr1_async.runs.recorded": "RecordedRun",
        },
    )
