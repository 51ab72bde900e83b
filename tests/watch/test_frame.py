"""The live view's text."""

from __future__ import annotations

import msgspec
import pytest

from searchr1_async.episodes.types import StopReason
from searchr1_async.events import (
    EpisodeFinished,
    EvaluationFinished,
    Event,
    GroupDropped,
    Notice,
    PhaseStarted,
    PipelineChanged,
    RolloutSampled,
    RunEnded,
    RunStarted,
)
from searchr1_async.watch.frame import frame, summary
from searchr1_async.watch.markup import milliseconds, shown, template
from searchr1_async.watch.state import RunState
from tests.watch.builders import episode, group
from tests.watch.pages import Page

STARTED = RunStarted("train", "Qwen/Qwen3-8B", False, "e", "runs/a", total_steps=10, group_size=8, is_tinker=True)


def sampled(
    *, lag: float = 0.0, hold: float = 0.0, cpu: float = 0.4, limited_by: str = "work", **search: float
) -> Event:
    named = {f"search/{name.replace('__', '/')}": value for name, value in search.items()}
    return RolloutSampled(
        12, 7, 1, 3, 2, 5, 9000, 700, named or {"search/queries": 1.0}, limited_by, lag, lag, hold, cpu
    )


def after(*events: tuple[float, Event]) -> tuple[RunState, float]:
    state, now = RunState(), 0.0
    state.see(STARTED, now)
    for now, event in events:
        state.see(event, now)
    return state, now


def alerts(*events: tuple[float, Event]) -> list[str]:
    state, now = after(*events)
    return frame(state, now)["alerts"]


def test_healthy_run_has_no_alerts() -> None:
    assert alerts((1.0, sampled()), (2.0, EpisodeFinished(episode(), 1))) == []


def test_search_down_alert() -> None:
    (text,) = alerts((1.0, sampled(store__seconds_down=12.0)))
    assert text.startswith("Search has been down for 12 s")


def test_rate_limit_alert() -> None:
    (text,) = alerts((1.0, sampled(limited_by="service")))
    assert text.startswith("The service is rate limiting")


def test_failed_episodes_alert() -> None:
    failed = EpisodeFinished(episode(stop_reason=StopReason.FAILED, turns=()), 1)
    assert alerts((1.0, failed), (1.0, failed)) == [], "two are not enough"
    (text,) = alerts((1.0, failed), (1.0, failed), (1.0, failed))
    assert text == "3 of 3 recent episodes failed; they are not trained on. Last error: SearchError: the store is gone"


def test_late_event_loop_alert() -> None:
    (text,) = alerts((1.0, sampled(lag=0.2, cpu=0.95)))
    assert text.startswith("The event loop is late by 200 ms (median), and this process uses 0.95 of a core.")
    assert alerts((1.0, sampled(lag=0.2)), (2.0, sampled())) == []


def test_blocked_event_loop_stays_visible_for_a_while() -> None:
    held = (1.0, sampled(hold=4.2))
    (text,) = alerts(held, (20.0, sampled()))
    assert text.startswith("The event loop was blocked for over a second")
    assert alerts(held, (700.0, sampled())) == []


def test_warnings_stay_visible_for_a_while() -> None:
    warning = (1.0, Notice("the disk is nearly full", is_warning=True))
    assert alerts(warning, (2.0, warning[1])) == ["the disk is nearly full"]
    assert alerts(warning, (700.0, sampled())) == []


def test_cost() -> None:
    def cost(model: str, is_embedded: bool, is_tinker: bool = True) -> str:
        state = RunState()
        state.see(RunStarted("evaluate", model, is_embedded, "e", is_tinker=is_tinker), 0.0)
        state.see(sampled(), 1.0)
        return dict(dict(frame(state, 1.0)["sections"])["Tokens"])["cost"]

    assert cost("nobody/knows", False) == "unknown"
    assert cost("nobody/knows", True).startswith("nothing")
    assert cost("Qwen/Qwen3-8B", False).startswith("$0.00")
    assert cost("Qwen/Qwen3-8B", False, is_tinker=False) == "unknown", "a custom server has unknown prices"


def test_stack_parts_fit() -> None:
    state, now = after((1.0, sampled()))
    flight = frame(state, now)["stacks"][0]
    assert [(part["name"], part["count"], part["share"]) for part in flight["parts"]] == [
        ("sampling", "7", 7 / 12),
        ("queued", "1", 1 / 12),
        ("searching", "3", 3 / 12),
        ("in between", "1", 1 / 12),
    ]


def test_title_until_the_work_is_known() -> None:
    state = RunState()
    assert frame(state, 0.0, "Training in runs/a")["title"] == "Training in runs/a"
    state.see(STARTED, 0.0)
    assert frame(state, 0.0, "Training in runs/a")["title"] == "Training Qwen/Qwen3-8B"
    state.see(RunEnded("stopped"), 5.0)
    assert summary(state, 9.0).startswith("Trained Qwen/Qwen3-8B: 0 of 10 steps in 5.0 s, stopped.")


HOSTILE_NAMES = ('<img src=x onerror=alert(1)>"', "\u034f\u202e\x1b[31m", "</dl><script>alert(1)</script>")


@pytest.mark.parametrize("text", HOSTILE_NAMES)
def test_untrusted_text_is_never_markup(text: str) -> None:
    state, now = after(
        (1.0, sampled(limited_by=text)),
        (1.0, Notice(text, is_warning=True)),
        (1.0, PhaseStarted(text, 3, text, text)),
        (1.0, PipelineChanged(1, 0, 4, 1, 1, text)),  # type: ignore[arg-type]
        (1.0, GroupDropped(group(), 1, text)),  # type: ignore[arg-type]
        (1.0, EvaluationFinished(text, 1, {"exact_match": 0.5, f"exact_match/{text}": 0.5, "exact_match/b": 0.1})),
    )
    state.run = msgspec.structs.replace(state.run, model=text)
    shown, macros = frame(state, now), template("live.html").module
    for name in ("head", "bars", "alerts", "stacks", "sections"):
        page = Page(str(getattr(macros, name)(shown)))
        assert {tag for tag, _ in page.tags} <= {"div", "span", "label", "progress", "b", "i", "dl", "dt", "dd"}
        assert all(set(attrs) <= {"class", "style", "role", "aria-hidden", "max", "value"} for _, attrs in page.tags)
        assert "\u202e" not in page.text
    assert "</dl><script>" not in str(macros.sections(shown))


def test_short_times() -> None:
    assert [milliseconds(seconds) for seconds in (0.0004, 0.0123, 0.9999, 2.5)] == ["0 ms", "12 ms", "1.0 s", "2.5 s"]


def test_untrusted_text() -> None:
    assert shown("a\nb\x1b[31m\u202ec") == "a b\\x1b[31m\\u202ec"
    assert shown("x" * 10**6) == "x" * 300 + "…"
