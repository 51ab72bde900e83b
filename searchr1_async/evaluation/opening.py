"""Opens an evaluation's services and checks that everything it needs is available."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import anyio

from searchr1_async.episodes.rendering import select_renderer
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.job import EvaluationJob, ServiceStage
from searchr1_async.evaluation.judging import open_judge
from searchr1_async.events import Emit
from searchr1_async.runs.rollouts import check_prompt, opened_service, policy_of
from searchr1_async.service.connection import Service, is_embedded
from searchr1_async.service.startup import check_service, default_model, load_embedded_tokenizer

OpenedStage = tuple[ServiceStage, Service | None]
"""A stage and its service; None for an embedded service, which starts when its stage runs."""


async def open_stages(
    job: EvaluationJob, stages: Sequence[ServiceStage], stack: AsyncExitStack, emit: Emit
) -> list[OpenedStage]:
    """Connects to the services and checks models, prompts, weights and the judge. Writes nothing.

    ``stack`` closes the services. Raises ConfigurationError or ServiceError if something is not available.
    """
    opened: list[OpenedStage] = []
    for stage in stages:
        if is_embedded(job.choice.service):
            await _check_embedded(job, stage)
            opened.append((stage, None))
            continue
        service = await stack.enter_async_context(opened_service(stage.choice, None, emit))
        await _check_prompts(job, stage, service.model_name, service.tokenizer)
        for weights in {each.weights.path: each.weights for each in stage.systems}.values():
            await policy_of(service, weights, job.play.sampling)
        if job.found_judge is not None:
            await open_judge(job.found_judge, service)
        opened.append((stage, service))
    return opened


async def _check_embedded(job: EvaluationJob, stage: ServiceStage) -> None:
    choice = stage.choice
    await check_service(choice.service, choice.model, choice.local)
    model = choice.model or default_model(choice.service)
    tokenizer = await load_embedded_tokenizer(model, choice.tokenizer)
    await _check_prompts(job, stage, model, tokenizer)
    if (found := job.found_judge) is None:
        return
    await anyio.to_thread.run_sync(select_renderer, model, tokenizer, found.judge.renderer)
    if found.weights.service_folder not in (None, stage.folder):
        raise ConfigurationError(
            f"an embedded service has the weights of one folder: the one of {stage.systems[0].label!r} lacks the judge's, "
            f"which are in {found.weights.service_folder}. Judge with the base model, or evaluate on a service that has both"
        )


async def _check_prompts(job: EvaluationJob, stage: ServiceStage, model: str, tokenizer: Any) -> None:
    for each in stage.systems:
        settings = job.settings_of(each)
        await anyio.to_thread.run_sync(check_prompt, each.label, model, tokenizer, settings, each.system.method)
