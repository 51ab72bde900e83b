"""Out-of-process drawing, and how the subprocess ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any

import anyio
import pytest

from searchr1_async.records.metrics import CURVES
from searchr1_async.watch import drawing
from searchr1_async.watch.drawing import DrawingError, filled, page_specs, picture_spec, run
from searchr1_async.watch.state import RunState
from searchr1_async.watch.view import curve_table, picture_task
from tests.watch.builders import Script

pytestmark = pytest.mark.anyio


def task(steps: int = 30) -> dict[str, Any]:
    state, at = RunState(), 0.0
    for at, event in Script(steps=steps, groups=2, seconds_a_step=1, has_troubles=False).events():
        state.see(event, at)
    found = picture_task(state, at)
    assert found is not None
    return found


def names(spec: dict[str, Any]) -> set[str]:
    """Every named dataset of a chart."""
    text = json.dumps(spec)
    return {name for name in ("steps", "running", "evaluations", "suites") if f'"data": {{"name": "{name}"}}' in text}


def test_curves_match_the_series() -> None:
    assert [curve["name"] for curve in curve_table()] == [curve.name for curve in CURVES]


def test_page_has_a_chart_per_curve() -> None:
    specs = page_specs(curve_table(), 3, from_zero=True)
    assert {name: names(spec) for name, spec in specs.items()} == {
        "reward/total": {"steps", "running"},
        "correct": {"steps", "running", "evaluations"},
        "turns_per_episode": {"steps", "running"},
        "valid_calls": {"steps", "running"},
    }
    assert all("background" not in spec and "config" not in spec for spec in specs.values()), (
        "colours are set by the page"
    )


def test_picture_contains_the_outcome() -> None:
    spec = filled(picture_spec(curve_table(), 2, from_zero=True), task())
    assert spec["title"]["text"].startswith("Trained Qwen/Qwen3-8B: 30 of 30 steps in ")
    assert "untrained 18.0% [14.0%, 22.0%] → after RL" in spec["title"]["subtitle"][0]
    assert [row["label"] for row in spec["datasets"]["evaluations"]] == ["untrained", "step 20", "after RL"]
    assert len(spec["datasets"]["steps"]) == 30


async def test_picture_is_small_and_sharp() -> None:
    """900 pixels wide at 2x, and small enough for a notebook."""
    png = await run("picture", task())
    assert png.startswith(b"\x89PNG")
    assert 1700 <= int.from_bytes(png[16:20], "big") <= 1900
    assert 20_000 < len(png) < 200_000


async def test_subprocess_error_is_one_line() -> None:
    with pytest.raises(DrawingError, match=r"^drawing picture failed: KeyError: 'steps'$"):
        await run("picture", {})


async def test_subprocess_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DrawingError, match="did not start"):
        await run("picture", {})
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(DrawingError, match=r"sys\.executable is empty"):
        await run("picture", {})


async def test_cancelling_kills_the_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    has_started, has_ended = threading.Event(), threading.Event()

    class Sleeping(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(600)"], **options)
            started.append(self)
            has_started.set()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            has_ended.set()

    monkeypatch.setattr(drawing.subprocess, "Popen", Sleeping)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, "picture", {})
            await anyio.to_thread.run_sync(has_started.wait)
            tasks.cancel_scope.cancel()
        await anyio.to_thread.run_sync(has_ended.wait)
    assert started[0].returncode == -9
    assert started[0].stdout is not None
    assert started[0].stdout.closed


def test_no_secret_reaches_the_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-4711")
    monkeypatch.setenv("HF_TOKEN", "hf-4711")
    given = drawing._environment()
    assert not {"tml-4711", "hf-4711"} & set(given.values())
    assert given["PATH"] == os.environ["PATH"]
