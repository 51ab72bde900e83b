"""Evaluation of systems on question suites: from episodes to a report.

As ``sr.evaluation``: suites, the comparison of systems, and what others have published.
"""

from typing import TYPE_CHECKING

from searchr1_async.boundary.lazy import lazy_names

if TYPE_CHECKING:
    from searchr1_async.data.suites import Suite as Suite
    from searchr1_async.data.suites import find_overlap as find_overlap
    from searchr1_async.data.suites import load_suite as load_suite
    from searchr1_async.data.suites import load_suites as load_suites
    from searchr1_async.evaluation.manifest import Manifest as Manifest
    from searchr1_async.evaluation.published import PUBLISHED as PUBLISHED
    from searchr1_async.evaluation.report_charts import plot_suites as plot_suites
    from searchr1_async.evaluation.report_text import comparison_table as comparison_table
    from searchr1_async.runs.evaluation import Evaluation as Evaluation
    from searchr1_async.runs.evaluation import compare as compare
    from searchr1_async.runs.evaluation import flips as flips
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "searchr1_async.data.suites": "Suite find_overlap load_suite load_suites",
            "searchr1_async.evaluation.report_text": "comparison_table",
            "searchr1_async.evaluation.manifest": "Manifest",
            "searchr1_async.evaluation.published": "PUBLISHED",
            "searchr1_async.evaluation.report_charts": "plot_suites",
            "searchr1_async.runs.evaluation": "Evaluation compare flips",
        },
    )
