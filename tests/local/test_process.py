"""The service as a child process, and ``python -m searchr1_async.local``: startup, startup errors, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import tinker
from tinker import types

from searchr1_async.boundary.sdk import probe
from searchr1_async.errors import (
    ConfigurationError,
    ModelError,
    PortInUseError,
    ServiceError,
    ServiceStartError,
    ServiceUnavailableError,
)
from searchr1_async.local import Scripted, local_service
from tests.local.serving import free_listener, raw, read_log, sample_fields, sdk, until

pytestmark = pytest.mark.anyio

SCRIPT = Scripted("tests.local.test_process:count_up", latency={"floor": 0.01})
PROMPT = types.ModelInput.from_ints([1, 2])


def count_up(prompt: list[int], chance: random.Random) -> list[int]:
    return [prompt[-1] + 1, prompt[-1] + 2]


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


async def gone(pid: int) -> bool:
    return not is_running(pid)


async def test_it_serves_and_leaves_no_process(tmp_path: Path) -> None:
    log = tmp_path / "latencies"
    script = Scripted(SCRIPT.reply, latency=SCRIPT.latency, latency_log=str(log))
    async with local_service("counter", folder=tmp_path, scripted=script, threads=1) as service:
        await probe(service.url)
        # Ctrl-C reaches the whole process group and a scheduler's SIGTERM every process of a job, but the parent decides
        # when this child exits.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(service.pid, number)
        await probe(service.url)
        assert is_running(service.pid)
        assert service.model_name == "counter"
        assert service.api_key not in repr(service)
        command = await anyio.Path(f"/proc/{service.pid}/cmdline").read_text()
        assert service.api_key not in command
        async with sdk(service.url, service.api_key) as client:
            sampler = await client.create_sampling_client(base_model="counter")
            response = await sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=5))
            assert list(response.sequences[0].tokens) == [3, 4]
    assert not is_running(service.pid)
    with pytest.raises(ServiceUnavailableError, match=re.escape(service.url)):
        await probe(service.url)
    assert [(request.kind, request.seconds) for request in read_log(log)] == [("sample", 0.01)]
    assert service.api_key not in await anyio.Path(tmp_path / "service.log").read_text()


async def test_cancelling_the_parent_ends_it(tmp_path: Path) -> None:
    pids: list[int] = []
    with anyio.CancelScope() as scope:
        async with local_service("counter", folder=tmp_path, scripted=SCRIPT) as service:
            pids.append(service.pid)
            scope.cancel()
            await anyio.sleep_forever()
    assert pids
    assert not is_running(pids[0])


async def test_a_child_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("searchr1_async.local.process._STOP_SECONDS", 0.2)
    async with local_service("counter", folder=tmp_path, scripted=SCRIPT) as service:
        os.kill(service.pid, signal.SIGSTOP)
    assert not is_running(service.pid)


PARENT = """
import asyncio, os, sys
from pathlib import Path
from searchr1_async.local import Scripted, local_service

async def main():
    script = Scripted("tests.local.test_process:count_up")
    async with local_service("counter", folder=Path(sys.argv[1]), scripted=script) as service:
        print(service.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    async with await anyio.open_process(command, env=environment, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        with anyio.fail_after(60):
            pid = int(await parent.stdout.receive())
        assert is_running(pid)
        parent.kill()
        await parent.wait()
        await until(lambda: gone(pid))


async def test_a_service_that_is_killed_ends_the_block_that_uses_it(tmp_path: Path) -> None:
    """The SDK would retry a dead service forever; cancelling the block ends its wait."""
    slow = Scripted(SCRIPT.reply, latency={"floor": 3600.0})
    used: list[tinker.ServiceClient] = []

    async def use() -> None:
        async with local_service("counter", folder=tmp_path, scripted=slow) as service:
            client = await anyio.to_thread.run_sync(
                lambda: tinker.ServiceClient(base_url=service.url, api_key=service.api_key)
            )
            used.append(client)
            sampler = await client.create_sampling_client(base_model="counter")
            sample = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=5))
            os.kill(service.pid, signal.SIGKILL)
            with anyio.fail_after(30):
                await sample

    with pytest.raises(ExceptionGroup) as caught:
        await use()
    assert caught.group_contains(ServiceError, match="exited unexpectedly")
    # Not client.close(), which would retry for minutes.
    await used[0].holder.run_coroutine_threadsafe(used[0].holder.aclose())


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with free_listener() as other:
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUseError, match=str(port)):
            async with local_service("counter", folder=tmp_path, port=port, scripted=SCRIPT):
                pass


async def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="threads"):
        async with local_service("counter", folder=tmp_path, threads=0, scripted=SCRIPT):
            pass
    with pytest.raises(ConfigurationError, match=r"no\.such:function"):
        async with local_service("counter", folder=tmp_path, scripted=Scripted("no.such:function")):
            pass


async def test_an_unknown_model(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(ModelError, match="no/such-model"):
        async with local_service("no/such-model", folder=tmp_path):
            pass


async def test_a_service_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServiceStartError, match=r"unexpected keyword(.|\n)*Traceback"):
        async with local_service("counter", folder=tmp_path, scripted=SCRIPT, options={"unknown": 1}):
            pass


async def test_a_service_that_does_not_start_in_time(tmp_path: Path) -> None:
    with pytest.raises(ServiceStartError, match=r"did not start within 0\.01 s"):
        async with local_service("counter", folder=tmp_path, scripted=SCRIPT, start_timeout=0.01):
            pass


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    await anyio.Path(tmp_path / "file").write_text("in the way")
    with pytest.raises(ServiceStartError, match="cannot write the service's log"):
        async with local_service("counter", folder=tmp_path / "file" / "below", scripted=SCRIPT):
            pass


async def test_probing_something_that_is_not_a_service() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ServiceUnavailableError, match="not as a Tinker service"):
            await probe(f"http://127.0.0.1:{port}/")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServiceUnavailableError, match=re.escape(url)):
            await probe(url, timeout=0.2)
    with pytest.raises(ServiceUnavailableError):
        await probe("no url at all")


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "searchr1_async.local", "--folder", str(folder), "--scripted", SCRIPT.reply, *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), **more}


@pytest.mark.parametrize("key", [None, "tml-mine"])
async def test_it_prints_usage_and_stops_on_ctrl_c(tmp_path: Path, key: str | None) -> None:
    more = {} if key is None else {"TINKER_API_KEY": key}
    process = await anyio.open_process(
        command(tmp_path, "--model", "counter"), env=environment(**more), stderr=subprocess.DEVNULL
    )
    async with process:
        assert process.stdout is not None
        shown = ""
        with anyio.fail_after(60):
            while "Ctrl-C" not in shown:
                shown += (await process.stdout.receive()).decode()
        url = re.search(r"TINKER_BASE_URL=(\S+)", shown)
        assert url is not None
        assert "Serving counter" in shown
        if key is None:
            printed = re.search(r"TINKER_API_KEY=(tml-\S+)", shown)
            assert printed is not None
            key = printed[1]
        else:
            assert key not in shown
        await probe(url[1])
        async with raw(url[1], key) as client:
            sampler = await client.sampler(await client.session(), base_model="counter")
            assert isinstance(await client.result(await client.ok("asample", sample_fields(sampler))), bytes)
        process.send_signal(signal.SIGINT)
        with anyio.fail_after(20):
            assert await process.wait() == 0


async def test_a_taken_port_is_reported_in_one_line(tmp_path: Path) -> None:
    with free_listener() as other:
        other.listen()
        port = str(other.getsockname()[1])
        done = await anyio.run_process(command(tmp_path, "--port", port), env=environment(), check=False)
    assert done.returncode == 2
    assert port in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
