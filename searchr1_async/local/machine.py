"""What the machine has for the model: how much memory it may take, and how many cores others leave to it."""

from __future__ import annotations

import ctypes
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from searchr1_async.local.transformer import Shape

_SHARE = 4
"""A service may take one part in this many of the machine's memory."""
_PROCESS = 800 << 20
"""The process without a model: Python, torch, transformers and their buffers, and the logits of a few hundred tokens."""
_MOST_ROWS_CPU, _MOST_ROWS_GPU = 1024, 4096
"""Tokens of a training micro-batch: on a CPU more are no faster, only larger."""
_ROWS_SHARE = 0.55
"""Of the memory that is left, for the micro-batch: with few tokens groups are split, and their prompts computed several times."""
_LEAST_ROWS = 64
_MOST_ENDED = 256 << 20
"""Bytes for sequences that have ended. Only a conversation that goes on needs them, so more would seldom be read again."""
_GROWTH = 64 << 20
"""Bytes that are worth trimming the heap for: pages that are taken again cost time."""
_LOW = 0.04
"""Memory is short when less than this share of the machine's is available."""
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes, from :func:`plan`."""

    limit: int
    weights: int
    packed: int
    """The copy that sampling multiplies by."""
    activations: int
    """Of a training micro-batch of :attr:`rows` tokens."""
    rows: int
    running: int
    """Keys and values of running sequences; further ones wait."""
    ended: int
    """Keys and values at which sequences that have ended are dropped."""

    def __str__(self) -> str:
        parts = {
            "process": _PROCESS,
            "weights": self.weights,
            "packed copy for sampling": self.packed,
            f"activations of {self.rows} tokens": self.activations,
            "keys and values": self.running,
        }
        listed = ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in parts.items())
        return f"{self.limit / 2**20:,.0f} MB: {listed} (ended sequences at most {self.ended / 2**20:,.0f} MB)"


def plan(
    shape: Shape, parameters: int, device: torch.device, dtype: torch.dtype, *, packs: bool, limit: int
) -> MemoryPlan:
    """Divides ``limit`` bytes. Adapters and their snapshots are not counted.

    The weights, a micro-batch of 64 tokens and one sequence of the model's whole context are always allowed, also beyond the limit.
    """
    weights = parameters * dtype.itemsize
    packed = weights if packs else 0
    per_token = shape.cache_bytes(dtype)
    per_row = shape.activation_bytes(dtype)
    rest = limit - _PROCESS - weights - packed
    most_rows = _MOST_ROWS_CPU if device.type == "cpu" else _MOST_ROWS_GPU
    rows = max(_LEAST_ROWS, min(most_rows, int(rest * _ROWS_SHARE) // per_row))
    running = max(rest - rows * per_row, shape.context * per_token)
    return MemoryPlan(limit, weights, packed, rows * per_row, rows, running, min(running, _MOST_ENDED))


def memory_is_short() -> bool:
    """Whether the machine has almost no memory left."""
    memory = psutil.virtual_memory()
    return memory.available < _LOW * memory.total


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library can: glibc keeps a gigabyte and more after a training call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class HeapWatch:
    """Trims the heap whenever the process takes more than ``limit`` bytes, and so much more than after the last time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._process = psutil.Process()
        self._after = 0

    def look(self) -> None:
        if self._bytes() > max(self._limit, self._after + _GROWTH):
            trim_heap()
            self._after = self._bytes()

    def _bytes(self) -> int:
        return self._process.memory_info().rss


def threads_for(most: int, cores: float, others: float) -> int:
    """Compute threads where other processes keep ``others`` of the cores busy: between 1 and ``most``.

    Compute threads wait for each other a hundred times a token. One that has to share its core makes all wait: two threads beside
    another busy process are slower than one.
    """
    return max(1, min(most, math.floor(cores - others + 0.5)))


class CoreWatch:
    """How many cores other processes keep busy, between one call of :meth:`others` and the next."""

    def __init__(self) -> None:
        self.cores = os.cpu_count() or 1
        self._process = psutil.Process()
        self._before = self._times()

    def others(self) -> float:
        """Mean number of cores since the last call, or since the start."""
        before, self._before = self._before, self._times()
        seconds, idle, own = (now - then for now, then in zip(self._before, before, strict=True))
        # The counters advance in steps of 10 ms or so.
        return 0.0 if seconds < 0.1 else max(0.0, self.cores - (idle + own) / seconds)

    def _times(self) -> tuple[float, float, float]:
        """Seconds: of the clock, idle of all cores, and of this process."""
        system, own = psutil.cpu_times(), self._process.cpu_times()
        return time.monotonic(), system.idle + getattr(system, "iowait", 0.0), own.user + own.system


def default_limit(device: torch.device) -> int:
    """A quarter of the machine's memory, or 90 % of the GPU's that is free, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.9)
    return min([psutil.virtual_memory().total, *_container_limits()]) // _SHARE


def _container_limits() -> list[int]:
    limits = []
    for path in _LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return limits
