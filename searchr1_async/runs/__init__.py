"""Runs: their handles, folders, resume points and kept weights; one question to a model, and the export of weights.

As ``sr.runs``: the handle of a run's folder, costs and prices.
"""

from typing import TYPE_CHECKING

from searchr1_async.boundary import lazy_names

if TYPE_CHECKING:
    from searchr1_async.billing import Cost as Cost
    from searchr1_async.billing import CostEstimate as CostEstimate
    from searchr1_async.models import Price as Price
    from searchr1_async.runs.run import RecordedRun as RecordedRun
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
