"""The live view in a real kernel: messages to the notebook."""

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
from searchr1_async.events import RunStarted, StepFinished
from searchr1_async.watch.views import open_view
from searchr1_async.watch.charts import page_charts

async def drawing(function, *arguments):
    picture = b"\\x89PNG" + bytes(14) + b"\\x00\\x00" + bytes(4)
    return ({"mark": "line"}, b"packed vega") if function is page_charts else picture

"""

RUN = """
view._drawing = drawing
async with view:
    view(RunStarted("train", "<b>model</b>", True, "e", total_steps=9))
    view(StepFinished(1, {"env/all/reward/total": 0.5}))
    while not view._surface._widget.vega:
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
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


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def updates(kernel: Kernel, trait: str) -> list[Any]:
    """The values that the widget sent of a trait."""
    data = [message["content"]["data"] for message in kernel.of("comm_msg")]
    return [each["state"][trait] for each in data if each.get("method") == "update" and trait in each["state"]]


def test_widget_from_start_to_picture(kernel: Kernel) -> None:
    kernel.run(PREPARE)
    kernel.run("view = open_view(True, title='Training in <runs>')")
    (shown,) = kernel.of("display_data")
    assert set(shown["content"]["data"]) == {WIDGET, "text/html", "text/plain"}
    assert "&lt;runs&gt;" in shown["content"]["data"]["text/html"], "fallback for viewers without widgets"
    comm = shown["content"]["data"][WIDGET]["model_id"]
    opened = next(message for message in kernel.of("comm_open") if message["content"]["comm_id"] == comm)
    state = opened["content"]["data"]["state"]
    assert len(json.dumps(state)) < 40_000, "Vega is sent later"

    sent = kernel.send(RUN)
    kernel.see(lambda m: m["msg_type"] == "comm_msg" and "Step 1 of 9" in json.dumps(m["content"]))
    kernel.see(lambda m: bool(updates(kernel, "spec")))
    assert updates(kernel, "steps")[-1] == [
        {"step": 1.0, "reward/total": 0.5, "correct": None, "turns_per_episode": None, "valid_calls": None}
    ]
    assert "Training &lt;b&gt;model&lt;/b&gt;" in updates(kernel, "head")[-1]
    kernel.finish(sent)

    last = kernel.of("update_display_data")[-1]["content"]
    assert last["transient"]["display_id"] == shown["content"]["transient"]["display_id"]
    assert set(last["data"]) == {"image/png", "text/plain"}, "no HTML: GitHub would prefer it to the picture"
    assert last["data"]["text/plain"].startswith("Trained <b>model</b>: 1 of 9 steps in ")
    assert comm in [message["content"]["comm_id"] for message in kernel.of("comm_close")]
