"""The live view's text, plain and as HTML."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from searchr1_async.episodes.types import StopReason
from searchr1_async.events import EpisodeFinished, Event, Notice, PhaseStarted, RolloutSampled, RunEnded, RunStarted
from searchr1_async.watch.dashboard import as_html, as_text
from searchr1_async.watch.frame import Frame, compact, frame, milliseconds, shown, summary
from searchr1_async.watch.state import RunState
from searchr1_async.watch.view import picture_task
from tests.watch.builders import HOSTILE, Script, episode

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
    return [alert["text"] for alert in frame(state, now)["alerts"]]


def test_healthy_run_has_no_alerts() -> None:
    assert alerts((1.0, sampled()), (2.0, EpisodeFinished(episode(), 1))) == []


def test_search_down_alert() -> None:
    (text,) = alerts((1.0, sampled(store__seconds_down=12.0)))
    assert text.startswith("Search has been down for 12 s")


def test_failed_searches_alert() -> None:
    (text,) = alerts((1.0, sampled(failed=2.0)), (2.0, sampled(failed=5.0)))
    assert text.startswith("3 searches failed")


def test_rate_limit_alert() -> None:
    (text,) = alerts((1.0, sampled(limited_by="service")))
    assert text.startswith("The service is rate limiting")


def test_failed_episodes_alert() -> None:
    failed = EpisodeFinished(episode(stop_reason=StopReason.FAILED, turns=()), 1)
    assert alerts((1.0, failed), (1.0, failed)) == [], "two are not enough"
    (text,) = alerts((1.0, failed), (1.0, failed), (1.0, failed))
    assert text == "3 of 3 recent episodes failed; they are not trained on. Last error: SearchError: the store is gone"


def test_late_event_loop_alert() -> None:
    assert alerts((1.0, sampled(lag=0.2))) == [], "once is not enough"
    (text,) = alerts((1.0, sampled(lag=0.2)), (4.0, sampled(lag=0.2)))
    assert text.startswith(
        "The event loop is late by 200 ms (median): something blocks it, such as another running cell"
    )
    (text,) = alerts((1.0, sampled(lag=0.2, cpu=0.95)), (4.0, sampled(lag=0.2, cpu=0.95)))
    assert "0.95 of a core" in text
    assert alerts((1.0, sampled(lag=0.2)), (2.0, sampled()), (4.0, sampled(lag=0.2))) == []


def test_blocked_event_loop_alert() -> None:
    held = (1.0, sampled(hold=4.2))
    (text,) = alerts(held, (20.0, sampled()))
    assert text.startswith("The event loop was blocked for 4.2 s")
    assert alerts(held, (40.0, sampled())) == []


def test_warnings_stay_visible_for_a_while() -> None:
    warning = (1.0, Notice("the disk is nearly full", is_warning=True))
    assert alerts(warning, (2.0, warning[1])) == ["the disk is nearly full (2 times)"]
    assert alerts(warning, (700.0, sampled())) == []


def test_cost() -> None:
    def cost(model: str, is_embedded: bool, is_tinker: bool = True) -> str:
        state = RunState()
        state.see(RunStarted("evaluate", model, is_embedded, "e", is_tinker=is_tinker), 0.0)
        state.see(sampled(), 1.0)
        tokens = next(section for section in frame(state, 1.0)["sections"] if section["title"] == "Tokens")
        return dict(tokens["rows"])["cost"]

    assert cost("nobody/knows", False) == "unknown"
    assert cost("nobody/knows", True).startswith("nothing")
    assert cost("Qwen/Qwen3-8B", False).startswith("$0.00")
    assert cost("Qwen/Qwen3-8B", False, is_tinker=False) == "unknown", "a custom server has unknown prices"


def test_stack_parts_fit() -> None:
    state, now = after((1.0, sampled()))
    flight = frame(state, now)["stacks"][0]
    assert [(part["name"], part["count"]) for part in flight["parts"]] == [
        ("sampling", 7),
        ("queued", 1),
        ("searching", 3),
        ("in between", 1),
    ]
    assert flight["whole"] == 12


def test_title_until_the_work_is_known() -> None:
    state = RunState()
    assert frame(state, 0.0, "Training in runs/a")["title"] == "Training in runs/a"
    state.see(STARTED, 0.0)
    assert frame(state, 0.0, "Training in runs/a")["title"] == "Training Qwen/Qwen3-8B"
    state.see(RunEnded("stopped"), 5.0)
    assert summary(state, 9.0).startswith("Trained Qwen/Qwen3-8B: 0 of 10 steps in 5.0 s, stopped.")


def test_empty_run_has_no_picture() -> None:
    state, now = after((1.0, sampled()))
    assert picture_task(state, now) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(987, "987"), (9999, "9,999"), (12_345, "12.3 k"), (4_560_000, "4.56 M"), (1_200_000_000, "1.20 G")],
)
def test_compact_counts(count: int, text: str) -> None:
    assert compact(count) == text


def test_short_times() -> None:
    assert [milliseconds(seconds) for seconds in (0.0004, 0.0123, 0.9999, 2.5)] == ["0 ms", "12 ms", "1.0 s", "2.5 s"]


def test_untrusted_text() -> None:
    assert shown("a\nb\x1b[31m\u202ec") == "a b\\x1b[31m\\u202ec"
    assert shown("x" * 10**6) == "x" * 300 + "…"


def whole_run() -> Frame:
    state = RunState()
    for at, event in Script(steps=12, groups=4, seconds_a_step=2).events():
        if at > 20:
            break
        state.see(event, at)
    return frame(state, 20.0)


def test_rich_text_has_all_text_of_the_widget() -> None:
    said = whole_run()
    for text in (as_text(said), as_html(said).replace("&amp;", "&").replace("&#x27;", "'")):
        assert said["progress"] in text
        assert said["curves"]["reward/total"] in text
        for section in said["sections"]:
            for label, value in section["rows"]:
                assert label in text
                assert value in text


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)


def test_hostile_text_is_never_markup() -> None:
    state = RunState()
    state.see(RunStarted("train", HOSTILE, False, HOSTILE), 0.0)
    state.see(PhaseStarted("<img src=x>", 3, "<b>", "<i onclick=1>"), 0.0)
    state.see(Notice(HOSTILE, is_warning=True), 0.0)
    tags = _Tags()
    tags.feed(as_html(frame(state, 0.0)))
    assert tags.tags <= {"div", "p", "b", "span", "progress", "table", "tr", "th", "td"}
