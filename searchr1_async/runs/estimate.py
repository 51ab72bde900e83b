"""Cost estimate of a training run from its settings: tokens by kind, dollars, assumptions. Needs no service or tokenizer."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import polars as pl
import tinker

from searchr1_async.billing import Billing, TokenUsage
from searchr1_async.boundary.paths import FilePath
from searchr1_async.boundary.settings import (
    Positive,
    Range,
    Share,
    check_settings,
    checked_arguments,
    settings_of,
)
from searchr1_async.config import EpisodeLimits, TrainConfig, WarmUp, chosen_sizes
from searchr1_async.config.configs import takes_config
from searchr1_async.data.questions import Questions, checked_questions, optional_questions
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.rollouts import check_format
from searchr1_async.runs.weights import model_name
from searchr1_async.service.connection import is_embedded
from searchr1_async.service.startup import billing_on

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

    turns: Positive | None = None
    tokens_per_turn: Positive | None = None
    prompt_tokens: Positive | None = None
    passage_tokens: Positive | None = None
    cached: Share | None = None
    trained: Share | None = None

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class RunShape:
    """How much a run rolls out and trains."""

    questions: int
    """Training questions, each once per epoch."""
    question_letters: float
    """Mean characters per question."""
    group_size: int
    groups_per_batch: int
    steps: int | None
    """Optimiser steps; None: all batches of ``epochs``."""
    epochs: int
    limits: EpisodeLimits
    format_name: str = "hermes"
    search_results: int = 3
    held_out: int = 0
    """Held-out questions."""
    held_out_samples: int = 1
    evaluate_every: int | None = None
    warm_up: WarmUp | None = None
    has_penalty: bool = False
    """``kl_coefficient`` is above 0: the base model reads every trained episode."""

    @classmethod
    def of(
        cls, config: TrainConfig, *, questions: Sequence[Question], held_out: Sequence[Question], search_results: int
    ) -> RunShape:
        """The shape of a run with these settings, whose sizes are chosen."""
        return settings_of(
            cls,
            config.flat(),
            questions=len(questions),
            question_letters=sum(len(question.question) for question in questions) / len(questions),
            limits=config.episode.limits,
            format_name=config.episode.format_name,
            search_results=search_results,
            held_out=len(held_out),
            has_penalty=config.learning.kl_coefficient > 0,
        )

    @property
    def groups(self) -> int:
        return self.epochs * self.questions if self.steps is None else self.steps * self.groups_per_batch

    @property
    def total_steps(self) -> int:
        return -(-self.groups // self.groups_per_batch)

    @property
    def measurements(self) -> int:
        """Evaluations on the held-out questions, those of ``evaluate_every`` included."""
        if not self.held_out:
            return 0
        beside = 0 if self.evaluate_every is None else max(0, self.total_steps - 1) // self.evaluate_every
        return 2 + (self.warm_up is not None) + beside


@dataclass(frozen=True, slots=True)
class EpisodeTokens:
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


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Estimated cost of a run. ``print`` it, or display it in a notebook cell."""

    dollars: float | None
    """Expected US dollars; None if the price is unknown."""
    high_dollars: float | None
    """US dollars if every episode reached its limits and nothing were cached."""
    dollars_per_step: float | None
    """Expected, for training only: without the warm-up and evaluations."""
    tokens: TokenUsage
    """Expected, by kind."""
    high_tokens: TokenUsage
    """Tokens behind ``high_dollars``."""
    steps: int
    """Optimiser steps."""
    assumptions: tuple[str, ...]
    """The assumptions, as sentences."""
    text: str
    """One-line summary."""

    def __str__(self) -> str:
        return "\n".join([f"Estimated cost: {self.text}.", *(f"  - {sentence}" for sentence in self.assumptions)])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td style='text-align:right'>{expected:,}</td>"
            f"<td style='text-align:right'>{high:,}</td></tr>"
            for name, expected, high in (
                ("prompt tokens", self.tokens.prompt, self.high_tokens.prompt),
                ("of them cached", self.tokens.cached, self.high_tokens.cached),
                ("sampled tokens", self.tokens.sampled, self.high_tokens.sampled),
                ("trained tokens", self.tokens.trained, self.high_tokens.trained),
            )
        )
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.assumptions)
        return (
            f"<div><p><b>Estimated cost:</b> {html.escape(self.text)}.</p>"
            f"<table><tr><th></th><th>expected</th><th>at the limits</th></tr>{rows}</table><ul>{items}</ul></div>"
        )


@takes_config(TrainConfig)
def estimate_cost(
    questions: Questions,
    config: TrainConfig | None = None,
    *,
    held_out: Questions = (),
    service: str | tinker.ServiceClient | None = None,
    search_results: Annotated[int, Range(at_least=1, at_most=100)] = 3,
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
        questions, config, held_out, service: as in :func:`train`.
        search_results: passages shown per search.
        turns: mean sampled turns per episode; None: 3, or ``max_turns`` if less.
        tokens_per_turn: mean sampled tokens per turn; None: 100, or ``max_tokens`` if less.
        prompt_tokens: tokens of an episode's first prompt; None: from the format and the questions' length.
        passage_tokens: tokens per passage; None: 150, for 100 words.
        cached: fraction of prompt tokens billed as cache hits, 0 to 1; None: each turn's prompt is cached up to the previous
            turn, and a group's first prompt for all members but one.
        trained: fraction of episodes trained on, 0 to 1; None: all.
        like: a past run's folder; its mean episode and its cached and trained fractions replace the six arguments above.

    Raises:
        ConfigurationError: a setting out of range, or ``like`` together with an argument it replaces.
        QuestionsError: the questions cannot be read.
        RunFolderError: the past run has no finished step.
    """
    given = checked_arguments(estimate_cost, locals())
    config = config or TrainConfig()
    check_format(config.episode.format_name)
    items = checked_questions(questions)
    sizes = chosen_sizes(config.flat(), questions=len(items), is_embedded=is_embedded(service))
    shape = RunShape.of(
        config.replace(**asdict(sizes)),
        questions=items,
        held_out=optional_questions(held_out),
        search_results=given["search_results"],
    )
    billing = billing_on(service, model_name(config.model.name, service), config.cost.price)
    return estimate(shape, billing, settings_of(Assumed, given), given["like"])


def estimate(
    shape: RunShape, billing: Billing, assumed: Assumed | None = None, like: Path | None = None
) -> CostEstimate:
    """Estimates the cost of a run of this shape.

    Args:
        like: the folder of a past run whose mean episode is used.

    Raises:
        ConfigurationError: both ``like`` and values that it replaces are given.
        RunFolderError: the past run has no finished step.
    """
    assumed = assumed or Assumed()
    if like is None:
        trained = 1.0 if assumed.trained is None else assumed.trained
        played = [_expected(shape, assumed, samples) for samples in (shape.group_size, shape.held_out_samples)]
        sentences = list(_assumptions(shape, assumed, trained))
    else:
        if assumed != Assumed():
            raise ConfigurationError(
                "like= takes turns, tokens and fractions from a past run: leave out the other arguments"
            )
        own, trained = measured_in(like)
        played = [own, own]
        sentences = list(_measured_assumptions(like, own, trained))
    own, held_out = played
    expected = _training(shape, own, trained) + _extras(shape, own, held_out)
    longest = _longest(shape, assumed)
    high = _training(shape, longest, 1.0) + _extras(shape, longest, longest)
    sentences += _scope(shape)
    sentences.append(billing.note or ("Nothing is billed." if billing.is_free else f"No dollars: {billing.problem}."))
    return _priced(shape, billing, expected, high, _training(shape, own, trained), tuple(sentences))


def _priced(
    shape: RunShape,
    billing: Billing,
    expected: TokenUsage,
    high: TokenUsage,
    training: TokenUsage,
    sentences: tuple[str, ...],
) -> CostEstimate:
    steps = shape.total_steps
    dollars, most, in_training = (billing.dollars(tokens) for tokens in (expected, high, training))
    by_step = None if in_training is None else in_training / steps
    if billing.is_free:
        text = f"nothing, on this machine; {expected}"
    elif dollars is None or most is None or by_step is None:
        text = f"unknown, since {billing.problem}; {expected}"
    else:
        count = f"{steps:,} step" + ("s" if steps != 1 else "")
        text = (
            f"{billing.amount(dollars)} for {count} ({billing.amount(by_step)} per step), {billing.amount(most)} if every "
            f"episode reached its limits; {expected}"
        )
    return CostEstimate(dollars, most, by_step, expected, high, steps, sentences, text)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _training(shape: RunShape, episode: EpisodeTokens, trained: float) -> TokenUsage:
    """Tokens of all training episodes, dropped ones included."""
    episodes = shape.groups * shape.group_size
    learned = trained * episodes
    used = replace(episode.played(episodes), trained=round(learned * (episode.length - 1)))
    if shape.has_penalty:
        used += TokenUsage(prompt=round(learned * episode.length), sampled=round(learned))
    return used


def _extras(shape: RunShape, episode: EpisodeTokens, held_out: EpisodeTokens) -> TokenUsage:
    """Tokens of the evaluations and the warm-up."""
    used = held_out.played(shape.measurements * shape.held_out * shape.held_out_samples)
    if shape.warm_up is not None:
        used += TokenUsage(trained=round(shape.warm_up.steps * shape.warm_up.batch_size * (episode.length - 1)))
    return used


def _turns(shape: RunShape, assumed: Assumed) -> float:
    return min(assumed.turns or TURNS, float(shape.limits.max_turns))


def _first_prompt(shape: RunShape, assumed: Assumed) -> float:
    instructions = INSTRUCTION_TOKENS.get(shape.format_name, INSTRUCTION_TOKENS["hermes"])
    return assumed.prompt_tokens or instructions + shape.question_letters / _CHARACTERS_PER_TOKEN


def _search_tokens(shape: RunShape, assumed: Assumed) -> float:
    """Tokens added between two turns."""
    return shape.search_results * (assumed.passage_tokens or PASSAGE_TOKENS) + _MARKUP_TOKENS


def _expected(shape: RunShape, assumed: Assumed, samples: int) -> EpisodeTokens:
    """The mean episode of a group of ``samples``; interpolates a fractional number of turns."""
    turns = _turns(shape, assumed)
    sampled = min(assumed.tokens_per_turn or TOKENS_PER_TURN, float(shape.limits.max_tokens))
    found, first = _search_tokens(shape, assumed), _first_prompt(shape, assumed)
    below = math.floor(turns)
    low, high = (_with_turns(count, sampled, found, first, samples) for count in (below, below + 1))
    share = turns - below
    mean = EpisodeTokens(
        *(
            (1 - share) * getattr(low, name) + share * getattr(high, name)
            for name in ("prompt", "cached", "sampled", "length")
        )
    )
    return mean if assumed.cached is None else replace(mean, cached=assumed.cached * mean.prompt)


def _with_turns(turns: int, sampled: float, found: float, first: float, samples: int) -> EpisodeTokens:
    prompts = [first + number * (sampled + found) for number in range(turns)]
    shared = first * (samples - 1) / samples if turns else 0.0
    length = first + turns * sampled + max(0, turns - 1) * found
    return EpisodeTokens(sum(prompts), shared + sum(prompts[:-1]), turns * sampled, length)


def _longest(shape: RunShape, assumed: Assumed) -> EpisodeTokens:
    """An episode with as many and as long turns as the limits allow, each but the last with a one-query search."""
    limits, found = shape.limits, _search_tokens(shape, assumed)
    length, prompt, sampled, turns = _first_prompt(shape, assumed), 0.0, 0.0, 0
    while turns < limits.max_turns and length + limits.max_tokens <= limits.max_trajectory_tokens:
        prompt += length
        sampled += limits.max_tokens
        length += limits.max_tokens + found
        turns += 1
    return EpisodeTokens(prompt, 0.0, sampled, length - (found if turns else 0.0))


def measured_in(folder: Path) -> tuple[EpisodeTokens, float]:
    """The mean finished episode of a past run, and the fraction of its episodes that were trained on.

    Raises:
        RunFolderError: the run has no finished step with an episode, or cannot be read.
    """
    records = RunRecords(folder)
    try:
        metrics = records.metrics()
        names = ("total_episodes", "total_ob_tokens", "total_cached_ob_tokens", "total_ac_tokens")
        sums = {
            name: float(metrics[column].fill_null(0).sum()) if (column := f"env/all/{name}") in metrics.columns else 0.0
            for name in names
        }
        lengths = records.episodes().select(
            pl.col("token_count").filter("trained").mean().alias("trained"),
            pl.col("token_count").mean().alias("all"),
            pl.col("trained").mean().alias("share"),
        )
        length = lengths.collect().row(0, named=True)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunFolderError(f"cannot read the records of {folder}: {error}") from error
    episodes = sums["total_episodes"]
    if not episodes:
        raise RunFolderError(f"{folder} has no finished step to estimate from: pass the out_dir of a past run")
    prompt, cached, sampled = (sums[name] / episodes for name in names[1:])
    return EpisodeTokens(prompt, cached, sampled, length["trained"] or length["all"]), float(length["share"] or 0.0)


# --- text -------------------------------------------------------------------------------------------------------------


def _assumptions(shape: RunShape, assumed: Assumed, trained: float) -> Iterator[str]:
    turns = _turns(shape, assumed)
    sampled = min(assumed.tokens_per_turn or TOKENS_PER_TURN, float(shape.limits.max_tokens))
    passage, first = assumed.passage_tokens or PASSAGE_TOKENS, _first_prompt(shape, assumed)
    yield f"An episode has {turns:.3g} turns of {sampled:.4g} sampled tokens each."
    yield f"Its first prompt has {first:,.0f} tokens; a search shows {shape.search_results} passages of {passage:,.0f} tokens."
    if assumed.cached is None:
        yield (
            "The service caches a turn's prompt up to the previous turn, and the first prompt of a group for all members but "
            "one."
        )
    else:
        yield f"{assumed.cached:.0%} of the prompt tokens are billed as cache hits."
    if trained == 1:
        yield "Every group is trained on; dropping groups with equal rewards would save their training."
    else:
        yield f"{trained:.0%} of the episodes are trained on, the others dropped."


def _measured_assumptions(folder: Path, episode: EpisodeTokens, trained: float) -> Iterator[str]:
    yield (
        f"Episodes are like those of {folder}: on average {episode.prompt:,.0f} prompt tokens over all turns, "
        f"{episode.sampled:,.0f} sampled tokens, {episode.length:,.0f} tokens trained on."
    )
    yield f"As there, {episode.cached / episode.prompt if episode.prompt else 0:.0%} of the prompt tokens are billed as cache hits."
    yield f"As there, {trained:.0%} of the episodes are trained on, the others dropped."


def _scope(shape: RunShape) -> Sequence[str]:
    episodes = shape.groups * shape.group_size
    said = [f"{episodes:,} training episodes: {shape.groups:,} groups of {shape.group_size}."]
    if shape.held_out:
        count = shape.measurements * shape.held_out * shape.held_out_samples
        said.append(f"{count:,} more in {shape.measurements} evaluations on the held-out questions.")
    if shape.warm_up is not None:
        said.append(f"The warm-up trains on {shape.warm_up.steps * shape.warm_up.batch_size:,} demonstrations.")
    if shape.has_penalty:
        said.append("The base model reads every trained episode once more, for the KL penalty.")
    said.append("Not included: spare and refilled groups, failed requests, the search's own services.")
    return said
