"""A process stopped in the warm-up, and the same command again: what was measured and learned is not done again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import tinker
from tinker import types as tinker_types

from searchr1_async.local import LocalService
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.resume import ResumePoint, kept_checkpoints
from searchr1_async.runs.weights import find_weights
from tests import tiny_world
from tests.faults import scripted_world
from tests.faults.warm_up_child import STEPS

pytestmark = pytest.mark.anyio


def session(folder: Path, service: LocalService, stop: signal.Signals | None = None, after: int = 0) -> list[str]:
    """What a session says; with a signal it is stopped after so many steps of the warm-up."""
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    command = [sys.executable, "-m", "tests.faults.warm_up_child", folder, service.url, service.tokenizer_path]
    with (folder / "errors.log").open("ab") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=tiny_world.child_environment() | {"TINKER_API_KEY": service.api_key},
        )
        assert process.stdout is not None
        with process.stdout as stdout:
            for line in stdout:
                said.append(line.strip())
                if stop is not None and said[-1] == f"warm-up {after}":
                    process.send_signal(stop)
    code = process.wait(120)
    assert (code == 0) == (stop is None), (folder / "errors.log").read_text()[-3000:]
    return said


def untrained(folder: Path) -> tuple[int, int]:
    """Which file holds the measurement of the untrained model, and when it was written."""
    records = RunRecords(folder / "run")
    assert records.evaluation_labels()[0] == "untrained"
    found = min((folder / "run" / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime_ns).stat()
    return found.st_ino, found.st_mtime_ns


async def logprobs(service: LocalService, folder: Path, step: int) -> list[float]:
    path = find_weights(folder / "run", step).path
    client = await anyio.to_thread.run_sync(lambda: tinker.ServiceClient(base_url=service.url))
    try:
        sampler = await (await anyio.to_thread.run_sync(lambda: client.create_sampling_client(model_path=path)))
        found = await sampler.compute_logprobs(tinker_types.ModelInput.from_ints(list(range(4, 40))))
        return [value for value in found if value is not None]
    finally:
        await client.close("success")


@pytest.mark.slow
async def test_a_warm_up_that_was_stopped_goes_on_to_the_step_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scripted_world.service(tmp_path) as service:
        monkeypatch.setenv("TINKER_API_KEY", service.api_key)
        stopped, whole = tmp_path / "stopped", tmp_path / "whole"
        first = await anyio.to_thread.run_sync(session, stopped, service, signal.SIGINT, 2)
        assert first[0] == "evaluate untrained"
        point, measured = ResumePoint.load(stopped / "run"), untrained(stopped)
        assert point is not None
        assert point.warm_up is not None
        assert 2 <= point.warm_up <= 3
        assert kept_checkpoints(stopped / "run") == (), "weights in the middle of a warm-up are no result"

        second = await anyio.to_thread.run_sync(session, stopped, service, signal.SIGKILL, 4)
        third = await anyio.to_thread.run_sync(session, stopped, service)
        assert untrained(stopped) == measured
        assert "evaluate untrained" not in second + third
        steps = [int(line.split()[1]) for line in first + second + third if line.startswith("warm-up")]
        # A session begins by saying where it goes on.
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        assert steps == sorted(steps)
        trained = sum(line == "trained" for line in first + second + third)
        assert STEPS <= trained <= STEPS + 2, "but for the one under way at each stop, none was learned twice"

        await anyio.to_thread.run_sync(session, whole, service)
        warmed = await logprobs(service, whole, 0)
        assert await logprobs(service, stopped, 0) == warmed
        assert await logprobs(service, whole, 1) != warmed, "the step behind it changed them"
        point = ResumePoint.load(stopped / "run")
        assert point is not None
        assert point.warm_up is None
