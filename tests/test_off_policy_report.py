"""The figures of the off-policy benchmark: computed prompt tokens, and the tables over the seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.off_policy.report import each_run, in_flight_table, learning_table, prompt_tokens
from benchmarks.off_policy.run import claim, planned
from searchr1_async.episodes.types import Episode, Question, StopReason, Turn

QUESTION = Question("1", "Who?", ("it",), "world")


def episode(prompt: int, *turns: tuple[int, int, int]) -> Episode:
    """An episode with this many prompt tokens, and sampled, appended and cached tokens per turn."""
    made = [
        Turn((7,) * sampled, (-0.5,) * sampled, "", appended_tokens=(8,) * appended, cached_prompt_tokens=cached)
        for sampled, appended, cached in turns
    ]
    return Episode(QUESTION, (1,) * prompt, tuple(made), StopReason.ANSWER)


def row(seed: int, staleness: int, weights: str = "snapshot", **changes: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "staleness": staleness,
        "loss": "ppo",
        "weights": weights,
        "steps": 12,
        "exact_match_before": 0.3,
        "exact_match_after": 0.5,
        "training_exact_match": 0.6,
        "load_before": 1.0,
        "kl_v1": 0.001,
        "kl_v2": 0.002,
        "kl_v2_max": 0.004,
        "ratio_min": 0.5,
        "ratio_max": 2.0,
        "staleness_mean": 3.0,
        "staleness_max": 4.0,
        "seconds_a_step": 10.0,
        "seconds": 120.0,
        "prompt_tokens_a_step": 9000.0,
        "prefilled_tokens_a_step": 3000.0,
        **changes,
    }


def test_prompt_tokens_are_those_of_every_turn_less_the_cache_hits() -> None:
    # Prompts of 10 and 10 + 3 + 4 tokens, of which 6 and 13 were cached.
    assert prompt_tokens([episode(10, (3, 4, 6), (2, 0, 13))]) == (27, 8)
    assert prompt_tokens([]) == (0, 0)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5), st.just(0)), min_size=1, max_size=4))
def test_without_a_cache_all_prompt_tokens_are_prefilled(turns: list[tuple[int, int, int]]) -> None:
    prompts, fresh = prompt_tokens([episode(4, *turns)])
    assert prompts == fresh >= 4 * len(turns)


def test_every_seed_runs_all_bounds_and_losses_and_in_flight_with_the_last_loss() -> None:
    options = argparse.Namespace(seeds=[1, 2], staleness=[0, 4], losses=["ppo", "stable_reinforce"], in_flight=[4])
    ways = planned(options)
    assert len(ways) == len({way.name for way in ways}) == 2 * (2 * 2 + 1)
    assert {(way.staleness, way.loss) for way in ways if way.weights == "inflight"} == {(4, "stable_reinforce")}


def test_a_folder_of_runs_with_other_settings_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "work", {"steps": 12})
    claim(tmp_path / "work", {"steps": 12})
    with pytest.raises(SystemExit, match="choose another --work folder"):
        claim(tmp_path / "work", {"steps": 6})


def test_a_row_has_the_mean_and_extremes_over_seeds() -> None:
    rows = pl.DataFrame(
        [
            row(1, 4, exact_match_after=0.5, ratio_min=0.5, ratio_max=2.0, kl_v2_max=0.004),
            row(2, 4, exact_match_after=0.7, ratio_min=0.25, ratio_max=3.0, kl_v2_max=0.008),
        ]
    )
    (line,) = learning_table(rows).splitlines()[2:]
    assert line == "| 4 | `ppo` | 2 | 0.30 | 0.60 (0.50, 0.70) | 0.002 (0.008) | 0.25 to 3 | 3.0 (4) | 10.0 | 120 |"
    assert in_flight_table(rows) == "", "nothing to compare"


def test_in_flight_is_compared_with_snapshots_of_the_same_seeds() -> None:
    rows = pl.DataFrame(
        [
            row(1, 4),
            row(2, 4, prefilled_tokens_a_step=99_999.0),
            row(1, 4, "inflight", prefilled_tokens_a_step=1500.0),
            row(1, 8),
        ]
    )
    lines = in_flight_table(rows).splitlines()[2:]
    assert len(lines) == 2
    assert "`inflight` | 10.0 | 9,000 | 1,500 |" in lines[0]
    assert "`snapshot` | 10.0 | 9,000 | 3,000 |" in lines[1]


def test_a_service_without_ratios_gives_text_instead_of_a_number() -> None:
    rows = pl.DataFrame([row(1, 0, ratio_min=None, ratio_max=None)])
    assert "not reported" in learning_table(rows)
    assert "not reported" in each_run(rows)
