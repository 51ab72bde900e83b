"""How much memory the model may take, and what takes it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from searchr1_async.local.transformer import Shape

logger = logging.getLogger(__name__)

_SHARE = 4
"""A service may take one part in this many of the machine's memory."""
_PROCESS = 500 << 20
"""The process without a model: Python, torch, transformers and their buffers."""
_MOST_ROWS = {"cpu": 512}
"""Tokens of a training micro-batch: on a CPU more are no faster, only larger."""
_MOST_ROWS_ELSEWHERE = 4096
_LEAST_ROWS = 64
_MOST_ENDED = 512 << 20
"""Bytes for sequences that have ended. Only a conversation that goes on needs them, so more would seldom be read again."""
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
    shape: Shape, parameters: int, device: torch.device, dtype: torch.dtype, *, packs: bool, limit: int | None
) -> MemoryPlan:
    """Divides ``limit`` bytes; None: a quarter of the machine's memory, or 90 % of the GPU's that is free.

    The weights, a micro-batch of 64 tokens and one sequence of the model's whole context are always allowed.
    """
    limit = limit if limit is not None else _default_limit(device)
    weights = parameters * dtype.itemsize
    packed = weights if packs else 0
    per_token = shape.cache_bytes(dtype)
    per_row = shape.activation_bytes(dtype)
    rest = limit - _PROCESS - weights - packed
    rows = max(_LEAST_ROWS, min(_MOST_ROWS.get(device.type, _MOST_ROWS_ELSEWHERE), int(rest * 0.4) // per_row))
    running = max(rest - rows * per_row, shape.context * per_token)
    return MemoryPlan(limit, weights, packed, rows * per_row, rows, running, min(running, _MOST_ENDED))


def is_short() -> bool:
    """Whether the machine has almost no memory left."""
    memory = psutil.virtual_memory()
    return memory.available < _LOW * memory.total


def _default_limit(device: torch.device) -> int:
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
