"""The judge of an evaluation: who it is, and asking it about what is played and not judged yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import polars as pl

from searchr1_async.connection import Service
from searchr1_async.episodes.rendering import select_renderer
from searchr1_async.episodes.tokenizers import load_tokenizer
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.judge import Judge, judge_answers
from searchr1_async.evaluation.store import JUDGEMENTS_NAME, EpisodeStore, SampleKey
from searchr1_async.evaluation.systems import MeasuredSystem
from searchr1_async.events import Emit, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.gathered import GatheredItems
from searchr1_async.offered import choose_model
from searchr1_async.rollout.policy import TinkerPolicy
from searchr1_async.run_folder import writing_records
from searchr1_async.weights import Weights, find_weights

_GATHERING = 1.0
"""Seconds in which verdicts gather: what a kill may cost. All are written each time: 350,000 take 30 ms."""
_OF_NO_WEIGHT = ("deadline", "at_once")
"""What may differ between judges that give the same verdicts."""


@dataclass(frozen=True, slots=True)
class FoundJudge:
    """A judge, its model named and its weights found."""

    judge: Judge
    model: str
    """The base model, as the service calls it."""
    weights: Weights

    def describe(self) -> dict[str, Any]:
        """As :meth:`Judge.describe`, the model named."""
        return self.judge.describe() | {"model": self.model}


def find_judge(judge: Judge, models: Collection[str], *, is_embedded: bool) -> FoundJudge:
    """The judge of systems of these base models. Reads small files of its run's folder alone.

    Raises:
        ConfigurationError: it names no model where the systems have several, or none that can be had.
        RunFolderError: its folder holds no run.
    """
    weights = find_weights(judge.checkpoint)
    if judge.model is not None and weights.base_model not in (None, judge.model):
        raise ConfigurationError(
            f"the judge in {judge.checkpoint} was trained from {weights.base_model}, not from {judge.model}: leave its model out"
        )
    named, held = judge.model or weights.base_model, ", ".join(sorted(models))
    if is_embedded and set(models) != {named or next(iter(models))}:
        raise ConfigurationError(
            f"an embedded service holds one model, here {held}, so one judge, {named or 'of no model named'}, cannot judge all: "
            "leave the judge's model out where all systems have one, or evaluate on a service that has it too"
        )
    if named is None and len(models) > 1:
        raise ConfigurationError(
            f"the systems have several models ({held}), and one judge must judge them all: name its own with Judge(model=…)"
        )
    return FoundJudge(judge, named or next(iter(models)), weights)


@dataclass(frozen=True, slots=True)
class OpenJudge:
    """A judge that can be asked."""

    policy: TinkerPolicy
    tokenizer: Any


async def open_judge(found: FoundJudge, service: Service) -> OpenJudge:
    """The judge on a service that has it.

    Raises:
        ModelError: the service does not offer its model, or its tokenizer or its chat format is not to be had.
        ServiceError: the service has no such weights, or no answer.
    """
    is_same = found.model == service.model_name
    choose_model(found.model, service.offered)  # refuses one that the service does not offer
    tokenizer = service.tokenizer if is_same else await load_tokenizer(found.model)
    await anyio.to_thread.run_sync(select_renderer, found.model, tokenizer, found.judge.renderer)
    client = await service.create_sampling_client(found.weights.path, base_model=found.model)
    return OpenJudge(TinkerPolicy(client, found.weights.step or 0, found.judge.sampling), tokenizer)


class VerdictWriter(GatheredItems[Mapping[SampleKey, float | None]]):
    """Takes verdicts as they come and puts them on disk, many at a time, in a worker thread.

    :meth:`writing` raises CheckpointError where the folder cannot be written, within an exception group.
    """

    def __init__(self, store: EpisodeStore) -> None:
        super().__init__(self._put, _GATHERING)
        self._store = store

    async def _put(self, verdicts: list[Mapping[SampleKey, float | None]]) -> None:
        together = {key: verdict for each in verdicts for key, verdict in each.items()}
        with writing_records(self._store.folder):
            await anyio.to_thread.run_sync(self._store.write_judgements, together)


async def judge_samples(
    found: FoundJudge, store: EpisodeStore, systems: Sequence[MeasuredSystem], service: Service, emit: Emit
) -> None:
    """Has the finished answers of these systems judged, and keeps the verdicts; those that the service failed stay open.

    Raises, also within exception groups:
        ModelError: the judge's tokenizer or chat format is not to be had.
        ServiceError: too many verdicts failed, or it has no such judge.
        CheckpointError: the folder cannot be written.
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
    """Each answer with its question; none is a blank one."""
    columns = left.select("question_id", "question", "golden_answers", "suite", "answer").iter_rows()
    return [
        (Question(identifier, question, tuple(golden), suite), answer or "")
        for identifier, question, golden, suite, answer in columns
    ]


def lay_verdicts(folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Lays another judge's verdicts aside, and this one's where they belong, so that no file ever holds those of two. Call it
    before the manifest names the new one, and once more behind that: a kill in between mixes and loses nothing.

    Raises:
        OSError: a file cannot be moved.
    """
    current = folder / JUDGEMENTS_NAME
    if before is not None and judge_digest(before) != (now and judge_digest(now)) and current.exists():
        current.replace(_aside(folder, before))
    if now is not None and judge_digest(now) == (before and judge_digest(before)):
        kept = _aside(folder, now)
        if kept.exists() and not current.exists():
            kept.replace(current)


def judge_digest(judge: Mapping[str, Any]) -> str:
    """Of all that a judge's verdicts depend on, as a manifest describes it."""
    values = {name: value for name, value in judge.items() if name not in _OF_NO_WEIGHT}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _aside(folder: Path, judge: Mapping[str, Any]) -> Path:
    return folder / f"judgements-{judge_digest(judge)}.parquet"
