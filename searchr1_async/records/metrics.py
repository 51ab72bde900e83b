"""Step metrics from the step's groups. Pure: groups in, names and floats out.

Names follow tinker-cookbook's Search-R1 recipe, so curves are comparable. Two deliberate differences: ``stop/<reason>`` are
fractions of *all* episodes (the recipe averages them only where present, so they always read 1.0), and a missing reward part
counts as 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

from searchr1_async.billing import prompt_lengths
from searchr1_async.episodes.reward import normalize_answer
from searchr1_async.episodes.table import GroupOutcome
from searchr1_async.episodes.types import Episode, Group, Passage, StopReason

GOOD_REWARD = 0.5
"""Reward from which a constant group counts as ``by_group/frac_all_good`` (the recipe's threshold)."""

DROP_REASONS = ("constant_reward", "too_few_episodes", "too_slow", "step_time_limit")
"""Every reason to drop a group; all are always in the metrics, so curves have no gaps."""


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
    out.update(_reward_metrics(episodes))
    out.update(_call_metrics(episodes))
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
    if episodes:
        out["turns_per_episode"] = turns / len(episodes)
    if turns:
        out["ac_tokens_per_turn"] = ac_tokens / turns
        out["ob_tokens_per_turn"] = ob_tokens / turns
        out["cached_ob_frac"] = cached / ob_tokens
    return out


def _reward_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    if not episodes:
        return {}
    # dict.fromkeys keeps first-seen order.
    names = dict.fromkeys(name for episode in episodes for name in episode.reward_parts)
    out = {"reward/total": sum(episode.reward for episode in episodes) / len(episodes)}
    for name in names:
        out[name] = sum(float(episode.reward_parts.get(name, 0.0)) for episode in episodes) / len(episodes)
    return out


def _call_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    out: dict[str, float] = {}
    calls = [call for episode in episodes for call in episode.calls]
    if calls:
        valid = sum(call.problem is None for call in calls)
        out["valid_calls"] = valid / len(calls)
        out["malformed_call"] = (len(calls) - valid) / len(calls)
    if episodes:
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
