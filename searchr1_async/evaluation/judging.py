"""Resolves an evaluation's judge and has it judge finished samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import polars as pl

from searchr1_async.boundary.waits import GatheredItems
from searchr1_async.episodes.rendering import load_tokenizer, select_renderer
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.judge import Judge, judge_answers
from searchr1_async.evaluation.store import JUDGEMENTS_NAME, EpisodeStore, SampleKey
from searchr1_async.evaluation.systems import MeasuredSystem
from searchr1_async.events import Emit, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.rollout.player import TinkerPolicy
from searchr1_async.runs.folder import writing_records
from searchr1_async.runs.weights import Weights, find_weights
from searchr1_async.service.availability import choose_model
from searchr1_async.service.connection import Service

_WRITE_INTERVAL = 1.0
"""Seconds between coalesced writes; a kill loses at most this."""
_IRRELEVANT_FIELDS = ("deadline", "at_once")
"""Settings that do not affect verdicts."""


@dataclass(frozen=True, slots=True)
class FoundJudge:
    judge: Judge
    model: str
    weights: Weights

    def describe(self) -> dict[str, Any]:
        """:meth:`Judge.describe` with the resolved model."""
        return self.judge.describe() | {"model": self.model}


def find_judge(judge: Judge, models: Collection[str], *, is_embedded: bool) -> FoundJudge:
    """Resolves a judge for systems with these base models.

    Raises ConfigurationError if its model is ambiguous, contradicts its run or is not available; RunFolderError for a bad folder.
    """
    weights = find_weights(judge.checkpoint)
    if judge.model is not None and weights.base_model not in (None, judge.model):
        raise ConfigurationError(
            f"the judge in {judge.checkpoint} was trained from {weights.base_model}, not from {judge.model}: omit its model"
        )
    named, shown = judge.model or weights.base_model, ", ".join(sorted(models))
    if is_embedded and set(models) != {named or next(iter(models))}:
        raise ConfigurationError(
            f"an embedded service has one model, here {shown}, so the judge ({named or 'no model given'}) cannot judge all "
            "systems: omit the judge's model if all systems share one, or evaluate on a service that has it"
        )
    if named is None and len(models) > 1:
        raise ConfigurationError(f"the systems have several models ({shown}): choose the judge's with Judge(model=…)")
    return FoundJudge(judge, named or next(iter(models)), weights)


@dataclass(frozen=True, slots=True)
class OpenJudge:
    policy: TinkerPolicy
    tokenizer: Any


async def open_judge(found: FoundJudge, service: Service) -> OpenJudge:
    """Connects a judge to a service. Raises ModelError or ServiceError if anything of it is not available there."""
    is_same = found.model == service.model_name
    choose_model(found.model, service.offered)  # raises if the service does not offer it
    tokenizer = service.tokenizer if is_same else await load_tokenizer(found.model)
    await anyio.to_thread.run_sync(select_renderer, found.model, tokenizer, found.judge.renderer)
    client = await service.create_sampling_client(found.weights.path, base_model=found.model)
    return OpenJudge(TinkerPolicy(client, found.weights.step or 0, found.judge.sampling), tokenizer)


class VerdictWriter(GatheredItems[Mapping[SampleKey, float | None]]):
    """Coalesces verdicts and writes them in a worker thread. :meth:`writing` raises CheckpointError in an exception group."""

    def __init__(self, store: EpisodeStore) -> None:
        super().__init__(self._put, _WRITE_INTERVAL)
        self._store = store

    async def _put(self, verdicts: list[Mapping[SampleKey, float | None]]) -> None:
        together = {key: verdict for each in verdicts for key, verdict in each.items()}
        with writing_records(self._store.folder):
            await anyio.to_thread.run_sync(self._store.write_judgements, together)


async def judge_samples(
    found: FoundJudge, store: EpisodeStore, systems: Sequence[MeasuredSystem], service: Service, emit: Emit
) -> None:
    """Judges the finished samples of these systems and writes the verdicts; failed requests stay open.

    Raises ModelError, ServiceError or CheckpointError, also within exception groups.
    """
    left = await anyio.to_thread.run_sync(store.unjudged, [each.label for each in systems])
    if left.is_empty():
        return
    keys, items = list(left.select("system", "place", "sample").iter_rows()), _items(left)
    began, judged, writer = anyio.current_time(), 0, VerdictWriter(store)
    emit(PhaseStarted("judge", len(items), "answers"))

    def taken(verdicts: Mapping[int, float | None]) -> None:
        nonlocal judged
        judged += len(verdicts)
        writer.take({keys[place]: verdict for place, verdict in verdicts.items()})
        emit(PhaseAdvanced("judge", judged))

    opened = await open_judge(found, service)
    async with writer.writing():
        await judge_answers(
            found.judge, items, opened.policy, opened.tokenizer, model_name=found.model, on_judged=taken
        )
    emit(PhaseEnded("judge", anyio.current_time() - began))


def _items(left: pl.DataFrame) -> list[tuple[Question, str]]:
    """(question, answer) pairs; a missing answer is blank."""
    columns = left.select("question_id", "question", "golden_answers", "suite", "answer").iter_rows()
    return [
        (Question(identifier, question, tuple(golden), suite), answer or "")
        for identifier, question, golden, suite, answer in columns
    ]


def archive_verdicts(folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Archives verdicts of a different judge and restores those of the current one, so that no file mixes two judges.

    Called before and after the manifest is updated: a kill in between then loses nothing. Raises OSError.
    """
    current = folder / JUDGEMENTS_NAME
    if before is not None and judge_digest(before) != (now and judge_digest(now)) and current.exists():
        current.replace(_archive_path(folder, before))
    if now is not None and judge_digest(now) == (before and judge_digest(before)):
        kept = _archive_path(folder, now)
        if kept.exists() and not current.exists():
            kept.replace(current)


def judge_digest(judge: Mapping[str, Any]) -> str:
    """Digest of the settings that verdicts depend on, as described in a manifest."""
    values = {name: value for name, value in judge.items() if name not in _IRRELEVANT_FIELDS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _archive_path(folder: Path, judge: Mapping[str, Any]) -> Path:
    return folder / f"judgements-{judge_digest(judge)}.parquet"
