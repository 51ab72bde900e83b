"""Out-of-process drawing, and how the subprocess ends."""

from __future__ import annotations

import gzip
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from searchr1_async.watch import charts
from searchr1_async.watch.charts import page_charts
from searchr1_async.watch.frame import outcome
from searchr1_async.watch.live_view import in_process
from searchr1_async.watch.state import RunState
from tests.watch.builders import Script

pytestmark = pytest.mark.anyio


def outcomes(steps: int = 30) -> tuple[Any, ...]:
    state, at = RunState(), 0.0
    for at, event in Script(steps=steps, groups=2, seconds_a_step=1, has_troubles=False).events():
        state.see(event, at)
    title, *rest = outcome(state, at)
    return title, rest, state.steps, state.evaluations


def test_the_page_has_a_chart_without_data_and_colours() -> None:
    spec, vega = page_charts(30)
    text = json.dumps(spec)
    assert [text.count(f'"data": {{"name": "{name}"}}') for name in ("steps", "running", "evaluations")] == [12, 4, 2]
    assert "background" not in spec
    assert "config" not in spec
    assert b"vegaEmbed" in gzip.decompress(vega)


def test_picture_contains_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(charts, "small_png", drawn.append)
    title, rest, steps, evaluations = outcomes()
    charts.last_picture(title, rest, steps, evaluations)
    charts.last_picture(title, rest, [], evaluations)
    for spec in drawn:
        assert spec["title"]["text"].startswith("Trained Qwen/Qwen3-8B: 30 of 30 steps in ")
        assert "untrained 18.0% [14.0%, 22.0%] → after RL" in " ".join(spec["title"]["subtitle"])
    rows = [dataset for dataset in drawn[0]["datasets"].values() if "label" in dataset[0]]
    assert [[row["label"] for row in dataset] for dataset in rows] == [["untrained", "step 20", "after RL"]]
    assert sorted(len(dataset) for dataset in drawn[0]["datasets"].values()) == [3, 30]


async def test_picture_is_small_and_sharp() -> None:
    """750 pixels wide at 2x, and small enough for a notebook."""
    png = await in_process(charts.last_picture, *outcomes())
    assert png.startswith(b"\x89PNG")
    assert 1400 <= int.from_bytes(png[16:20], "big") <= 1900
    assert 20_000 < len(png) < 200_000


async def test_subprocess_error_is_one_line() -> None:
    with pytest.raises(RuntimeError, match=r"^TypeError"):
        await in_process(int, ["no title"], 3)


async def test_no_secret_reaches_the_subprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-4711")
    monkeypatch.setenv("hf_token", "hf-4711")
    names = await in_process(os.getenv, "PATH"), await in_process(os.getenv, "TINKER_API_KEY")
    assert names == (os.environ["PATH"], None)
    assert await in_process(os.getenv, "hf_token") is None


async def test_cancelling_kills_the_subprocess(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began, program = tmp_path / "began", tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $$ > {began}.part; mv {began}.part {began}; exec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(in_process, print)
            while not began.exists():  # noqa: ASYNC110
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    killed = int(began.read_text())
    with anyio.fail_after(30), suppress(ProcessLookupError):
        while True:  # the event loop may reap it a moment later
            os.kill(killed, 0)
            await anyio.sleep(0.01)
