"""View selection, and the live view's redraw rate, shutdown and isolation from the run."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from searchr1_async.errors import ConfigurationError
from searchr1_async.events import EpisodeFinished, Event, Notice, PhaseAdvanced, PhaseStarted, RunStarted, StepFinished
from searchr1_async.watch import dashboard
from searchr1_async.watch.console import ConsoleProgress, ConsoleView, QuietView
from searchr1_async.watch.dashboard import SafeView, open_view
from searchr1_async.watch.drawing import Charts, Curve, Drawer, DrawingError
from searchr1_async.watch.frame import Frame
from searchr1_async.watch.view import LiveView, News
from tests.watch.builders import episode

pytestmark = pytest.mark.anyio

STARTED = RunStarted("train", "Qwen/Qwen3-8B", False, "e", "runs/a", total_steps=10, is_tinker=True)


class Surface:
    """Records what is drawn."""

    seconds_between = 0.01
    has_curves = True

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.rows: list[Any] = []
        self.charts: list[Charts | None] = []
        self.closed: list[tuple[str, bytes | None]] = []
        self.drawn = asyncio.Event()

    def draw(self, frame: Frame, news: News | None) -> None:
        self.frames.append(frame)
        if news is not None:
            self.rows[news.first :] = news.rows
        self.drawn.set()

    def add_charts(self, charts: Charts | None) -> None:
        self.charts.append(charts)
        self.drawn.set()

    def close(self, text: str, png: bytes | None) -> None:
        self.closed.append((text, png))

    async def sees(self, what: str) -> None:
        """Waits for a draw that satisfies the condition."""
        with anyio.fail_after(10):
            while not any(what in str(frame) for frame in self.frames):
                self.drawn.clear()
                await self.drawn.wait()


class Instantly(Drawer):
    """Draws nothing."""

    async def charts(self, window: int, curves: Sequence[Curve], *, from_zero: bool) -> Charts:
        return Charts({"reward": {}}, {"a": "picture"}, b"vega")

    async def picture(self, task: Mapping[str, Any]) -> bytes:
        return f"{task['title']} {task.get('spec')}".encode()


class Controls:
    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.pressed = anyio.Event()

    async def pause(self) -> None:
        self.note("pause")

    async def resume(self) -> None:
        self.note("resume")
        raise RuntimeError("cannot resume")

    def request_stop(self) -> None:
        self.note("stop")

    def note(self, what: str) -> None:
        self.said.append((what, threading.get_ident()))
        self.pressed.set()

    async def next(self) -> str:
        with anyio.fail_after(10):
            await self.pressed.wait()
        self.pressed = anyio.Event()
        return self.said[-1][0]


def step(number: int) -> Event:
    return StepFinished(number, {"env/all/reward/total": 0.1 * number})


async def test_run_is_drawn_and_leaves_a_picture() -> None:
    surface = Surface()
    async with LiveView(surface, drawer=Instantly()) as view:
        view(STARTED)
        view(step(1))
        await surface.sees("Step 1 of 10")
        view(step(2))
        await surface.sees("Step 2 of 10")
    assert [row["step"] for row in surface.rows] == [1, 2]
    assert surface.charts == [Charts({"reward": {}}, {"a": "picture"}, b"vega")]
    ((text, png),) = surface.closed
    assert text.startswith("Trained Qwen/Qwen3-8B: 2 of 10 steps in ")
    assert png is not None
    assert png.endswith(b"finished {'a': 'picture'}")
    assert surface.frames[-1]["standing"] == "ended"


async def test_draws_are_rate_limited() -> None:
    surface = Surface()
    surface.seconds_between = 0.25
    async with LiveView(surface, drawer=Instantly()) as view:
        for _ in range(1000):
            view(EpisodeFinished(episode(), 1))
        before = len(surface.frames)
        await anyio.lowlevel.checkpoint()
    assert before == 1, "the first draw is in the constructor"
    assert len(surface.frames) <= 3
    assert surface.frames[-1]["sections"][0]["title"] == "Rollouts"


async def test_unchanged_state_is_not_redrawn() -> None:
    surface = Surface()
    view = LiveView(surface, drawer=Instantly(), clock=lambda: 5.0)
    view(STARTED)
    view._draw()
    drawn = len(surface.frames)
    view(STARTED)
    view._draw()
    assert len(surface.frames) == drawn == 2


@pytest.mark.parametrize(("error", "reason"), [(asyncio.CancelledError, "stopped"), (ValueError, "failed")])
async def test_view_closes_however_the_run_ends(error: type[BaseException], reason: str) -> None:
    surface = Surface()

    async def run() -> None:
        async with LiveView(surface, drawer=Instantly()) as view:
            view(STARTED)
            view(step(1))
            raise error

    with pytest.raises(error):
        await run()
    ((text, png),) = surface.closed
    assert reason in text
    assert png is not None


async def test_cancelled_run_closes_completely() -> None:
    """An interrupted cell: the scope stays cancelled while the view closes."""
    surface = Surface()
    with anyio.CancelScope() as scope:
        async with LiveView(surface, drawer=Instantly()) as view:
            view(STARTED)
            view(step(1))
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert surface.closed[0][1] is not None


async def test_second_interrupt_still_leaves_the_text() -> None:
    class Endless(Instantly):
        async def picture(self, task: Mapping[str, Any]) -> bytes:
            began.set()
            await anyio.sleep_forever()
            raise AssertionError

    surface, began = Surface(), anyio.Event()

    async def work() -> None:
        async with LiveView(surface, drawer=Endless()) as view:
            view(STARTED)
            view(step(1))

    task = asyncio.create_task(work())
    with anyio.fail_after(10):
        await began.wait()
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert surface.closed[0][1] is None
    assert surface.closed[0][0].startswith("Trained Qwen/Qwen3-8B")


async def test_drawing_failures_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Drawer):
        async def charts(self, window: int, curves: Sequence[Curve], *, from_zero: bool) -> Charts:
            raise DrawingError("no drawing here")

        async def picture(self, task: Mapping[str, Any]) -> bytes:
            raise DrawingError("no picture here")

    surface = Surface()
    async with LiveView(surface, drawer=Failing()) as view:
        view(STARTED)
        view(step(1))
        with anyio.fail_after(10):
            while not surface.charts:
                surface.drawn.clear()
                await surface.drawn.wait()
    assert surface.charts == [None]
    assert surface.closed[0][1] is None
    assert "no drawing here" in caplog.text
    assert "no picture here" in caplog.text


async def test_broken_surface_does_not_affect_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Surface):
        def draw(self, frame: Frame, news: News | None) -> None:
            self.drawn.set()
            raise OSError("the page is gone")

        def close(self, text: str, png: bytes | None) -> None:
            raise OSError("the page is gone")

    surface = Broken()
    async with LiveView(surface, drawer=Instantly()) as view:
        view(STARTED)
        surface.drawn.clear()
        await surface.drawn.wait()
        view(step(1))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, "logged once, however often it fails"


async def test_buttons_from_another_thread_act_on_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    """A kernel with subshells delivers widget messages in another thread."""
    controls = Controls()
    async with LiveView(Surface(), controls=controls, drawer=Instantly()) as view:
        for button in ("pause", "stop", "resume"):
            await asyncio.to_thread(view.press, button)
            assert await controls.next() == button
        view.press("hello")
    assert {thread for _, thread in controls.said} == {threading.get_ident()}
    assert "cannot resume" in caplog.text, "a button's failure is logged and does not end the run"
    view.press("stop")
    await anyio.lowlevel.checkpoint()
    assert len(controls.said) == 3, "buttons do nothing after the end"


async def test_hello_resends_all_data() -> None:
    surface = Surface()
    async with LiveView(surface, drawer=Instantly()) as view:
        view(STARTED)
        view(step(1))
        await surface.sees("Step 1 of 10")
        surface.rows.clear()
        surface.frames.clear()
        view.press("hello")
        with anyio.fail_after(10):
            while not surface.rows:
                surface.drawn.clear()
                await surface.drawn.wait()
    assert [row["step"] for row in surface.rows] == [1]


async def test_no_task_leaks() -> None:
    before = asyncio.all_tasks()
    async with LiveView(Surface(), controls=Controls(), drawer=Instantly()) as view:
        view(STARTED)
        view.press("pause")
        await anyio.lowlevel.checkpoint()
    assert asyncio.all_tasks() == before


# --- views that fail ----------------------------------------------------------------------------------------------------


class FailingView:
    """Fails in one method, like a vanished terminal."""

    def __init__(self, moment: str) -> None:
        self._moment = moment
        self.events = 0
        self._at("made")

    def _at(self, moment: str) -> None:
        if moment == self._moment:
            raise OSError(5, "Input/output error")

    def __call__(self, event: Event) -> None:
        self.events += 1
        self._at("drawn")

    async def __aenter__(self) -> FailingView:
        self._at("entered")
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._at("left")


@pytest.mark.parametrize("moment", ["made", "entered", "drawn", "left"])
async def test_failing_view_does_not_change_the_outcome(moment: str, caplog: pytest.LogCaptureFixture) -> None:
    shown = SafeView(lambda: FailingView(moment))
    async with shown:
        for number in range(3):
            shown(step(number))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Input/output error" in record.getMessage()
    assert record.exc_info is None, "one line"


async def test_error_of_the_work_propagates_through_failing_view() -> None:
    with pytest.raises(ZeroDivisionError):
        async with SafeView(lambda: FailingView("left")):
            raise ZeroDivisionError


def test_unreachable_page_gets_no_view(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def closed(title: str, controls: object) -> LiveView:
        raise RuntimeError("comm is closed")

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setattr(dashboard, "_widget", closed)
    shown = open_view("widget", title="a run")
    assert shown is not None
    assert shown.view is None
    shown(step(1))
    assert "comm is closed" in caplog.text


async def test_process_without_stderr_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    shown = open_view("plain", title="a run")
    assert shown is not None
    async with shown:
        shown(step(1))


# --- which view ---------------------------------------------------------------------------------------------------------


def test_no_view() -> None:
    assert open_view(False, title="a run") is None


def test_default_outside_a_notebook_is_the_console() -> None:
    for choice in (True, "auto"):
        shown = open_view(choice, title="a run")
        assert shown is not None
        assert isinstance(shown.view, ConsoleView)


async def test_console_view(capsys: pytest.CaptureFixture[str]) -> None:
    view = open_view("plain", title="a run")
    assert view is not None
    async with view:
        view(step(3))
    assert capsys.readouterr().err.startswith("step 3 · reward +0.300")


@pytest.mark.parametrize("choice", ["fancy", "", 2, None])
def test_unknown_choice(choice: Any) -> None:
    with pytest.raises(ConfigurationError, match="choose True, False or one of 'auto', 'widget'"):
        open_view(choice, title="a run")


@pytest.mark.parametrize("choice", ["widget", "rich"])
def test_choices_that_need_a_notebook(choice: Any) -> None:
    with pytest.raises(ConfigurationError, match="needs a Jupyter kernel"):
        open_view(choice, title="a run")


def test_widget_without_anywidget(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'searchr1_async\[notebook\]'"):
        open_view("widget", title="a run")
    assert dashboard._fitting() == "rich"


async def test_quiet_view_is_silent_for_short_work(capsys: pytest.CaptureFixture[str]) -> None:
    view = open_view("quiet", title="ask")
    assert view is not None
    assert isinstance(view.view, QuietView)
    async with view:
        for event in (STARTED, Notice("starting"), PhaseStarted("index", 2, "passages")):
            view(event)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


async def test_quiet_view_reports_longer_work() -> None:
    stream = io.StringIO()
    async with QuietView(ConsoleProgress(stream, live=False), seconds=0.01) as view:
        for event in (Notice("looking"), Notice("starting the service"), STARTED):
            view(event)
        with anyio.fail_after(10):
            while "starting the service" not in stream.getvalue():
                await anyio.lowlevel.checkpoint()
        view(PhaseAdvanced("index", 1))  # of a phase that it has not shown
        view(Notice("the service is up"))
    assert "looking" not in stream.getvalue()
    assert stream.getvalue().index("starting the service") < stream.getvalue().index("the service is up")
