"""What can be looked at in a client while it works: where its CPU goes, who makes a loop late, what holds its memory.

Each look slows the client down, so a run has one of them at most, and what a client costs is measured without any.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.shared.monitor import Observed

SAMPLES_PER_SECOND = 100
LONG_CALLBACK = 0.005
"""Seconds; callbacks of an event loop that take less are not kept."""
TRACE_EVERY = 1.0
"""Seconds between two looks at how much is traced."""
GROWTH = 1.1
"""Traced memory is written down again once it has grown by this factor."""

SDK_PARTS = {
    "SDK: send a request": r"_send_asample_request",
    "SDK: fetch a result": r"api_future_impl|session_futures_poller",
    "SDK: train": r"/tinker/[^;]*training",
    "SDK: hand over, retry, count": r"/tinker/",
    "SDK: its HTTP client": r"^$|^BaseEventLoop.call_soon_threadsafe|/(pyqwest|httpx)/",
}
"""Parts and the pattern of their frames: the first that any frame of a stack matches. They come before ours, which wait for the SDK.
The threads of the HTTP client are native ones: they have no frame of Python, or only the one in which they wake an event loop."""
OUR_PARTS = {
    "ours: train": r"searchr1_async/training/",
    "ours: render and read": r"searchr1_async/episodes/(rendering|formats|prompts)",
    "ours: play and score": r"searchr1_async/episodes/(play|rewards|types)",
    "ours: search": r"searchr1_async/search/|/(chromadb|aiohttp|google)/",
    "ours: gate, engine": r"searchr1_async/rollout/",
    "ours: records and events": r"searchr1_async/(records|runs|events|episodes/table|boundary|watch)",
}
"""Then the part of the innermost frame that matches one."""
OTHER_PARTS = {
    "event loop itself": r"asyncio/|selectors|anyio/",
    "numpy, polars, torch": r"/(numpy|polars|torch)/",
    "this benchmark's own watch": r"benchmarks/shared/monitor",
}
"""Then the first of these that any frame matches."""
OTHER = "other"


def part_of(stack: str) -> str:
    """The part to which a stack belongs, outermost frame first, joined by `;`."""
    innermost_first = stack.split(";")[::-1]
    return _first(SDK_PARTS, [stack]) or _first(OUR_PARTS, innermost_first) or _first(OTHER_PARTS, [stack]) or OTHER


def _first(parts: Mapping[str, str], frames: Sequence[str]) -> str | None:
    """The part of the first frame that has one."""
    found = (name for frame in frames for name, pattern in parts.items() if re.search(pattern, frame))
    return next(found, None)


@dataclass(frozen=True)
class Seen:
    """One line of what was seen."""

    part: str
    value: float
    """Samples of the profiler, seconds of lateness, or bytes."""
    count: int = 0
    """Callbacks."""
    longest: float = 0.0
    """Seconds of the longest callback."""


@contextmanager
def looking(look: str | None, path: Path, observed: Observed) -> Iterator[None]:
    """Looks at this process while the block runs, and writes what was :class:`Seen` as JSON: ``cpu``, ``late``, ``memory`` or
    nothing."""
    seen: list[Seen] = []
    with {None: nullcontext, "cpu": _cpu, "late": partial(_late, observed), "memory": _memory}[look](seen):
        yield
    path.write_text(json.dumps([asdict(each) for each in seen]))


# --- CPU ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _cpu(seen: list[Seen]) -> Iterator[None]:
    """Samples of all threads that are on a core, by part. Needs ``py-spy``."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "stacks"
        command = ["py-spy", "record", "--pid", str(os.getpid()), "--format", "raw", "--output", str(raw)]
        command += ["--full-filenames", "--nonblocking", "--rate", str(SAMPLES_PER_SECOND), "--duration", "36000"]
        spy = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            spy.send_signal(signal.SIGINT)
            spy.wait(60)
        counts: Counter[str] = Counter()
        for line in raw.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            counts[part_of(stack)] += int(count)
    seen += [Seen(part, count) for part, count in counts.most_common()]


# --- lateness -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Callback:
    """A long callback of an event loop of the process."""

    name: str
    began: float
    ended: float


@contextmanager
def _late(observed: Observed, seen: list[Seen]) -> Iterator[None]:
    """Times the callbacks of every event loop of the process."""
    callbacks: list[_Callback] = []
    run = asyncio.Handle._run

    def timed(self: Any) -> None:
        began, name = time.monotonic(), _callback_name(self)
        run(self)
        ended = time.monotonic()
        if ended - began > LONG_CALLBACK:
            callbacks.append(_Callback(name, began, ended))

    def collected(phase: str, about: Mapping[str, int]) -> None:
        """Collections stop every thread, whoever set them off."""
        nonlocal began_collecting
        if phase == "start":
            began_collecting = time.monotonic()
        elif time.monotonic() - began_collecting > LONG_CALLBACK:
            name = f"collecting garbage of generation {about['generation']}"
            callbacks.append(_Callback(name, began_collecting, time.monotonic()))

    began_collecting = 0.0
    asyncio.Handle._run = timed
    gc.callbacks.append(collected)
    try:
        yield
    finally:
        asyncio.Handle._run = run
        gc.callbacks.remove(collected)
    seen += causes(observed.lags, callbacks)


def _callback_name(handle: Any) -> str:
    callback = handle._callback
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        # anyio names its tasks by their functions; the others have numbers.
        coroutine = getattr(owner.get_coro(), "__qualname__", "?")
        name = coroutine if owner.get_name().startswith("Task-") else owner.get_name()
    else:
        name = getattr(callback, "__qualname__", type(callback).__qualname__)
    return f"{'ours' if threading.current_thread() is threading.main_thread() else 'SDK'}: {name}"


def causes(lags: Sequence[tuple[float, float, float]], callbacks: Sequence[_Callback]) -> list[Seen]:
    """Seconds of lateness by the callback that ran meanwhile in any thread; those with none have the name :data:`OTHER`."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    longest: defaultdict[str, float] = defaultdict(float)
    for now, late, _ in lags:
        spans = []
        for callback in callbacks:
            start, end = max(callback.began, now - late), min(callback.ended, now)
            if end > start:
                seconds[callback.name].append(end - start)
                longest[callback.name] = max(longest[callback.name], callback.ended - callback.began)
                spans.append((start, end))
        seconds[OTHER].append(late - _covered(spans))
    ranked = sorted(seconds.items(), key=lambda each: -sum(each[1]))
    return [Seen(name, sum(each), len(each), longest[name]) for name, each in ranked]


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


# --- memory -------------------------------------------------------------------------------------------------------------------


@contextmanager
def _memory(seen: list[Seen]) -> Iterator[None]:
    """Bytes of the Python objects that came while the block ran, when they were most, by the module that made them."""
    tracemalloc.start(1)
    most = 0
    stop = threading.Event()
    sizes: Counter[str] = Counter()

    def watch() -> None:
        nonlocal most
        while not stop.wait(TRACE_EVERY):
            traced, _ = tracemalloc.get_traced_memory()
            if traced < GROWTH * most:
                continue
            most = traced
            sizes.clear()
            for statistic in tracemalloc.take_snapshot().statistics("filename"):
                sizes[_module(statistic.traceback[0].filename)] += statistic.size

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        tracemalloc.stop()
    seen += [Seen(module, size) for module, size in sizes.most_common()]


def _module(filename: str) -> str:
    """The package of a file, ours by folder."""
    parts = Path(filename).parts
    if "searchr1_async" in parts:
        place = parts.index("searchr1_async")
        return "/".join(parts[place : place + 3])
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    return "Python's library" if f"python{sys.version_info.major}" in filename else Path(filename).name
