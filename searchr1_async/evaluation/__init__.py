"""Evaluation of systems on question suites: from episodes to a report.

As ``sr.evaluation``: suites, the comparison of systems, and what others have published.
"""

from typing import TYPE_CHECKING

from searchr1_async.boundary import lazy_names

if TYPE_CHECKING:
    from searchr1_async.data.suites import Suite as Suite
    from searchr1_async.data.suites import find_overlap as find_overlap
    from searchr1_async.data.suites import load_suite as load_suite
    from searchr1_async.data.suites import load_suites as load_suites
    from searchr1_async.evaluation.manifest import Manifest as Manifest
    from searchr1_async.evaluation.report_notes import PUBLISHED as PUBLISHED
    from searchr1_async.evaluation.report_tables import comparison_table as comparison_table
    from searchr1_async.runs.evaluation import Evaluation as Evaluation
    from searchr1_async.runs.evaluation import compare as compare
    from searchr1_async.runs.evaluation import flips as flips
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
