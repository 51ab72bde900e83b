"""The device under measurement: what it is, and how much of its memory is in use."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import torch

from benchmarks.shared.monitor import usage

_LOOK_SECONDS = 0.2
GIB = 1024**3


@dataclass
class Peak:
    """The most memory seen in use, in bytes."""

    used: float = 0.0


def why_no_cuda() -> str | None:
    """Why torch has no CUDA device here; None if it has one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with it."
    return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but finds no device: does `nvidia-smi` list one?"


def description(device: str) -> list[str]:
    """Device, driver and CUDA version as Markdown lines."""
    if not is_cuda(device):
        return [f"- device: {device}"]
    properties = torch.cuda.get_device_properties(device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return [
        f"- device: {properties.name}, {properties.total_memory / GIB:.0f} GiB, {capability}",
        f"- driver: {_driver()}; CUDA {torch.version.cuda}, of torch {torch.__version__}",
    ]


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def memory_meter(device: str) -> Callable[[], float]:
    """Bytes in use now beyond those of this moment: of the GPU by all processes, else of this process and its children."""

    def used() -> float:
        if not is_cuda(device):
            return usage()[1]
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    before = used()
    return lambda: used() - before


@asynccontextmanager
async def peak_memory(meter: Callable[[], float]) -> AsyncIterator[Peak]:
    """The peak of a meter's readings until the block ends. torch keeps what it allocated, so that no peak is short."""
    peak = Peak()

    async def watch() -> None:
        while True:
            peak.used = max(peak.used, meter())
            await anyio.sleep(_LOOK_SECONDS)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        yield peak
        tasks.cancel_scope.cancel()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no `nvidia-smi`)"
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else "unknown"
