"""What the live view costs a run: CPU and event loop of one process, with the view and without.

    python -m benchmarks live_view

A real kernel receives the events of a big run in real time, from a list made beforehand: 512 groups of 8, 45 episodes and four
telemetry events per second, a step every 91 s after 400 earlier ones. The arms take turns within each round: no view, the
widget. This process reads all that the kernel publishes, as a notebook server does.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import queue
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import polars as pl

from benchmarks.shared.processes import ROOT, child_environment
from benchmarks.shared.report import write_result
from searchr1_async.events import Emit, Event, RunStarted, StepFinished
from searchr1_async.watch.live_view import LiveView
from searchr1_async.watch.views import open_view
from tests.watch.builders import Script

ARMS = ("off", "widget")
CLIENT_CPU = 0.9
"""Of a core: what the client takes at this rate without a view (results/throughput.md)."""
STEPS_BEFORE = 400
BEAT = 0.02
"""Seconds between two looks at how late the loop is."""


def script() -> Script:
    return Script(
        steps=STEPS_BEFORE + 20,
        first_step=STEPS_BEFORE,
        groups=512,
        seconds_a_step=91,
        has_troubles=False,
        evaluate_every=1000,
    )


def big_run(seconds: float) -> tuple[list[Event], list[tuple[float, Event]]]:
    """What a view knows already, and what comes within ``seconds``, a finished step in its middle."""
    before: list[Event] = []
    coming: list[tuple[float, Event]] = []
    scripted = list(script().events())
    ends = [at for at, event in scripted if isinstance(event, StepFinished)]
    metrics = next(event.metrics for _, event in scripted if isinstance(event, StepFinished))
    begin = ends[0] - seconds / 2
    for at, event in scripted:
        if at < begin and not isinstance(event, StepFinished):
            before.append(event)
            if isinstance(event, RunStarted):
                before += [StepFinished(step, metrics) for step in range(1, STEPS_BEFORE + 1)]
        elif begin <= at < begin + seconds:
            coming.append((at - begin, event))
    return before, coming


class Counted:
    """Counts what a view takes on the event loop's thread, in seconds of its CPU."""

    def __init__(self, view: LiveView) -> None:
        self.view, self._draw = view, view._draw
        self.folding, self.drawing = 0.0, 0.0
        self.redraws, self.longest = 0, 0.0
        self._surface_draw = view._surface.draw
        view._draw, view._surface.draw = self.draw, self.surface_draw  # type: ignore[method-assign]

    def __call__(self, event: Event) -> None:
        began = time.thread_time()
        self.view(event)
        self.folding += time.thread_time() - began

    def draw(self) -> None:
        began = time.thread_time()
        self._draw()
        took = time.thread_time() - began
        self.drawing += took
        self.longest = max(self.longest, took)

    def surface_draw(self, *arguments: Any) -> None:
        self.redraws += 1
        self._surface_draw(*arguments)


async def measure(arm: str, seconds: float) -> None:
    """Runs in the kernel; prints one line of JSON."""
    before, coming = big_run(seconds)
    gc.collect()
    if arm == "off":
        print(json.dumps(await feed(None, coming)))
        return
    view = open_view(title="A big run")
    assert isinstance(view, LiveView)
    begun, cpu_begun = time.monotonic(), all_cpu()
    async with view:
        for event in before:
            view(event)
        while not view._surface._widget.vega:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        first, cpu_first = time.monotonic() - begun, all_cpu() - cpu_begun
        counted = Counted(view)
        measured = await feed(counted, coming)
        measured |= {"folding s": counted.folding, "drawing s": counted.drawing}
        measured |= {"redraws": counted.redraws, "longest redraw ms": 1000 * counted.longest}
        ended, cpu_ended = time.monotonic(), all_cpu()
    measured |= {"first s": first, "first CPU s": cpu_first}
    print(json.dumps(measured | {"end s": time.monotonic() - ended, "end CPU s": all_cpu() - cpu_ended}))


async def feed(emit: Emit | None, coming: list[tuple[float, Event]]) -> dict[str, float]:
    """Tells the events in real time; what that took of this process."""
    lags: list[float] = []
    beats = asyncio.create_task(beat(lags))
    began, cpu = time.monotonic(), time.process_time()
    for at, event in coming:
        if (wait := began + at - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        if emit is not None:
            emit(event)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    beats.cancel()
    lags.sort()
    return {
        "events": len(coming),
        "wall s": wall,
        "CPU s": cpu,
        "lag p50 ms": 1000 * lags[len(lags) // 2],
        "lag p99 ms": 1000 * lags[int(len(lags) * 0.99)],
        "lag max ms": 1000 * lags[-1],
    }


async def beat(lags: list[float]) -> None:
    while True:
        due = time.monotonic() + BEAT
        await asyncio.sleep(BEAT)
        lags.append(time.monotonic() - due)


def all_cpu() -> float:
    """Seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_kernel(rounds: int, seconds: float) -> pl.DataFrame:
    """One row for each arm of each round."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(env=child_environment(), cwd=str(ROOT))
    rows: list[dict[str, Any]] = []
    try:
        run_cell(client, "from benchmarks.live_view.run import measure")
        for number in range(rounds):
            for arm in ARMS:
                printed, published = run_cell(client, f"await measure({arm!r}, {seconds})", seconds + 120)
                rows.append({"round": number, "view": arm, **json.loads(printed), "published kB": published / 1000})
                rows[-1]["load"] = os.getloadavg()[0]
                print(rows[-1], flush=True)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return pl.DataFrame(rows)


def run_cell(client: Any, code: str, timeout: float = 120) -> tuple[str, int]:
    """What the cell printed, and how many bytes were published while it ran."""
    sent = client.execute(code)
    printed, size, deadline = "", 0, time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            message = client.get_iopub_msg(timeout=5)
        except queue.Empty:
            continue
        kind, content = message["msg_type"], message["content"]
        size += len(json.dumps(content)) + sum(len(buffer) for buffer in message.get("buffers") or ())
        if kind == "stream" and content["name"] == "stdout":
            printed += content["text"]
        elif kind == "error":
            raise RuntimeError("\n".join(content["traceback"]))
        elif (
            kind == "status" and content["execution_state"] == "idle" and message["parent_header"].get("msg_id") == sent
        ):
            return printed, size
    raise TimeoutError(f"{code} took over {timeout} s")


def table(rows: pl.DataFrame) -> tuple[str, dict[str, float]]:
    """Medians over the rounds; and the CPU that each view takes, as a share of the client's."""
    lines = [
        "| view | process, CPU ms a second | more than without | share of the client | view alone: folding, drawing, CPU ms a second | "
        "redraws a second | a redraw, CPU ms: mean, longest | loop lag p50 / p99 / max, ms | kB a second |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shares: dict[str, float] = {}
    base = 0.0
    for arm in ARMS:
        own = [row for row in rows.iter_rows(named=True) if row["view"] == arm]

        def mid(of: Callable[[dict[str, Any]], float], own: list[dict[str, Any]] = own) -> float:
            return statistics.median(of(row) for row in own)

        def a_second(name: str, mid: Any = mid) -> float:
            return mid(lambda each: each[name] / each["wall s"])

        cpu = 1000 * a_second("CPU s")
        base = cpu if arm == "off" else base
        lag = " / ".join(
            f"{mid(lambda each, name=name: each[name]):.2f}" for name in ("lag p50 ms", "lag p99 ms", "lag max ms")
        )
        cells = [arm, f"{cpu:.1f}"]
        if arm == "off":
            cells += ["", "", "", "", ""]
        else:
            shares[arm] = (cpu - base) / 1000 / CLIENT_CPU
            folding, drawing, redraws = 1000 * a_second("folding s"), 1000 * a_second("drawing s"), a_second("redraws")
            cells += [f"{cpu - base:.1f}", f"{shares[arm]:.2%}", f"{folding:.1f}, {drawing:.1f}", f"{redraws:.1f}"]
            cells.append(f"{drawing / redraws:.2f}, {mid(lambda row: row['longest redraw ms']):.1f}")
        kilobytes = f"{a_second('published kB'):.1f}"
        lines.append(f"| {' | '.join([*cells, lag, kilobytes])} |")
    return "\n".join(lines), shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    rows = in_kernel(options.rounds, options.seconds)
    figures, shares = table(rows)
    widget = rows.filter(pl.col("view") == "widget")
    once = [
        "Once a run, besides: the widget's charts are prepared in other processes "
        f"({widget['first CPU s'].median():.1f} s of CPU, there after {widget['first s'].median():.1f} s, the first time in a kernel "
        f"{widget['first s'][0]:.1f} s), and the picture of the end is drawn in one "
        f"({widget['end CPU s'].median():.1f} s of CPU; the run's end waits {widget['end s'].median():.1f} s for it)."
    ]
    about = (
        f"Medians of {options.rounds} rounds of {options.seconds:g} s. CPU: of the kernel's process, all its threads, feeding included. "
        f"The client takes {CLIENT_CPU} of a core at this rate, of which the percent are. Published bytes hold the charts and Vega, "
        f"which are sent once. The machine is shared: its load average was {rows['load'].min():.1f} to {rows['load'].max():.1f} meanwhile."
    )
    verdict = f"Asked for: under 2 % of the client's CPU. Observed: {shares['widget']:.2%} with the widget."
    write_result("live_view", "What the live view costs", [verdict, figures, *once, about], rows)
