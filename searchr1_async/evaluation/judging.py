"""Asking the judge about what is played and not judged yet."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import polars as pl

from searchr1_async.episodes.types import Question
from searchr1_async.evaluation.judge import Judge, judge_answers
from searchr1_async.evaluation.store import EpisodeStore
from searchr1_async.evaluation.systems import MeasuredSystem
from searchr1_async.events import Emit, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.rollout.policy import TinkerPolicy
from searchr1_async.run_folder import writing_records
from searchr1_async.service import Service, load_tokenizer
from searchr1_async.weights import find_weights


async def judge_samples(
    judge: Judge, store: EpisodeStore, systems: Sequence[MeasuredSystem], service: Service, emit: Emit
) -> None:
    """Has the finished answers of these systems judged, and keeps the verdicts.

    Raises:
        ServiceError: too many verdicts failed.
        CheckpointError: the folder cannot be written.
    """
    left = await anyio.to_thread.run_sync(store.unjudged, [each.label for each in systems])
    if left.is_empty():
        return
    keys, items = list(left.select("system", "place", "sample").iter_rows()), _items(left)
    began, judged = anyio.current_time(), 0
    emit(PhaseStarted("judge", len(items), "answers"))

    def advanced(count: int) -> None:
        nonlocal judged
        judged += count
        emit(PhaseAdvanced("judge", judged))

    model = judge.model or service.model_name
    tokenizer = service.tokenizer if model == service.model_name else await load_tokenizer(model)
    client = await service.create_sampling_client(find_weights(judge.checkpoint).path, base_model=model)
    policy = TinkerPolicy(client, 0, judge.sampling)
    verdicts = await judge_answers(judge, items, policy, tokenizer, model_name=model, on_judged=advanced)
    with writing_records(store.folder):
        await anyio.to_thread.run_sync(store.write_judgements, dict(zip(keys, verdicts, strict=True)))
    emit(PhaseEnded("judge", anyio.current_time() - began))


def _items(left: pl.DataFrame) -> list[tuple[Question, str]]:
    """Each answer with its question; none is a blank one."""
    columns = left.select("question_id", "question", "golden_answers", "suite", "answer").iter_rows()
    return [
        (Question(identifier, question, tuple(golden), suite), answer or "")
        for identifier, question, golden, suite, answer in columns
    ]
