"""Charts of a run as Altair objects, to adjust, concatenate, or save as PNG or SVG.

``run.plot(kind)`` calls :func:`draw`; the other functions take data frames directly. Altair is imported on first use.
"""

from searchr1_async.watch.plots.curves import plot_learning, plot_metric
from searchr1_async.watch.plots.data import evaluation_scores
from searchr1_async.watch.plots.drawing import draw
from searchr1_async.watch.plots.outcomes import plot_reward_by_turns, plot_suites
from searchr1_async.watch.plots.theme import enable_renderer
from searchr1_async.watch.plots.timeline import timeline_of
from searchr1_async.watch.plots.waiting import plot_timeline

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
