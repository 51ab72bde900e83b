"""Reads an evaluation's folder as a report."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.asked import read_questions
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.report import Report
from searchr1_async.evaluation.store import EpisodeStore
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.watch.viewer import load_tokenizer, remember_tokenizer


def open_report(folder: str | Path) -> Report:
    """The report of an evaluation's folder, finished or not. Reads all episodes.

    Raises:
        RunFolderError: the folder contains no evaluation, or cannot be read.
    """
    path = absolute_path(folder, "folder")
    manifest = Manifest.load(path)
    if manifest is None:
        raise RunFolderError(f"{path} contains no evaluation: pass the out_dir of an evaluate() call")
    store = EpisodeStore(path)
    store.load()
    if (tokenizer := load_tokenizer(path)) is not None:
        remember_tokenizer(tokenizer)
    return make_report(store, manifest)


def make_report(store: EpisodeStore, manifest: Manifest) -> Report:
    """The report of a store, with systems in the manifest's order."""
    scores = store.scores()
    evaluations = [evaluation_of(system.label, scores, system.step, store) for system in manifest.systems]
    return Report(evaluations, manifest, store.folder if store.is_kept else None, partial(_questions, store))


def _questions(store: EpisodeStore) -> pl.DataFrame:
    # Takes the store, not its folder: a temporary folder lives only as long as its store.
    return read_questions(store.folder)


def evaluation_of(label: str, scores: pl.DataFrame, step: int | None, store: EpisodeStore | None = None) -> Evaluation:
    """One system's scores; without a store, its episodes cannot be loaded."""
    own = scores.filter(system=label)
    return Evaluation(label, own, step, None if store is None else partial(store.episodes, label))
