"""What a run spends, and when a limit ends it: by hand, and in whole runs on a real small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import searchr1_async as sr
from searchr1_async.billing import Billing, Spending, TokenUsage, sampling_usage, total_usage
from searchr1_async.events import Event, Notice, RunStarted
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.watch.state import RunState
from tests import tiny_world

PRICE = sr.runs.Price(prefill=1000.0, sample=2000.0, train=3000.0)
"""So dear that a step of the small model costs dollars."""
DOLLAR = TokenUsage(prompt=1000)


def spending(limit: float | None = None, *, a_step: float | None = None, **earlier: Any) -> Spending:
    return Spending(Billing(PRICE), a_step, limit=limit, **earlier)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1))
def test_the_steps_sum_to_the_whole(steps: list[tuple[int, int]]) -> None:
    used = TokenUsage()
    own = spending(used=TokenUsage(trained=5), spent=7.0)
    own.count(lambda: used)
    own.begin()
    dollars, rows = own.cost.dollars, []
    for prompt, sampled in steps:
        used += TokenUsage(prompt=prompt, sampled=sampled)
        rows.append(own.step_recorded())
    assert dollars == 7.0
    assert sum(row["cost/prompt_tokens"] for row in rows) == used.prompt
    assert 7.0 + sum(row["cost/dollars"] for row in rows) == pytest.approx(own.cost.dollars)
    assert rows[-1]["cost/total_dollars"] == own.cost.dollars
    assert own.cost.tokens == used + TokenUsage(trained=5)


def test_no_step_begins_that_would_cross_the_limit() -> None:
    used = [TokenUsage()]
    own = spending(10.0, a_step=4.0)
    own.count(lambda: used[0])
    own.begin()
    assert own.problem(TokenUsage()) is None, "the first step is expected to cost 4 of 10 dollars"
    for dollars in (3, 1):
        used[0] = TokenUsage(prompt=used[0].prompt + 1000 * dollars)
        own.step_recorded()
    assert own.problem(TokenUsage()) is None, "4 are spent, and the dearest step cost 3"
    assert own.problem(DOLLAR + DOLLAR + DOLLAR) is None
    problem = own.problem(DOLLAR + DOLLAR + DOLLAR + DOLLAR)
    assert problem is not None
    assert "$4.00 of $10.00 spent" in problem
    used[0] = TokenUsage(prompt=7_001)
    assert own.problem(TokenUsage()) is not None


def test_a_first_step_that_is_expected_to_cross_it_does_not_begin() -> None:
    assert spending(3.0, a_step=4.0).problem(TokenUsage()) is not None
    assert spending(3.0, spent=3.0).problem(TokenUsage()) is not None
    assert spending(None, a_step=4.0).problem(TokenUsage()) is None


def test_of_sessions_that_did_not_record_it_the_tokens_are_priced() -> None:
    assert spending(used=DOLLAR, spent=None).cost.dollars == pytest.approx(1.0)
    unknown = Spending(Billing(reason="nobody knows"), None)
    assert unknown.cost.dollars is None
    assert "cost/dollars" not in unknown.step_recorded()
    assert unknown.cost.note == "nobody knows"


def test_a_resume_point_of_an_earlier_version_has_no_cost(tmp_path: Path) -> None:
    point = ResumePoint(4, 40, "tinker://state/4", "order", "base/model", tokens=DOLLAR, dollars=1.5, dearest_step=0.5)
    point.save(tmp_path)
    assert ResumePoint.load(tmp_path) == point
    text = (tmp_path / "state.json").read_text()
    lines = [line for line in text.splitlines() if '"dollars"' not in line and '"dearest_step"' not in line]
    start = next(place for place, line in enumerate(lines) if '"tokens"' in line)
    end = next(place for place in range(start, len(lines)) if lines[place].strip().startswith("}"))
    (tmp_path / "state.json").write_text("\n".join(lines[:start] + lines[end + 1 :]))
    old = ResumePoint.load(tmp_path)
    assert old is not None
    assert (old.step, old.tokens, old.dollars) == (4, TokenUsage(), None)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sr.Run]:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)

    def make(**changes: Any) -> sr.Run:
        settings = {"out_dir": tmp_path / "run", "price": PRICE} | tiny_world.served_settings(**changes)
        search = tiny_world.make_search(tmp_path / "index")
        return sr.train(tiny_world.make_questions()[0], search, **tiny_world.given(sr.TrainConfig, settings))

    return make


async def by_length(episode: sr.Episode) -> float:
    return sum(episode.tokens) % 7 / 7


@pytest.mark.anyio
async def test_a_run_ends_before_its_limit_and_goes_on_with_a_higher_one(start: Callable[..., sr.Run]) -> None:
    held_out = tiny_world.make_questions()[1][:4]
    settings: dict[str, Any] = {"held_out": held_out, "reward": by_length, "kl_coefficient": 0.01}
    events: list[Event] = []
    none = await start(steps=1, max_cost=1e-6, on_event=events.append, **settings)
    assert (none.reason, none.steps) == ("max_cost", 0), "what is measured before the first step is not held back"
    assert none.estimated_cost is not None
    assert any("the cost limit is near" in event.text for event in events if isinstance(event, Notice))
    run = start(steps=1, max_cost=1e9, resume=True, **settings)
    first = await run
    assert first.reason == "finished"
    assert first.cost is not None
    assert first.cost.dollars is not None
    step = run.metrics["cost/dollars"][0]
    measured = first.cost.dollars - run.metrics["cost/total_dollars"][0]
    # Room for two further steps, not for three.
    limit = first.cost.dollars + 2.5 * step + measured
    second = await start(steps=4, max_cost=limit, resume=True, **settings)
    assert second.reason == "max_cost"
    assert 2 <= second.steps < 4
    assert second.cost is not None
    assert second.cost.dollars is not None
    assert first.cost.dollars < second.cost.dollars <= limit
    events.clear()
    run = start(steps=4, max_cost=1e9, resume=True, on_event=events.append, **settings)
    third = await run
    assert (third.reason, third.steps) == ("finished", 4)
    begun = next(event for event in events if isinstance(event, RunStarted))
    assert (begun.used, begun.spent) == (second.cost.tokens, second.cost.dollars), "each session goes on from the last"
    assert third.cost is not None
    assert third.cost.dollars == pytest.approx(Billing(PRICE).dollars(third.cost.tokens)), "the same price all along"
    said = [event.text for event in events if isinstance(event, Notice) and "cost: " in event.text]
    assert said[0].startswith("estimated cost: $")
    assert said[-1].startswith(f"cost: {third.cost} (")
    recorded = run.result.cost
    assert recorded is not None
    assert (recorded.dollars, recorded.tokens, recorded.text) == (
        third.cost.dollars,
        third.cost.tokens,
        third.cost.text,
    )


@pytest.mark.anyio
async def test_the_cost_of_a_run_is_what_its_records_say(start: Callable[..., sr.Run]) -> None:
    run = start(steps=2, reward=by_length, kl_coefficient=0.01, drop_constant_groups=False)
    cost = (await run).cost
    assert cost is not None
    rows = run.metrics
    played = [episode for step in (1, 2) for episode in _episodes(run, step)]
    read = TokenUsage(prompt=sum(len(one.tokens) for one in played), sampled=len(played))
    prompts = int(rows["env/all/total_ob_tokens"].sum()) + read.prompt
    assert cost.tokens.prompt == prompts
    assert cost.tokens.cached == rows["env/all/total_cached_ob_tokens"].sum()
    assert cost.tokens.sampled == rows["env/all/total_ac_tokens"].sum() + read.sampled
    assert cost.tokens.trained == sum(len(one.tokens) - 1 for one in played), "an input lacks its example's last token"
    for name in ("prompt", "cached_prompt", "sampled", "trained"):
        counted = getattr(cost.tokens, name.removesuffix("_prompt"))
        assert rows[f"cost/{name}_tokens"].sum() == counted, "no token belongs to no step"
    assert rows["cost/dollars"].sum() == pytest.approx(cost.dollars)
    assert rows["cost/total_dollars"].to_list()[-1] == pytest.approx(cost.dollars)


def _episodes(run: sr.Run, step: int) -> list[sr.Episode]:
    rows = run.episodes().filter(step=step).select("group", "member").collect()
    return [run.episode(step, group, member) for group, member in rows.iter_rows()]


@pytest.mark.anyio
async def test_what_is_asked_of_a_run_belongs_to_its_cost_and_a_live_view_says_the_same(
    start: Callable[..., sr.Run],
) -> None:
    state = RunState()
    run = start(steps=1, reward=by_length, on_event=lambda event: state.see(event, 0.0))
    answers = [
        await run.ask("river of mirin?"),
        await run.ask("river of mirin?", config=sr.config.AskConfig(max_turns=1)),
    ]
    cost = (await run).cost
    assert cost is not None
    asked = total_usage(sampling_usage(answer.episode) for answer in answers)
    assert asked.sampled
    rows = run.metrics
    assert cost.tokens.prompt == rows["env/all/total_ob_tokens"].sum() + asked.prompt
    assert cost.tokens.cached == rows["env/all/total_cached_ob_tokens"].sum() + asked.cached
    assert cost.tokens.sampled == rows["env/all/total_ac_tokens"].sum() + asked.sampled
    shown = state
    assert (shown.used, shown.cost.text) == (cost.tokens, cost.text)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_cost": 0.0}, "max_cost is 0.0 .* greater than 0"),
        ({"max_cost": float("nan")}, "a finite number"),
        ({"max_cost": 5.0, "price": None}, "max_cost needs a known price: the price of"),
        ({"max_cost": 5.0, "price": sr.runs.Price(1.0, 1.0)}, "only the price of sampling is known"),
    ],
)
async def test_a_limit_that_cannot_be_kept_is_refused_at_the_call(
    start: Callable[..., sr.Run], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=message):
        start(**settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # tests/test_billing.py and tests/evaluation/test_report.py have its price
@pytest.mark.anyio
async def test_the_embedded_service_costs_nothing_and_reaches_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    events: list[Event] = []
    settings = tiny_world.SETTINGS | {"group_size": 4, "groups_per_batch": 4, "steps": 1, "max_cost": 1e-9}
    model = str(tiny_world.model_folder())
    search = tiny_world.make_search(tmp_path / "index")
    questions = tiny_world.make_questions()[0]
    run = sr.train(
        questions,
        search,
        out_dir=tmp_path / "run",
        on_event=events.append,
        **tiny_world.given(sr.TrainConfig, settings, model=model),
    )
    result = await run
    assert (result.reason, result.steps) == ("finished", 1)
    assert result.cost is not None
    assert (result.cost.dollars, result.cost.text) == (0.0, "nothing: this machine")
    assert result.cost.tokens.sampled > 0
    assert not any("cost: " in event.text for event in events if isinstance(event, Notice))
    assert run.result.cost == result.cost
