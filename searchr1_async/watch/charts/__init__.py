"""Charts of a run as Altair objects, to adjust, concatenate, or save as PNG or SVG.

``run.plot(kind)`` calls :func:`draw`; the other functions take data frames directly. Altair is imported on first use.
"""

from searchr1_async.watch.charts.curves import plot_learning, plot_metric, plot_reward_by_turns, plot_suites
from searchr1_async.watch.charts.run_charts import draw
from searchr1_async.watch.charts.theme import enable_renderer, evaluation_scores
from searchr1_async.watch.charts.timeline import plot_timeline, timeline_of

__all__ = [
    "draw",
    "enable_renderer",
    "evaluation_scores",
    "plot_learning",
    "plot_metric",
    "plot_reward_by_turns",
    "plot_suites",
    "plot_timeline",
    "timeline_of",
]
