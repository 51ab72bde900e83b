"""The public function ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tinker

from searchr1_async.config import EpisodeLimits, LocalOptions, SamplingSettings
from searchr1_async.data.questions import Questions, checked_questions
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.evaluation.measure import evaluate_policy
from searchr1_async.evaluation.result import Evaluation
from searchr1_async.events import Emit
from searchr1_async.playing import playing
from searchr1_async.search import Search
from searchr1_async.watch.dashboard import Choice


async def evaluate(
    questions: Questions,
    search: Search,
    *,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    service: str | tinker.ServiceClient | None = None,
    service_folder: str | Path | None = None,
    samples: int = 1,
    label: str = "evaluation",
    reward: RewardFunction | None = None,
    strict_recipe: bool = False,
    format: str = "hermes",
    renderer: str | None = None,
    instructions: str | None = None,
    max_turns: int = 5,
    max_tokens: int = 1024,
    max_trajectory_tokens: int = 32 * 1024,
    malformed_calls: Literal["end", "tell"] = "end",
    temperature: float = 1.0,
    seed: int | None = 0,
    max_failed_fraction: float = 0.2,
    local: LocalOptions | None = None,
    tokenizer: str | None = None,
    progress: Choice = True,
    emit: Emit | None = None,
) -> Evaluation:
    """Plays every question and scores it.

    Args:
        model: the base model, for an untrained measurement; with ``checkpoint`` only where it is not the default.
        checkpoint: a run's folder (its last kept weights), or a ``tinker://…/sampler_weights/…`` path.
        service_folder: the embedded service's folder that holds a ``tinker://`` checkpoint; a run's folder knows its own.
        samples: episodes a question; several narrow the interval.
        temperature: 1 samples as training does, 0 is greedy.

        The others as in :func:`searchr1_async.train`.

    Raises:
        ConfigurationError: bad input, before any work starts.
        TooManyFailuresError: over ``max_failed_fraction`` of the episodes failed.
    """
    items = checked_questions(questions)
    sampling = SamplingSettings(temperature=temperature, seed=seed)
    limits = EpisodeLimits(max_turns, max_tokens, max_trajectory_tokens, malformed_calls=malformed_calls)
    async with playing(
        "evaluate",
        search,
        model=model,
        checkpoint=checkpoint,
        service=service,
        service_folder=service_folder,
        reward=reward or RecipeReward(strict_recipe=strict_recipe),
        format_name=format,
        renderer=renderer,
        instructions=instructions,
        limits=limits,
        sampling=sampling,
        group_size=samples,
        max_failed_fraction=max_failed_fraction,
        local=local,
        tokenizer=tokenizer,
        progress=progress,
        emit=emit,
    ) as (engine, policy):
        return await evaluate_policy(engine, items, policy, samples=samples, label=label, step=policy.version)
