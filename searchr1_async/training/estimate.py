"""Cost estimate of a training run from its settings: tokens by kind, dollars, assumptions. Needs no service or tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple

import polars as pl
import tinker
from pydantic import Field

from searchr1_async.billing import Billing, CostEstimate, TokenUsage, amount
from searchr1_async.boundary.paths import FilePath
from searchr1_async.boundary.settings import Positive, Share, check_settings, checked_arguments, settings_of
from searchr1_async.config import RunLearning, TrainConfig, chosen_sizes
from searchr1_async.data.questions import Questions, load_questions, optional_questions
from searchr1_async.episodes.formats import check_format
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.weights import model_name
from searchr1_async.service.connection import is_embedded
from searchr1_async.service.opening import billing_on
from searchr1_async.training.initial_weights import chosen_model, chosen_rank, find_start

TURNS = 3.0
"""Turns per episode, as the Search-R1 recipe of tinker-cookbook reports for Qwen3.5-4B."""
TOKENS_PER_TURN = 100.0
"""Sampled tokens per turn. Published Search-R1 episodes of a 3B model have 36; instruct models write more."""
PASSAGE_TOKENS = 150.0
"""Tokens of a 100-word passage: the mean of Wikipedia passages with SmolLM2's tokenizer."""
INSTRUCTION_TOKENS = {"hermes": 285.0, "tags": 50.0}
"""Prompt tokens before the question, by tool-call format, with SmolLM2's tokenizer."""
_MARKUP_TOKENS = 30.0
"""Around the passages, between two turns."""
_CHARACTERS_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True)
class Assumed:
    """Assumptions about an episode; None: the default, or the value :func:`measured_in` found in a past run."""

    turns: Annotated[float, Field(ge=1)] | None = None
    tokens_per_turn: Positive | None = None
    prompt_tokens: Positive | None = None
    passage_tokens: Positive | None = None
    cached: Share | None = None
    trained: Share | None = None

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class RunShape:
    """How much a run rolls out and trains."""

    config: TrainConfig
    """With rank and all sizes chosen."""
    questions: Sequence[Question]
    """Each is trained on once per epoch."""
    held_out: Sequence[Question]
    search_results: int
    """Passages per search."""

    @cached_property
    def learning(self) -> RunLearning:
        return RunLearning.of(self.config)

    @property
    def groups(self) -> int:
        learning = self.learning
        if learning.steps is None:
            return learning.epochs * len(self.questions)
        return learning.steps * learning.groups_per_batch

    @property
    def episodes(self) -> int:
        """Training episodes."""
        return self.groups * self.learning.group_size

    @property
    def episodes_in_flight(self) -> int:
        """At most: those of the batches that overlap, and of a measurement, which ``evaluate_every`` runs beside them."""
        pipeline, learning, evaluation = self.config.pipeline, self.learning, self.config.evaluation
        groups = (1 + pipeline.max_staleness) * learning.groups_per_batch + pipeline.spare_groups
        training = min(groups * learning.group_size, self.episodes)
        measured = len(self.held_out) * evaluation.held_out_samples
        return max(training, measured) if evaluation.evaluate_every is None else training + measured

    @property
    def total_steps(self) -> int:
        """Optimizer steps; for whole epochs an upper bound, since dropped groups may be replaced."""
        return -(-self.groups // self.learning.groups_per_batch)

    @property
    def measurements(self) -> int:
        """Evaluations on the held-out questions, those of ``evaluate_every`` included."""
        every = self.config.evaluation.evaluate_every
        beside = 0 if every is None else max(0, self.total_steps - 1) // every
        return 2 + (self.config.warm_up is not None) + beside if self.held_out else 0

    @property
    def measured_episodes(self) -> int:
        return self.measurements * len(self.held_out) * self.config.evaluation.held_out_samples

    @property
    def demonstrations(self) -> int:
        """Demonstrations that the warm-up trains on."""
        warm_up = self.config.warm_up
        return 0 if warm_up is None else warm_up.steps * warm_up.batch_size


class EpisodeTokens(NamedTuple):
    """Mean tokens per episode."""

    prompt: float
    """Summed over its turns."""
    cached: float
    """The part of ``prompt`` that is cached."""
    sampled: float
    length: float
    """Of the whole sequence, as trained on."""

    def played(self, times: float) -> TokenUsage:
        return TokenUsage(round(times * self.prompt), round(times * self.cached), round(times * self.sampled))


def estimate_cost(
    questions: Questions,
    config: TrainConfig | None = None,
    *,
    held_out: Questions = (),
    service: str | tinker.ServiceClient | None = None,
    search_results: Annotated[int, Field(ge=1, le=100)] = 3,
    turns: float | None = None,
    tokens_per_turn: float | None = None,
    prompt_tokens: float | None = None,
    passage_tokens: float | None = None,
    cached: float | None = None,
    trained: float | None = None,
    like: FilePath | None = None,
) -> CostEstimate:
    """Estimates the cost of :func:`train` with these settings, without asking a service.

    Args:
        questions, config, held_out, service: as in :func:`train`. The model is that of ``start_from``, if it names a run; for an
            adapter or a ``tinker://`` path, pass ``model`` if it is not the default.
        search_results: passages shown per search.
        turns: mean sampled turns per episode, at least 1; None: 3, or ``max_turns`` if less.
        tokens_per_turn: mean sampled tokens per turn; None: 100, or ``max_tokens`` if less.
        prompt_tokens: tokens of an episode's first prompt; None: from the format and the questions' length.
        passage_tokens: tokens per passage; None: 150, for 100 words.
        cached: fraction of prompt tokens billed as cache hits, 0 to 1; None: each turn's prompt is cached up to the previous
            turn, and a group's first prompt for all members but one.
        trained: fraction of episodes trained on, 0 to 1; None: all.
        like: a past run's folder; its mean episode and its cached and trained fractions replace the six arguments above.

    Raises:
        ConfigurationError: a setting out of range, unusable weights to start from, or ``like`` with an argument it replaces.
        QuestionsError: the questions cannot be read.
        RunFolderError: the past run has no finished step, or the run to start from has not kept the step.
    """
    given = checked_arguments(estimate_cost, locals())
    config = config or TrainConfig()
    check_format(config.episode.format_name)
    items = load_questions(questions)
    sizes = chosen_sizes(config.flat(), questions=len(items), is_embedded=is_embedded(service))
    start = find_start(config.learning.start_from, service) if config.learning.start_from is not None else None
    config = config.replace(**asdict(sizes), lora_rank=chosen_rank(config.learning.lora_rank, start))
    shape = RunShape(config, items, optional_questions(held_out), given["search_results"])
    billing = billing_on(service, chosen_model(model_name(config.model.name, service), start), config.cost.price)
    return estimate(shape, billing, settings_of(Assumed, given), given["like"])


def estimate(
    shape: RunShape, billing: Billing, assumed: Assumed | None = None, like: Path | None = None
) -> CostEstimate:
    """Estimates the cost of a run of this shape."""
    assumed, config = assumed or Assumed(), shape.config
    if like is None:
        trained = 1.0 if assumed.trained is None else assumed.trained
        own, about = _assumed_episode(shape, assumed, shape.learning.group_size)
        held_out, _ = _assumed_episode(shape, assumed, config.evaluation.held_out_samples)
    elif assumed == Assumed():
        own, trained = measured_in(like)
        held_out, about = own, f"Episodes are like those of {like}."
    else:
        raise ConfigurationError(
            "like= takes turns, tokens and fractions from a past run: leave out the other arguments"
        )
    learned = trained * shape.episodes
    training = replace(own.played(shape.episodes), trained=round(learned * (own.length - 1)))
    if shape.learning.kl_coefficient:
        training += TokenUsage(prompt=round(learned * own.length), sampled=round(learned))
    warm_up = TokenUsage(trained=round(shape.demonstrations * (own.length - 1)))
    tokens, steps = training + held_out.played(shape.measured_episodes) + warm_up, shape.total_steps
    dollars, in_training = billing.dollars(tokens), billing.dollars(training)
    by_step = None if in_training is None else in_training / steps
    if billing.is_free:
        text = "nothing, on this machine"
    elif dollars is None or by_step is None:
        text = f"unknown, since {billing.problem}"
    else:
        text = f"{amount(dollars)} for {steps:,} steps ({amount(by_step)} per step)"
    assumptions = [about, *_assumptions(shape, own, trained), *([billing.note] if billing.note else [])]
    return CostEstimate(dollars, by_step, tokens, steps, tuple(assumptions), f"{text}; {tokens}")


def _assumed_episode(shape: RunShape, assumed: Assumed, samples: int) -> tuple[EpisodeTokens, str]:
    """The mean episode of a group of ``samples``, and what it assumes; a fractional number of turns is a mean."""
    limits, passage = shape.config.episode.limits, assumed.passage_tokens or PASSAGE_TOKENS
    turns = min(assumed.turns or TURNS, float(limits.max_turns))
    sampled = min(assumed.tokens_per_turn or TOKENS_PER_TURN, float(limits.max_tokens))
    letters = sum(len(question.question) for question in shape.questions) / len(shape.questions)
    instructions = INSTRUCTION_TOKENS[shape.config.episode.format_name]
    first = assumed.prompt_tokens or instructions + letters / _CHARACTERS_PER_TOKEN
    found = shape.search_results * passage + _MARKUP_TOKENS

    def prompts(count: float) -> float:
        """Tokens of the first prompts, each longer by a turn and its passages; linear between whole counts."""
        whole = int(count)
        return count * first + (whole * (whole - 1) / 2 + (count - whole) * whole) * (sampled + found)

    prompt = prompts(turns)
    cached = first * (samples - 1) / samples + prompts(turns - 1) if assumed.cached is None else assumed.cached * prompt
    episode = EpisodeTokens(prompt, cached, turns * sampled, first + turns * sampled + (turns - 1) * found)
    return episode, (
        f"An episode has {turns:.3g} turns of {sampled:.4g} sampled tokens each; its first prompt has {first:,.0f} tokens, and a "
        f"search shows {shape.search_results} passages of {passage:,.0f} tokens."
    )


def measured_in(folder: Path) -> tuple[EpisodeTokens, float]:
    """The mean finished episode of a past run, and the fraction of its episodes that were trained on."""
    records = RunRecords(folder)
    names = [f"env/all/total_{name}" for name in ("episodes", "ob_tokens", "cached_ob_tokens", "ac_tokens")]
    try:
        metrics = records.metrics()
        episodes, *sums = (float(metrics[name].sum()) if name in metrics.columns else 0.0 for name in names)
        lengths = records.episodes().select(
            pl.col("token_count").filter("trained").mean().alias("trained"),
            pl.col("token_count").mean().alias("all"),
            pl.col("trained").mean().alias("share"),
        )
        length = lengths.collect().row(0, named=True)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunFolderError(f"cannot read the records of {folder}: {error}") from error
    if not episodes:
        raise RunFolderError(f"{folder} has no finished step to estimate from: pass the out_dir of a past run")
    prompt, cached, sampled = (total / episodes for total in sums)
    return EpisodeTokens(prompt, cached, sampled, length["trained"] or length["all"]), float(length["share"] or 0.0)


def _assumptions(shape: RunShape, episode: EpisodeTokens, trained: float) -> list[str]:
    sentences = [
        f"On average an episode has {episode.prompt:,.0f} prompt tokens over all turns, {episode.cached / max(1.0, episode.prompt):.0%} of "
        f"them billed as cache hits, {episode.sampled:,.0f} sampled tokens, and {episode.length:,.0f} tokens to train on.",
        f"{trained:.0%} of the episodes are trained on, the others dropped.",
        f"{shape.episodes:,} training episodes: {shape.groups:,} groups of {shape.learning.group_size}.",
    ]
    if shape.held_out:
        sentences.append(
            f"{shape.measured_episodes:,} more in {shape.measurements} evaluations on the held-out questions."
        )
    if shape.config.warm_up is not None:
        sentences.append(f"The warm-up trains on {shape.demonstrations:,} demonstrations.")
    if shape.learning.kl_coefficient:
        sentences.append("The base model reads every trained episode once more, for the KL penalty.")
    return [*sentences, "Not included: spare and refilled groups, failed requests, the search's own services."]
