"""The live view in a real kernel: messages to the notebook, and buttons while a cell awaits the run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")
from jupyter_client.manager import start_new_kernel

import searchr1_async

# A kernel's sockets are closed by its garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = str(Path(searchr1_async.__file__).parent.parent)
WIDGET = "application/vnd.jupyter.widget-view+json"

PREPARE = """
import asyncio, sys
from searchr1_async.events import RunPaused, RunStarted, StepFinished
from searchr1_async.watch.dashboard import open_view
from searchr1_async.watch import view as live
from searchr1_async.watch.drawing import Charts

class Drawer:
    async def charts(self, window, curves, *, from_zero):
        return Charts({"reward": {"mark": "line"}}, {}, b"packed vega")
    async def picture(self, task):
        return b"\\x89PNG" + bytes(14) + b"\\x00\\x00" + bytes(4)

live._DRAWER = Drawer()

class Controls:
    async def pause(self):
        view(RunPaused())
        pressed.set()
    async def resume(self): ...
    def request_stop(self): ...

pressed = asyncio.Event()
"""

RUN = """
async with view:
    view(RunStarted("train", "<b>model</b>", True, "e", total_steps=9))
    view(StepFinished(1, {"env/all/reward/total": 0.5}))
    await asyncio.wait_for(pressed.wait(), 30)
"""


class Kernel:
    """A kernel and its published messages."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(env={**os.environ, "PYTHONPATH": ROOT}, cwd=ROOT)
        self.published: list[dict[str, Any]] = []

    def send(self, code: str) -> str:
        return self.client.execute(code)

    def see(self, until: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """Reads up to the first message that satisfies ``until``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            message = self.client.get_iopub_msg(timeout=max(0.1, end - time.monotonic()))
            self.published.append(message)
            if message["msg_type"] == "error":
                raise AssertionError("\n".join(message["content"]["traceback"]))
            if until(message):
                return message
        raise AssertionError("not seen in time")

    def run(self, code: str) -> None:
        self.finish(self.send(code))

    def finish(self, sent: str) -> None:
        self.see(lambda m: m["content"].get("execution_state") == "idle" and m["parent_header"].get("msg_id") == sent)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.published if message["msg_type"] == kind]

    def control(self, kind: str) -> dict[str, Any]:
        client = self.client
        client.control_channel.send(client.session.msg(kind))
        return client.get_control_msg(timeout=30)["content"]

    def press(self, comm: str, button: str, subshell: str) -> None:
        content = {"comm_id": comm, "data": {"method": "custom", "content": {"press": button}}}
        message = self.client.session.msg("comm_msg", content)
        message["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(message)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def sent_by_widget(kernel: Kernel, kind: str) -> list[dict[str, Any]]:
    """Custom widget messages of one kind."""
    data = [message["content"]["data"] for message in kernel.of("comm_msg")]
    return [each["content"] for each in data if each.get("method") == "custom" and each["content"].get("kind") == kind]


def test_widget_from_start_to_picture(kernel: Kernel) -> None:
    kernel.run(PREPARE)
    kernel.run("view = open_view(True, title='Training in <runs>', controls=Controls())")
    (shown,) = kernel.of("display_data")
    assert set(shown["content"]["data"]) == {WIDGET, "text/html", "text/plain"}
    assert "&lt;runs&gt;" in shown["content"]["data"]["text/html"], "fallback for viewers without widgets"
    comm = shown["content"]["data"][WIDGET]["model_id"]
    opened = next(message for message in kernel.of("comm_open") if message["content"]["comm_id"] == comm)
    state = opened["content"]["data"]["state"]
    assert "innerHTML" not in state["_esm"]
    assert len(json.dumps(state)) < 40_000, "Vega is sent later and not saved with the notebook"

    sent = kernel.send(RUN)
    kernel.see(lambda m: m["msg_type"] == "comm_msg" and "Step 1 of 9" in json.dumps(m["content"]))
    kernel.see(lambda m: bool(sent_by_widget(kernel, "charts")))
    (rows,) = sent_by_widget(kernel, "rows")
    assert rows["rows"] == [
        {"step": 1.0, "reward/total": 0.5, "correct": None, "turns_per_episode": None, "valid_calls": None}
    ]
    subshell = kernel.control("create_subshell_request")
    if "subshell_id" not in subshell:
        kernel.manager.interrupt_kernel()
        pytest.skip("this kernel answers no button while a cell waits")
    # The cell awaits the run; the button's message arrives in another thread.
    kernel.press(comm, "pause", subshell["subshell_id"])
    kernel.finish(sent)

    last = kernel.of("update_display_data")[-1]["content"]
    assert last["transient"]["display_id"] == shown["content"]["transient"]["display_id"]
    assert set(last["data"]) == {"image/png", "text/plain"}, "no HTML: GitHub would prefer it to the picture"
    assert last["data"]["text/plain"].startswith("Trained <b>model</b>: 1 of 9 steps in ")
    assert comm in [message["content"]["comm_id"] for message in kernel.of("comm_close")]


def test_rich_text_without_anywidget(kernel: Kernel) -> None:
    kernel.run(
        "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'anywidget' else find(n)"
    )
    kernel.run(PREPARE)
    kernel.run("view = open_view(True, title='a run'); pressed.set()")
    kernel.run(RUN)
    assert len(kernel.of("display_data")) == 1, "one output, updated"
    *_, before, last = [message["content"] for message in kernel.of("update_display_data")]
    assert "&lt;b&gt;model&lt;/b&gt;" in before["data"]["text/html"]
    assert set(last["data"]) == {"image/png", "text/plain"}
