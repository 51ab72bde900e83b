"""``python -m searchr1_async.local``, the standalone service."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from searchr1_async.boundary.network import probe
from tests.local.serving import free_listener, raw, sample_fields

pytestmark = pytest.mark.anyio

SCRIPT = "tests.local.test_process:count_up"


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "searchr1_async.local", "--folder", str(folder), "--scripted", SCRIPT, *more]


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
