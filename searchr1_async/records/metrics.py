"""The metrics of a step: the one table of their names (:data:`METRICS`), and their values from the step's groups. Pure.

Console, live view, charts, trackers, report and ``docs/metrics.md`` take labels, formats and bounds from the table. Names follow
tinker-cookbook's Search-R1 recipe, so curves are comparable. Two deliberate differences: ``stop/<reason>`` are fractions of *all*
episodes (the recipe averages them only where present, so they always read 1.0), and a missing reward part counts as 0.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from searchr1_async.billing import prompt_lengths
from searchr1_async.episodes.rewards import normalize_answer
from searchr1_async.episodes.types import DropReason, Episode, Group, GroupOutcome, Passage, StopReason

GOOD_REWARD = 0.5
"""Reward from which a constant group counts as ``by_group/frac_all_good`` (the recipe's threshold)."""

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


def _read() -> Iterator[Metric]:
    """The rows of ``metrics.csv``."""
    with Path(__file__).with_name("metrics.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="|", quoting=csv.QUOTE_NONE):
            values: dict[str, Any] = dict(row)
            values |= {name: float(row[name]) if row[name] else None for name in ("low", "high")}
            yield Metric(**values)


METRICS: dict[str, Metric] = {metric.column: metric for metric in _read()}
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
        return out | ({"valid_calls": self.valid / self.calls} if self.calls else {})

    def spread(self, name: str) -> float | None:
        """Standard deviation over episodes; None without one, and for valid calls, whose mean determines it."""
        if not self.episodes or name not in self._sums:
            return None
        mean = self._sums[name] / self.episodes
        return math.sqrt(max(0.0, self._squares[name] / self.episodes - mean * mean))


def group_metrics(groups: Sequence[Group], *, policy_version: int | None = None) -> dict[str, float]:
    """Metrics of these groups, under ``env/all/…`` and, per suite, ``env/<data_source>/…``.

    Args:
        groups: every group of the step, trained on or dropped.
        policy_version: optimizer steps done before the weights being trained; adds ``staleness`` (mean over turns of how many
            optimizer steps older the sampling weights were) and ``staleness_max``. With weights in flight both are upper
            bounds: a turn counts the weights its episode started with.

    Means are over finished episodes; a mean over nothing is omitted. ``stop/<reason>`` are fractions of all episodes, failed
    ones included, and sum to 1.

    ``ob_tokens`` counts, as in the recipe, the whole prompt of every turn. ``total_cached_ob_tokens`` are those billed as
    cache hits, ``cached_ob_frac`` their fraction.
    """
    by_source: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_source[group.question.data_source].append(group)
    # A suite named "all" must not overwrite the totals.
    parts = {"all": groups} | {"all_" if source == "all" else source: by_source[source] for source in sorted(by_source)}
    return {
        f"env/{part}/{name}": value
        for part, own in parts.items()
        for name, value in _metrics_of(own, policy_version).items()
    }


def _metrics_of(groups: Sequence[Group], policy_version: int | None) -> dict[str, float]:
    episodes = [episode for group in groups for episode in group.episodes]
    failures = [episode for group in groups for episode in group.failed]
    turns = [turn for episode in episodes for turn in episode.turns]
    ages = [] if policy_version is None else [policy_version - turn.policy_version for turn in turns]
    read = sum(sum(prompt_lengths(episode)) for episode in episodes)
    sampled = sum(episode.action_token_count for episode in episodes)
    cached = sum(turn.cached_prompt_tokens for turn in turns)
    made = [call for e in episodes for call in (*e.calls, e.given) if call is not None]
    nonempty = [group for group in groups if group.episodes]
    constant = [group.rewards[0] for group in nonempty if group.is_constant]
    good = sum(reward >= GOOD_REWARD for reward in constant)
    reasons = Counter(episode.stop_reason for episode in (*episodes, *failures))
    means = EpisodeMeans()
    for episode in episodes:
        means.add(episode)
    totals = {
        "total_episodes": len(episodes),
        "failed_episodes": len(failures),
        "total_turns": len(turns),
        "total_ac_tokens": sampled,
        "total_ob_tokens": read,
        "total_cached_ob_tokens": cached,
    } | ({"staleness_max": max(ages)} if ages else {})
    shares = {
        "ac_tokens_per_turn": (sampled, len(turns)),
        "ob_tokens_per_turn": (read, len(turns)),
        "cached_ob_frac": (cached, read),
        "malformed_call": (means.calls - means.valid, means.calls),
        "searches_per_episode": (sum(len(call.results) for call in made), len(episodes)),
        "answer_in_passage": (sum(map(answer_in_passage, episodes)), len(episodes)),
        "by_group/frac_mixed": (len(nonempty) - len(constant), len(nonempty)),
        "by_group/frac_all_good": (good, len(nonempty)),
        "by_group/frac_all_bad": (len(constant) - good, len(nonempty)),
        "staleness": (sum(ages), len(ages)),
    }
    return {
        **{name: float(total) for name, total in totals.items()},
        **means.metrics(),
        **{name: part / whole for name, (part, whole) in shares.items() if whole},
        **{f"stop/{reason.value}": reasons[reason] / max(reasons.total(), 1) for reason in StopReason},
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
    texts = (_searchable(passage.title, passage.text) for passage in passages_shown(episode))
    return any(f" {answer} " in text for text in texts for answer in answers)


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
    failed = Counter(episode.stop_reason for outcome in outcomes for episode in outcome.group.failed)
    out: dict[str, float] = {
        "groups/trained": reasons[None],
        # All reasons, so curves have no gaps.
        **{f"groups/dropped/{reason}": reasons[reason] for reason in get_args(DropReason)},
        "groups/cut_members": failed[StopReason.TIME_LIMIT],
    }
    if versions:
        out["groups/version_spread"] = sum(own[-1] - own[0] for own in versions) / len(versions)
        out["groups/version_spread_step"] = max(own[-1] for own in versions) - min(own[0] for own in versions)
    return {name: float(value) for name, value in out.items()}
