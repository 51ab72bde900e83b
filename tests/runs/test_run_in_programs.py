"""Programs that forget to await their run, as processes and within this one."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import searchr1_async as sr
from searchr1_async.boundary.signals import exit_status
from tests import tiny_world
from tests.faults import scripted_world

SCRIPT = """
import asyncio, sys
from pathlib import Path
import searchr1_async as sr
from tests.faults import scripted_world

async def main():
    folder = Path(sys.argv[1])
    search = scripted_world.make_search(folder / "index")
    config = sr.TrainConfig(model="scripted")
    sr.train(scripted_world.questions(), search, folder / "run", config, service=sys.argv[2], progress="plain")

asyncio.run(main())
"""


CUT_WHILE_CONNECTING = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""anyio leaves a coroutine unawaited if it is cancelled between two connection attempts."""


@pytest.fixture
def service() -> Iterator[str]:
    """The address of a service that accepts connections and never answers, so a run waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def start(tmp_path: Path, service: str) -> Callable[[], sr.Run]:
    def train(name: str = "run") -> sr.Run:
        return sr.train(
            scripted_world.questions(),
            scripted_world.make_search(tmp_path / "index"),
            out_dir=tmp_path / name,
            service=service,
            progress=False,
            config=sr.TrainConfig(model="scripted"),
        )

    return train


def test_a_script_without_await_gets_advice(tmp_path: Path, service: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, service],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=tiny_world.child_environment(),
    )
    assert "await sr.train(...)" in found.stderr
    assert str(tmp_path / "run") in found.stderr
    assert "Traceback" not in found.stderr


@CUT_WHILE_CONNECTING
def test_every_unawaited_run_is_named(start: Callable[..., sr.Run], caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        start("first")
        start("second")
        await asyncio.sleep(0.1)

    asyncio.run(main())
    for name in ("first", "second"):
        assert any(name in record.message and "await sr.train" in record.message for record in caplog.records)


@CUT_WHILE_CONNECTING
def test_a_stopped_or_awaited_run_is_not_reported(
    start: Callable[..., sr.Run], caplog: pytest.LogCaptureFixture
) -> None:
    async def stopped() -> None:
        run = start()
        await asyncio.sleep(0.1)
        run.request_stop()

    async def awaited() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(start(), 0.2)

    asyncio.run(stopped())
    asyncio.run(awaited())
    assert "without awaiting" not in caplog.text


def test_signal_handlers_are_restored_when_a_run_ends(start: Callable[..., sr.Run]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    async def main() -> None:
        inside = signal.getsignal(signal.SIGTERM)
        first, second = start("first"), start("second")
        assert signal.getsignal(signal.SIGTERM) != inside
        await first.stop()
        assert signal.getsignal(signal.SIGTERM) != inside, "one is still under way"
        await second.stop()
        assert signal.getsignal(signal.SIGTERM) == inside

    asyncio.run(main())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("is_awaited", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_after_its_run(
    start: Callable[..., sr.Run], number: signal.Signals, is_awaited: bool
) -> None:
    """Whatever the program waits for, it is cancelled once the run has closed everything, and can close its own resources."""
    runs, seen = list[sr.Run](), list[str]()

    async def main() -> None:
        runs.append(run := start())
        asyncio.get_running_loop().call_later(0.1, signal.raise_signal, number)
        try:
            await (run if is_awaited else asyncio.sleep(60))
        except asyncio.CancelledError:
            seen.append("cancelled")
            assert run.done
            await asyncio.sleep(0.01)
            seen.append("closed")
            raise

    with pytest.raises(KeyboardInterrupt, match="keeps every finished step") as ended:
        asyncio.run(main())
    assert seen == ["cancelled", "closed"]
    assert exit_status(ended.value) == 128 + number


def test_an_interrupt_raised_in_a_library_thread_counts(
    start: Callable[..., sr.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As polars does from its own handler, with SIGINT ignored: it comes out of a worker thread, in exception groups."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("searchr1_async.training.job.TrainingJob.identity", interrupted)

    async def main() -> None:
        await start()

    with pytest.raises(KeyboardInterrupt, match="keeps every finished step"):
        asyncio.run(main())


def test_the_programs_own_handler_is_left_alone(start: Callable[..., sr.Run]) -> None:
    came = list[int]()

    async def main() -> None:
        run = start()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        assert not run.done
        await run.stop()

    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        asyncio.run(main())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]
