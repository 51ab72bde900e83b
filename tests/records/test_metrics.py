from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.episodes.types import Group, GroupOutcome, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.records.metrics import (
    METRICS,
    EpisodeMeans,
    answer_in_passage,
    described,
    group_metrics,
    metric_of,
    outcome_metrics,
    passages_shown,
)
from searchr1_async.search.stats import SearchStatistics
from tests.records.metrics_page import render_table
from tests.watch.builders import answering_turn, episode, group, malformed_turn, question, searching_turn


def test_step_metrics_match_the_recipe() -> None:
    metrics = group_metrics([group(question("q1"), (1.0, 0.0)), group(question("q2"), (1.0, 1.0))])
    expected = {
        "reward/total": 0.75,
        "correct": 0.75,
        "format": 1.0,
        "f1": 0.75,
        "turns_per_episode": 2.0,
        "total_episodes": 4.0,
        "total_turns": 8.0,
        "total_ac_tokens": 20.0,
        "ac_tokens_per_turn": 2.5,
        # The first prompt has 5 tokens; the second turn's adds 3 sampled and 4 appended ones.
        "total_ob_tokens": 4 * (5 + 12.0),
        "ob_tokens_per_turn": 8.5,
        "by_group/frac_mixed": 0.5,
        "by_group/frac_all_good": 0.5,
        "by_group/frac_all_bad": 0.0,
        "searches_per_episode": 1.0,
        "valid_calls": 1.0,
        "malformed_call": 0.0,
        "answer_in_passage": 1.0,
        "stop/answer": 1.0,
    }
    assert {name: metrics[f"env/all/{name}"] for name in expected} == pytest.approx(expected)


def test_suites_are_separate_and_a_suite_named_all_is_renamed() -> None:
    metrics = group_metrics(
        [
            group(question(source="nq"), (1.0, 1.0)),
            group(question(source="hotpot"), (0.0, 0.0)),
            group(question(source="all"), (0.0, 0.0)),
        ]
    )
    assert metrics["env/nq/correct"] == 1.0
    assert metrics["env/hotpot/correct"] == 0.0
    assert metrics["env/all/correct"] == pytest.approx(1 / 3)
    assert metrics["env/all_/correct"] == 0.0


def test_missing_reward_part_counts_as_zero() -> None:
    asked = question()
    played = Group(asked, (episode(asked, parts={"bonus": 1.0}), episode(asked)))
    assert group_metrics([played])["env/all/bonus"] == 0.5


@pytest.mark.parametrize("name", ["reward/total", "turns_per_episode", "valid_calls"])
def test_a_reward_part_does_not_change_the_metric_of_its_name(name: str) -> None:
    plain = group(question("q1"), (1.0, 0.0))
    named = replace(plain, episodes=[replace(each, reward_parts={name: 100.0}) for each in plain.episodes])
    assert group_metrics([named])[f"env/all/{name}"] == group_metrics([plain])[f"env/all/{name}"]


def test_failures_count_only_in_stop_fractions() -> None:
    metrics = group_metrics([group(corrects=(1.0, 1.0), failed=2)])
    assert metrics["env/all/stop/failed"] == 0.5
    assert metrics["env/all/stop/answer"] == 0.5
    assert metrics["env/all/failed_episodes"] == 2
    assert metrics["env/all/correct"] == 1.0
    assert metrics["env/atlas/stop/failed"] == 0.5


@pytest.mark.parametrize("groups", [[], [group(corrects=(), failed=2)]])
def test_step_without_finished_episodes_has_no_means(groups: list[Group]) -> None:
    metrics = group_metrics(groups, policy_version=3)
    assert "env/all/correct" not in metrics
    assert metrics["env/all/total_episodes"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_calls_are_valid_malformed_or_absent() -> None:
    asked = question()
    mixed = Group(asked, (episode(asked), episode(asked, turns=(searching_turn(), malformed_turn()))))
    metrics = group_metrics([mixed])
    assert metrics["env/all/valid_calls"] == pytest.approx(2 / 3)
    assert metrics["env/all/malformed_call"] == pytest.approx(1 / 3)
    silent = Group(asked, (episode(asked, turns=(answering_turn(),)),))
    assert "env/all/valid_calls" not in group_metrics([silent])


def test_staleness_is_in_optimizer_steps_over_turns() -> None:
    metrics = group_metrics([group(corrects=(1.0,))], policy_version=4)  # its turns were sampled by versions 1 and 2
    assert metrics["env/all/staleness"] == 2.5
    assert metrics["env/all/staleness_max"] == 3.0
    assert "env/all/staleness" not in group_metrics([group()])


def test_only_passages_that_a_later_turn_read_were_shown() -> None:
    assert len(passages_shown(episode())) == 1
    unread = episode(turns=(searching_turn(),), stop_reason=StopReason.MAX_TRAJECTORY_TOKENS)
    assert passages_shown(unread) == ()
    assert not answer_in_passage(unread)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("The capital is PARIS, of course.", True),
        ("They call it the city of light!", True),
        ("Parisian comparisons", False),
        ("", False),
    ],
)
def test_golden_answer_matches_whole_normalised_words(text: str, seen: bool) -> None:
    assert answer_in_passage(episode(turns=(searching_turn(text), answering_turn()))) is seen


def test_title_counts_and_an_answer_of_only_articles_never_matches() -> None:
    turn = Turn((1,), (-1.0,), "", call=SearchCall(("q",), ((Passage("1", "Paris", "A town."),),)))
    assert answer_in_passage(episode(turns=(turn, answering_turn())))
    the = Question("q", "Which article?", ("the",))
    assert not answer_in_passage(episode(the, turns=(searching_turn("the the"), answering_turn())))


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(list(StopReason))), max_size=6),
            st.sampled_from(["nq", "hotpot"]),
        ),
        max_size=6,
    )
)
def test_fractions_sum_to_one(drawn: list) -> None:
    groups = []
    for index, (members, source) in enumerate(drawn):
        asked = question(f"q{index}", source)
        episodes = [episode(asked, correct=reward, stop_reason=reason) for reward, reason in members]
        groups.append(Group(asked, tuple(e for e in episodes if not e.failed), tuple(e for e in episodes if e.failed)))
    metrics = group_metrics(groups)
    for scope in {name.split("/")[1] for name in metrics}:
        stops = [metrics[f"env/{scope}/stop/{reason.value}"] for reason in StopReason]
        total = metrics[f"env/{scope}/total_episodes"] + metrics[f"env/{scope}/failed_episodes"]
        assert sum(stops) == pytest.approx(1.0 if total else 0.0)
        kinds = [metrics.get(f"env/{scope}/by_group/frac_{kind}") for kind in ("mixed", "all_good", "all_bad")]
        if metrics[f"env/{scope}/total_episodes"]:
            assert sum(kind for kind in kinds if kind is not None) == pytest.approx(1.0)
        else:
            assert kinds == [None, None, None]
    assert all(math.isfinite(value) for value in metrics.values())


# --- the table --------------------------------------------------------------------------------------------------------


def test_documentation_lists_exactly_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == render_table()


def test_every_metric_of_a_step_is_in_the_table() -> None:
    groups = [group(failed=1), Group(question("q2"), (episode(question("q2"), parts={"bonus": 1.0}),))]
    outcomes = [GroupOutcome(place, each) for place, each in enumerate(groups)]
    metrics = group_metrics(groups, policy_version=3) | outcome_metrics(outcomes) | SearchStatistics().metrics()
    found = {name: metric_of(name) for name in metrics if not name.startswith("env/atlas/")}
    assert [name for name, metric in found.items() if metric is None] == []
    assert found["env/all/stop/answer"] is METRICS["env/all/stop/<reason>"]
    assert found["search/store/p99"] is METRICS["search/<service>/p99"]


def test_a_metric_has_one_entry_by_column_name_and_alias() -> None:
    for name in ("env/all/correct", "correct", "exact_match"):
        assert metric_of(name) is METRICS["env/all/correct"]
    assert metric_of("no such metric") is None
    aliases = [metric.alias for metric in METRICS.values() if metric.alias]
    assert len(set(aliases)) == len(aliases)


def test_values_are_described_by_column_or_by_name() -> None:
    assert described({"env/all/correct": 0.25, "valid_calls": 0.9, "other": 1.0}) == [
        "exact match 25.0%",
        "valid calls 90%",
    ]


def test_means_of_episodes_added_one_by_one() -> None:
    means = EpisodeMeans()
    assert means.metrics() == {}
    for correct in (1.0, 0.0):
        means.add(episode(correct=correct))
    metrics = group_metrics([group(corrects=(1.0, 0.0))])
    assert means.metrics() == {name: metrics[f"env/all/{name}"] for name in means.metrics()}
    assert means.spread("correct") == 0.5
    assert means.spread("valid_calls") is None
