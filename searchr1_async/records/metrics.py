"""The metrics of a step: the one table of their names (:data:`METRICS`), and their values from the step's groups. Pure.

Console, live view, charts, trackers, report and ``docs/metrics.md`` take labels, formats and bounds from the table. Names follow
tinker-cookbook's Search-R1 recipe, so curves are comparable. Two deliberate differences: ``stop/<reason>`` are fractions of *all*
episodes (the recipe averages them only where present, so they always read 1.0), and a missing reward part counts as 0.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from searchr1_async.billing import prompt_lengths
from searchr1_async.episodes.reward import normalize_answer
from searchr1_async.episodes.table import GroupOutcome
from searchr1_async.episodes.types import Episode, Group, Passage, StopReason

GOOD_REWARD = 0.5
"""Reward from which a constant group counts as ``by_group/frac_all_good`` (the recipe's threshold)."""

DROP_REASONS = ("constant_reward", "too_few_episodes", "too_slow", "step_time_limit")
"""Every reason to drop a group; all are always in the metrics, so curves have no gaps."""

OF_ALL = "env/all/"
"""Prefix of the means over all of a step's episodes; ``env/<suite>/`` has the same names for one suite."""


@dataclass(frozen=True, slots=True)
class Metric:
    """How one number is called and shown everywhere."""

    column: str
    """Its name in events, trackers and a run's Parquet; ``<part>`` stands for any text."""
    label: str
    unit: str
    form: str
    """Number format, read alike by Python and by d3."""
    low: float | None
    high: float | None
    """Bounds of its values; None without one."""
    better: Literal["up", "down", ""]
    """Which way training should move it; empty where neither is better."""
    meaning: str
    alias: str = ""
    """A second name that ``run.plot`` accepts."""

    @property
    def name(self) -> str:
        """The column without :data:`OF_ALL`: the key in progress events and in the rows of the live view."""
        return self.column.removeprefix(OF_ALL)

    @property
    def is_share(self) -> bool:
        return self.form.endswith("%")

    @property
    def heading(self) -> str:
        """Label for an axis or a panel, with the unit: ``turns per episode``."""
        return f"{self.label} {self.unit}" if self.unit.startswith("per ") else self.label

    def text(self, value: float) -> str:
        """``value`` in this metric's format."""
        return format(value, self.form)


def _metric(line: str) -> Metric:
    column, label, unit, form, bounds, better, meaning, *alias = (part.strip() for part in line.split("|"))
    low, high = (float(bound) if bound else None for bound in (part.strip() for part in bounds.split("..")))
    assert better in ("up", "down", "")
    return Metric(column, label, unit, form, low, high, better, meaning, *alias)


_TABLE = """
env/all/reward/total | reward | | +.3f | .. | up | mean reward of finished episodes | reward
env/all/correct | exact match | | .1% | 0..1 | up | fraction of answers that equal a golden answer after normalisation | exact_match
env/all/turns_per_episode | turns | per episode | .2f | 1.. | | sampled turns per episode | turns
env/all/valid_calls | valid calls | | .0% | 0..1 | up | fraction of tool calls that could be read and run
env/all/malformed_call | malformed calls | | .1% | 0..1 | down | fraction of tool calls that could not be read or run
env/all/searches_per_episode | searches | per episode | .2f | 0.. | | executed queries per episode, a given first search included | searches
env/all/answer_in_passage | answer seen | | .1% | 0..1 | up | fraction of episodes whose model read a passage with a golden answer
env/all/format | format | | .1% | 0..1 | up | fraction of episodes whose answer could be read
env/all/f1 | F1 | | .1% | 0..1 | up | token F1 against the best golden answer
env/all/cover | cover match | | .1% | 0..1 | up | fraction of answers that contain a golden answer as whole words
env/all/<reward part> | reward part | | .3f | .. | | mean of any other part that a reward function returns; a missing one counts as 0
env/all/total_episodes | finished episodes | episodes | ,.0f | 0.. | | episodes that did not fail
env/all/failed_episodes | failed episodes | episodes | ,.0f | 0.. | down | episodes that a broken service ended
env/all/stop/<reason> | stopped | | .1% | 0..1 | | fraction of all episodes that ended for this reason, failed ones included
env/all/total_turns | turns | turns | ,.0f | 0.. | | sampled turns in total
env/all/total_ac_tokens | sampled tokens | tokens | ,.0f | 0.. | | tokens that the model sampled
env/all/total_ob_tokens | prompt tokens | tokens | ,.0f | 0.. | | tokens of the whole prompt of every turn
env/all/total_cached_ob_tokens | cached prompt tokens | tokens | ,.0f | 0.. | | prompt tokens billed as cache hits
env/all/cached_ob_frac | cached prompt | | .1% | 0..1 | up | fraction of prompt tokens billed as cache hits
env/all/ac_tokens_per_turn | sampled tokens | per turn | .1f | 0.. | | sampled tokens per turn
env/all/ob_tokens_per_turn | prompt tokens | per turn | .1f | 0.. | | prompt tokens per turn
env/all/by_group/frac_mixed | mixed groups | | .1% | 0..1 | up | fraction of groups whose rewards differ: only these are learned from
env/all/by_group/frac_all_good | good groups | | .1% | 0..1 | | fraction of groups whose rewards are all equal and at least 0.5
env/all/by_group/frac_all_bad | bad groups | | .1% | 0..1 | down | fraction of groups whose rewards are all equal and below 0.5
env/all/staleness | staleness | optimiser steps | .2f | 0.. | down | steps by which sampling weights are older than those trained, mean over turns
env/all/staleness_max | largest staleness | optimiser steps | .0f | 0.. | down | the same for the oldest turn
groups/trained | trained groups | groups | ,.0f | 0.. | up | groups that were trained on
groups/dropped/<reason> | dropped groups | groups | ,.0f | 0.. | down | groups not trained on, by reason
groups/cut_members | cut episodes | episodes | ,.0f | 0.. | down | episodes that a time limit ended
groups/version_spread | version spread | optimiser steps | .2f | 0.. | down | newest minus oldest policy version of a group, mean over groups
groups/version_spread_step | version spread of the step | optimiser steps | .0f | 0.. | down | newest minus oldest policy version of the step
optim/loss | loss | | .4f | .. | | sum of the loss over the batch
optim/lr | learning rate | | .2e | 0.. | | learning rate of the step
optim/steps | optimiser steps | | .0f | 1.. | | optimiser steps of the batch
optim/tokens | trained tokens | tokens | ,.0f | 0.. | | sampled tokens that were trained on
optim/datums | examples | examples | ,.0f | 0.. | | training examples, one per episode
optim/fallback_datums | fallback examples | examples | ,.0f | 0.. | | examples trained with the fallback loss
optim/minibatches | minibatches | | .0f | 0.. | | gradients that the batch was split into
optim/tokens_per_minibatch_min | smallest minibatch | tokens | ,.0f | 0.. | | sampled tokens of the smallest minibatch
optim/tokens_per_minibatch_max | largest minibatch | tokens | ,.0f | 0.. | | sampled tokens of the largest minibatch
optim/entropy | entropy | nats per token | .3f | .. | | mean of -log p(sampled token) under the sampler
optim/kl_sample_train_v1 | KL sampler to trainer, k1 | nats per token | .4f | .. | down | mean of log p_sampler - log p_trainer
optim/kl_sample_train_v2 | KL sampler to trainer, k2 | nats per token | .4f | 0.. | down | half the mean square of log p_sampler - log p_trainer
optim/kl_base | KL to the base model | nats per token | .4f | .. | | mean of log p_sampler - log p_base, with a penalty only
optim/<service metric> | metric of the service | | .4f | .. | | any other number that the training service returns, reduced as its SDK does
rollout/samples | sampling requests | requests | ,.0f | 0.. | | requests for samples so far
rollout/failed_samples | failed requests | requests | ,.0f | 0.. | down | requests for samples that failed after all retries so far
rollout/push_backs | push-backs | requests | ,.0f | 0.. | down | requests that the service refused for its rate limit so far
rollout/split_groups | split groups | groups | ,.0f | 0.. | down | groups whose first turn was sampled in several requests so far
rollout/samples_in_flight | requests in flight | requests | ,.0f | 0.. | | requests for samples at the service
rollout/samples_waiting | requests waiting | requests | ,.0f | 0.. | | requests that wait for the sample limit
rollout/sample_limit | sample limit | requests | ,.0f | 0.. | | requests that may be at the service at once
rollout/limited_by/<cause> | limited by | | .0% | 0..1 | | fraction of rollout processes whose concurrency this cause limits
rollout/processes | rollout processes | processes | ,.0f | 1.. | | processes that roll out episodes
rollout/worker_deaths | lost workers | processes | ,.0f | 0.. | down | rollout processes that died so far
rollout/replayed_episodes | repeated episodes | episodes | ,.0f | 0.. | down | episodes repeated since their process died, so far
rollout/worker_cpu | worker CPU | cores | .2f | 0.. | | CPU of the busiest rollout process
rollout/worker_lag_p99 | worker loop lag p99 | s | .3f | 0.. | down | event-loop lag of the slowest rollout process
loop/lag_p99 | loop lag p99 | s | .3f | 0.. | down | event-loop lag, 99th percentile
loop/lag_max | longest stall | s | .3f | 0.. | down | longest stall of the event loop
loop/cpu | CPU | cores | .2f | 0.. | | CPU of this process
search/calls | search calls | calls | ,.0f | 0.. | | calls of the search in this step
search/queries | queries | queries | ,.0f | 0.. | | queries in these calls
search/failed | failed searches | calls | ,.0f | 0.. | down | calls that failed after all retries
search/cache_hit_rate | cache hits | | .0% | 0..1 | up | fraction of queries answered by a cache
search/p50 | search p50 | s | .3f | 0.. | down | seconds per call, median
search/p99 | search p99 | s | .3f | 0.. | down | seconds per call, 99th percentile
search/<service>/requests | requests | requests | ,.0f | 0.. | | requests to the embedding service or the store
search/<service>/mean_batch | queries | per request | .1f | 0.. | up | queries per request
search/<service>/joined | shared queries | queries | ,.0f | 0.. | | queries that joined an equal one under way
search/<service>/faults | retries | requests | ,.0f | 0.. | down | requests that were repeated after a fault
search/<service>/p50 | request p50 | s | .3f | 0.. | down | seconds per request, median
search/<service>/p99 | request p99 | s | .3f | 0.. | down | seconds per request, 99th percentile
search/<service>/limit | request limit | requests | .0f | 0.. | | requests that may be under way at once
search/<service>/seconds_down | down | s | .1f | 0.. | down | how long the service has been down; 0 while it is up
cost/prompt_tokens | billed prompt tokens | tokens | ,.0f | 0.. | | prompt tokens billed since the previous step
cost/cached_prompt_tokens | billed cache hits | tokens | ,.0f | 0.. | | prompt tokens billed as cache hits since the previous step
cost/sampled_tokens | billed sampled tokens | tokens | ,.0f | 0.. | | sampled tokens billed since the previous step
cost/trained_tokens | billed trained tokens | tokens | ,.0f | 0.. | | trained tokens billed since the previous step
cost/dollars | cost | dollars | ,.4f | 0.. | down | dollars billed since the previous step; missing where no price is known
cost/total_dollars | cost of the run | dollars | ,.2f | 0.. | | dollars billed in total, earlier sessions included
time/total | seconds | s | .1f | 0.. | down | seconds between the publishing of the previous step's weights and of this step's
time/sampling | seconds of sampling | s | .1f | 0.. | down | seconds from the opening of the batch to its last group
time/training_after_sampling | seconds of training alone | s | .1f | 0.. | down | seconds from the batch's last group to its weights
progress/batch | step | | ,.0f | 1.. | | number of the step
progress/done_frac | done | | .0% | 0..1 | | fraction of the run's steps
"""

METRICS: dict[str, Metric] = {metric.column: metric for metric in map(_metric, _TABLE.strip().splitlines())}
"""Every metric of a step by its column."""

CURVES = tuple(METRICS[OF_ALL + name] for name in ("reward/total", "correct", "turns_per_episode", "valid_calls"))
"""The curves of console, live view and ``run.plot()``."""

EXACT_MATCH = METRICS[OF_ALL + "correct"]
"""The metric that held-out evaluations measure too."""

_PATTERNS = [
    (re.compile(re.sub("<.*?>", "[^/]+", column)), metric) for column, metric in METRICS.items() if "<" in column
]


def metric_of(name: str) -> Metric | None:
    """The metric with this column, name below :data:`OF_ALL` or alias; None for one that the table lacks."""
    exact = METRICS.get(name) or METRICS.get(OF_ALL + name)
    if exact is not None:
        return exact
    by_alias = next((metric for metric in METRICS.values() if metric.alias == name), None)
    return by_alias or next((metric for pattern, metric in _PATTERNS if pattern.fullmatch(name)), None)


def described(metrics: Mapping[str, float], shown: Iterable[Metric] = CURVES) -> list[str]:
    """Each of the ``shown`` metrics that is known, as ``exact match 25.0%``, by column or by name."""
    return [
        f"{metric.label} {metric.text(value)}"
        for metric in shown
        if (value := metrics.get(metric.column, metrics.get(metric.name))) is not None
    ]


def render_table() -> str:
    """``docs/metrics.md``."""
    lines = ["| name | label | unit | bounds | better | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for metric in METRICS.values():
        name = f"`{metric.column}`" + (f" (`{metric.alias}`)" if metric.alias else "")
        unit = metric.unit or ("fraction" if metric.is_share else "")
        low, high = metric.low, metric.high
        bounds = "" if low is None else f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
        lines.append(f"| {name} | {metric.label} | {unit} | {bounds} | {metric.better} | {metric.meaning} |")
    return _DOCS.format(table="\n".join(lines))


_DOCS = """# Metrics of a step

Columns of `run.metrics`, in the event `StepFinished`, and in trackers. The table is `METRICS` in
`searchr1_async/records/metrics.py`; this page is written from it, and a test compares them.

`env/<suite>/…` has the same names as `env/all/…`, over the episodes of one suite (a suite named `all` is `env/all_/…`). Means are
over finished episodes and missing where there are none. `run.plot` accepts a column, its name without `env/all/`, or the second
name in brackets. An evaluation's exact match, with its 95 % interval, is `exact_match`, `exact_match_low` and `exact_match_high` in
`EvaluationFinished`, and `exact_match/<suite>` for one suite.

{table}
"""


_OWN_MEANS = {"reward/total", "turns_per_episode", "valid_calls"}
"""A part of a user's reward with such a name is left out: the metric of that name is ours."""


@dataclass(slots=True)
class EpisodeMeans:
    """Means over episodes, added one by one: the one place where rewards, turns and calls are averaged."""

    episodes: int = 0
    calls: int = 0
    valid: int = 0
    _sums: dict[str, float] = field(default_factory=lambda: {"reward/total": 0.0, "turns_per_episode": 0.0})
    _squares: dict[str, float] = field(default_factory=dict)

    def add(self, episode: Episode) -> None:
        self.episodes += 1
        for call in episode.calls:
            self.calls += 1
            self.valid += call.problem is None
        self._add("reward/total", float(episode.reward))
        self._add("turns_per_episode", float(len(episode.turns)))
        for name, value in episode.reward_parts.items():
            if name not in _OWN_MEANS:
                self._add(name, float(value))

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._squares[name] = self._squares.get(name, 0.0) + value * value

    def metrics(self) -> dict[str, float]:
        """Means by name: reward, turns, every reward part, and valid calls; empty without episodes."""
        if not self.episodes:
            return {}
        out = {name: total / self.episodes for name, total in self._sums.items()}
        if self.calls:
            out["valid_calls"] = self.valid / self.calls
        return out

    def spread(self, name: str) -> float | None:
        """Standard deviation over episodes; None without one, and for valid calls, whose mean determines it."""
        if not self.episodes or name not in self._sums:
            return None
        mean = self._sums[name] / self.episodes
        return math.sqrt(max(0.0, self._squares[name] / self.episodes - mean * mean))


def group_metrics(groups: Sequence[Group], failed: int = 0, *, policy_version: int | None = None) -> dict[str, float]:
    """Metrics of these groups, under ``env/all/…`` and, per suite, ``env/<data_source>/…``.

    Args:
        groups: every group of the step, trained on or dropped.
        failed: failed episodes outside ``groups``; ``Group.failed`` is counted separately.
        policy_version: optimiser steps done before the weights being trained; adds ``staleness`` (mean over turns of how many
            optimiser steps older the sampling weights were) and ``staleness_max``. With weights in flight both are upper
            bounds: a turn counts the weights its episode started with.

    Means are over finished episodes; a mean over nothing is omitted. ``stop/<reason>`` are fractions of all episodes, failed
    ones included, and sum to 1.

    ``ob_tokens`` counts, as in the recipe, the whole prompt of every turn. ``total_cached_ob_tokens`` are those billed as
    cache hits, ``cached_ob_frac`` their fraction.
    """
    by_source: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_source[group.question.data_source].append(group)
    out = {f"env/all/{name}": value for name, value in _metrics_of(groups, failed, policy_version).items()}
    for source, members in sorted(by_source.items()):
        # A suite named "all" must not overwrite the totals.
        key = source if source != "all" else "all_"
        out.update({f"env/{key}/{name}": value for name, value in _metrics_of(members, 0, policy_version).items()})
    return out


def _metrics_of(groups: Sequence[Group], failed: int, policy_version: int | None) -> dict[str, float]:
    episodes = [episode for group in groups for episode in group.episodes]
    failures = [episode for group in groups for episode in group.failed]
    out: dict[str, float] = {
        "total_episodes": float(len(episodes)),
        "failed_episodes": float(len(failures) + failed),
    }
    out.update(_token_metrics(episodes))
    means = EpisodeMeans()
    for episode in episodes:
        means.add(episode)
    out.update(means.metrics())
    out.update(_call_metrics(episodes, means))
    out.update(_by_group_metrics(groups))
    out.update(stop_fractions([*episodes, *failures], failed))
    if policy_version is not None:
        out.update(_staleness_metrics(episodes, policy_version))
    return out


def _token_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    turns = sum(len(episode.turns) for episode in episodes)
    ac_tokens = sum(episode.action_token_count for episode in episodes)
    ob_tokens = sum(sum(prompt_lengths(episode)) for episode in episodes)
    cached = sum(turn.cached_prompt_tokens for episode in episodes for turn in episode.turns)
    out = {
        "total_turns": float(turns),
        "total_ac_tokens": float(ac_tokens),
        "total_ob_tokens": float(ob_tokens),
        "total_cached_ob_tokens": float(cached),
    }
    if turns:
        out["ac_tokens_per_turn"] = ac_tokens / turns
        out["ob_tokens_per_turn"] = ob_tokens / turns
        out["cached_ob_frac"] = cached / ob_tokens
    return out


def _call_metrics(episodes: Sequence[Episode], means: EpisodeMeans) -> dict[str, float]:
    out: dict[str, float] = {}
    if means.calls:
        out["malformed_call"] = (means.calls - means.valid) / means.calls
    if episodes:
        calls = [call for episode in episodes for call in episode.calls]
        made = [*calls, *(episode.given for episode in episodes if episode.given is not None)]
        out["searches_per_episode"] = sum(len(call.results) for call in made) / len(episodes)
        out["answer_in_passage"] = sum(answer_in_passage(episode) for episode in episodes) / len(episodes)
    return out


def _by_group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    nonempty = [group for group in groups if group.episodes]
    if not nonempty:
        return {}
    constant = [group for group in nonempty if group.is_constant]
    good = sum(group.rewards[0] >= GOOD_REWARD for group in constant)
    return {
        "by_group/frac_mixed": (len(nonempty) - len(constant)) / len(nonempty),
        "by_group/frac_all_good": good / len(nonempty),
        "by_group/frac_all_bad": (len(constant) - good) / len(nonempty),
    }


def _staleness_metrics(episodes: Sequence[Episode], policy_version: int) -> dict[str, float]:
    ages = [policy_version - turn.policy_version for episode in episodes for turn in episode.turns]
    return {"staleness": sum(ages) / len(ages), "staleness_max": float(max(ages))} if ages else {}


def stop_fractions(episodes: Sequence[Episode], failed: int = 0) -> dict[str, float]:
    """``stop/<reason>`` for every :class:`StopReason`, as fractions of ``len(episodes) + failed``; all 0 if that is 0."""
    counts: Mapping[StopReason, int] = {
        reason: sum(episode.stop_reason is reason for episode in episodes) for reason in StopReason
    }
    total = len(episodes) + failed
    return {
        f"stop/{reason.value}": (count + (failed if reason is StopReason.FAILED else 0)) / max(total, 1)
        for reason, count in counts.items()
    }


def passages_shown(episode: Episode) -> tuple[Passage, ...]:
    """The passages that the model read, in order: given ones, then those of every call followed by another turn."""
    calls = [episode.given, *(turn.call for turn in episode.turns[:-1])] if episode.turns else []
    return tuple(passage for call in calls if call is not None for found in call.results for passage in found)


def answer_in_passage(episode: Episode) -> bool:
    """Whether a passage shown to the model contains a golden answer as whole words after normalisation.

    Separates reading failures (the answer was shown) from search failures. Trivially true for answers such as ``yes``.
    """
    answers = [words for answer in episode.question.golden_answers if (words := normalize_answer(answer))]
    if not answers:
        return False
    return any(
        f" {answer} " in haystack
        for passage in passages_shown(episode)
        for haystack in (_searchable(passage.title, passage.text),)
        for answer in answers
    )


# Members of a group, and related questions, see the same passages repeatedly.
@lru_cache(maxsize=4096)
def _searchable(title: str, text: str) -> str:
    return f" {normalize_answer(f'{title} {text}')} "


def outcome_metrics(outcomes: Sequence[GroupOutcome]) -> dict[str, float]:
    """What happened to a step's groups: ``groups/trained``, ``groups/dropped/<reason>``, ``groups/cut_members`` and the
    spread of sampling weights.

    ``groups/version_spread`` is the mean over groups of newest minus oldest policy version (0, as a group keeps its sampling
    client; above 0 in older runs, whose weights switched mid-episode). ``groups/version_spread_step`` is the same over the
    whole step.
    """
    reasons = Counter(outcome.drop_reason for outcome in outcomes)
    versions = [outcome.group.policy_versions for outcome in outcomes if outcome.group.policy_versions]
    out = {"groups/trained": float(reasons[None])}
    out |= {f"groups/dropped/{reason}": float(reasons[reason]) for reason in DROP_REASONS}
    out["groups/cut_members"] = float(
        sum(episode.stop_reason is StopReason.TIME_LIMIT for outcome in outcomes for episode in outcome.group.failed)
    )
    if versions:
        out["groups/version_spread"] = sum(own[-1] - own[0] for own in versions) / len(versions)
        out["groups/version_spread_step"] = float(max(own[-1] for own in versions) - min(own[0] for own in versions))
    return out
