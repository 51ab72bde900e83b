"""Resolves defaults of an evaluation from its earlier session or the service."""

from __future__ import annotations

from dataclasses import replace

import anyio

from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.evaluation.job import EvaluationJob
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.events import Emit, Notice
from searchr1_async.service.connection import is_embedded
from searchr1_async.service.startup import choose_service_model


async def settled(job: EvaluationJob, emit: Emit) -> EvaluationJob:
    """The job with its default model resolved: from the session being resumed, else from the service.

    Raises ServiceError, or ModelError if the service offers neither the default nor another model of its family.
    """
    earlier = None
    if job.resume and job.out_dir is not None:
        earlier = await anyio.to_thread.run_sync(Manifest.load, job.out_dir)
    if earlier is not None and "thinking" not in earlier.settings and job.play.thinking is None:
        # Started by an older version: keep the setting of its first episodes.
        job = replace(job, play=replace(job.play, thinking=AS_TEMPLATE))
    if earlier is not None and "follows_runs" not in earlier.settings:
        job = replace(job, follows_runs=False)
    unnamed = [each.label for each in job.systems if job.choice_of(each).model is None]
    if not unnamed or is_embedded(job.choice.service):
        return job
    then = {record.label: record.model for record in earlier.systems} if earlier is not None else {}
    model = then.get(unnamed[0])
    if model is None:
        model, note = await choose_service_model(job.choice.service, None)
        if note is not None:
            emit(Notice(note))
    return replace(job, choice=replace(job.choice, model=model))
