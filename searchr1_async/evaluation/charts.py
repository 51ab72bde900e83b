"""Evaluations as a chart."""

from __future__ import annotations

from typing import Any

import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.result import Evaluation
from searchr1_async.watch.rows import EPISODE_SCHEMA


def plot_suites(*evaluations: Evaluation, **options: Any) -> Any:
    """Exact match suite by suite, the evaluations side by side with their 95 % intervals: an Altair chart.

    Change it further, or ``.save("suites.png")`` (or ``.svg``).

    Args:
        evaluations: in the order in which they are to stand; their labels tell them apart.
        options: ``title``, ``width`` and ``height`` (pixels).

    Raises:
        ConfigurationError: two have one label.
    """
    from searchr1_async.watch import plots  # altair: half a second, for those who draw

    labels = [evaluation.label for evaluation in evaluations]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(
            f"two evaluations have one label ({', '.join(labels)}): give each its own with evaluate(…, label=…)"
        )
    plots.enable_renderer()
    episodes = pl.concat([pl.DataFrame(schema=EPISODE_SCHEMA), *(evaluation.to_frame() for evaluation in evaluations)])
    return plots.plot_suites(plots.evaluation_scores(episodes.lazy()), **options)
