"""View selection, and the live view's redraw rate, shutdown and isolation from the run."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from searchr1_async.errors import ConfigurationError
from searchr1_async.events import EpisodeFinished, Event, Notice, PhaseAdvanced, PhaseStarted, RunStarted, StepFinished
from searchr1_async.watch import views
from searchr1_async.watch.charts import page_charts
from searchr1_async.watch.live_view import LiveView
from searchr1_async.watch.views import ConsoleView, open_view
from tests.watch.builders import episode

pytestmark = pytest.mark.anyio

STARTED = RunStarted("train", "Qwen/Qwen3-8B", False, "e", "runs/a", total_steps=10, is_tinker=True)


class Surface:
    """Records what is drawn."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.rows: dict[str, list[Any]] = {}
        self.charts: list[tuple[Any, bytes]] = []
        self.closed: list[tuple[str, bytes | None]] = []
        self.drawn = asyncio.Event()

    def draw(self, shown: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        self.frames.append(shown)
        self.rows = rows
        self.drawn.set()

    def add_charts(self, spec: Any, vega: bytes) -> None:
        self.charts.append((spec, vega))

    def close(self, text: str, png: bytes | None) -> None:
        self.closed.append((text, png))

    async def sees(self, what: str) -> None:
        """Waits for a draw that satisfies the condition."""
        with anyio.fail_after(10):
            while not any(what in str(frame) for frame in self.frames):
                self.drawn.clear()
                await self.drawn.wait()


async def instantly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Draws nothing."""
    return ({"mark": "line"}, b"vega") if function is page_charts else str(arguments[0]).encode()


def step(number: int) -> Event:
    return StepFinished(number, {"env/all/reward/total": 0.1 * number})


async def test_run_is_drawn_and_leaves_a_picture() -> None:
    surface = Surface()
    async with LiveView(surface, drawing=instantly) as view:
        view(STARTED)
        view(step(1))
        await surface.sees("Step 1 of 10")
        view(step(2))
        await surface.sees("Step 2 of 10")
    assert [row["step"] for row in surface.rows["steps"]] == [1, 2]
    assert surface.charts == [({"mark": "line"}, b"vega")]
    ((text, png),) = surface.closed
    assert text.startswith("Trained Qwen/Qwen3-8B: 2 of 10 steps in ")
    assert png is not None
    assert png.endswith(b"finished")
    assert surface.frames[-1]["standing"] == "ended"


async def test_draws_are_rate_limited() -> None:
    surface = Surface()
    async with LiveView(surface, drawing=instantly) as view:
        for _ in range(1000):
            view(EpisodeFinished(episode(), 1))
        before = len(surface.frames)
        await anyio.lowlevel.checkpoint()
    assert before == 1, "the first draw is in the constructor"
    assert len(surface.frames) <= 3
    assert surface.frames[-1]["sections"][0][0] == "Rollouts"


@pytest.mark.parametrize(("error", "reason"), [(asyncio.CancelledError, "stopped"), (ValueError, "failed")])
async def test_view_closes_however_the_run_ends(error: type[BaseException], reason: str) -> None:
    surface = Surface()

    async def run() -> None:
        async with LiveView(surface, drawing=instantly) as view:
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
        async with LiveView(surface, drawing=instantly) as view:
            view(STARTED)
            view(step(1))
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert surface.closed[0][1] is not None


async def test_second_interrupt_still_leaves_the_text() -> None:
    async def endless(function: Callable[..., Any], *arguments: Any) -> Any:
        if function is page_charts:
            return {}, b""
        began.set()
        await anyio.sleep_forever()

    surface, began = Surface(), anyio.Event()

    async def work() -> None:
        async with LiveView(surface, drawing=endless) as view:
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
    async def failing(function: Callable[..., Any], *arguments: Any) -> Any:
        raise RuntimeError("no drawing here")

    surface = Surface()
    async with LiveView(surface, drawing=failing) as view:
        view(STARTED)
        view(step(1))
        await surface.sees("Step 1 of 10")
    assert surface.charts == []
    assert surface.closed[0][1] is None
    assert len([record for record in caplog.records if "could not be drawn" in record.getMessage()]) == 1


async def test_broken_surface_does_not_affect_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Surface):
        def draw(self, shown: dict[str, Any], rows: dict[str, list[Any]]) -> None:
            self.drawn.set()
            raise OSError("the page is gone")

        def close(self, text: str, png: bytes | None) -> None:
            raise OSError("the page is gone")

    surface = Broken()
    async with LiveView(surface, drawing=instantly) as view:
        view(STARTED)
        surface.drawn.clear()
        await surface.drawn.wait()
        view(step(1))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, "logged once, however often it fails"


async def test_no_task_leaks() -> None:
    before = asyncio.all_tasks()
    async with LiveView(Surface(), drawing=instantly) as view:
        view(STARTED)
        await anyio.lowlevel.checkpoint()
    assert asyncio.all_tasks() == before


# --- views that fail ----------------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A vanished terminal."""

    def write(self, text: str, /) -> int:
        raise OSError(5, "Input/output error")

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("live", [True, False])
async def test_vanished_terminal_does_not_affect_the_run(live: bool) -> None:
    async with ConsoleView(Gone(), live=live) as view:
        view(Notice("starting"))
        view(PhaseStarted("train", 3, "steps"))
        view(step(1))


def test_unreachable_page_gets_no_view(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def closed(title: str, **options: object) -> Any:
        raise RuntimeError("comm is closed")

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setattr(views, "WidgetSurface", closed)
    assert open_view(title="a run") is None
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
    assert isinstance(open_view(title="a run"), ConsoleView)


async def test_console_view(capsys: pytest.CaptureFixture[str]) -> None:
    view = open_view("plain", title="a run")
    assert view is not None
    async with view:
        view(step(3))
    assert capsys.readouterr().err.startswith("step 3 · reward +0.300")


@pytest.mark.parametrize("choice", ["fancy", "", "widget", 2, None])
def test_unknown_choice(choice: Any) -> None:
    with pytest.raises(ConfigurationError, match="choose True, False, 'plain' or 'quiet'"):
        open_view(choice, title="a run")


def test_a_kernel_without_anywidget_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setattr(views.importlib.util, "find_spec", lambda name: None)
    assert isinstance(open_view(title="a run"), ConsoleView)


async def test_quiet_view_is_silent_for_short_work(capsys: pytest.CaptureFixture[str]) -> None:
    view = open_view("quiet", title="ask")
    assert view is not None
    async with view:
        for event in (STARTED, Notice("starting"), PhaseStarted("index", 2, "passages")):
            view(event)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


async def test_quiet_view_reports_longer_work() -> None:
    stream = io.StringIO()
    async with ConsoleView(stream, quiet_for=0.01) as view:
        for event in (STARTED, Notice("looking"), Notice("starting the service")):
            view(event)
        with anyio.fail_after(10):
            while "starting the service" not in stream.getvalue():
                await anyio.lowlevel.checkpoint()
        view(PhaseAdvanced("index", 1))  # of a phase that it has not shown
        view(Notice("the service is up"))
    assert "looking" not in stream.getvalue()
    assert stream.getvalue().index("starting the service") < stream.getvalue().index("the service is up")
