"""The figures of one model on the device: agreement, speeds and memory in each precision, and the demo job.

A part ends at its first figure that fails, which becomes a row with the reason: a model that does not fit is a result.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import tinker
from numpy.typing import NDArray

from benchmarks.gpu.device import GIB, peak_memory
from benchmarks.shared.service_load import Load, agreement, prefilled_per_second, sampled_per_second, scores
from searchr1_async.cli.atlas import CONFIG, HELD_OUT, run_atlas
from searchr1_async.config import LocalOptions, WarmUp
from searchr1_async.evaluation import comparison_table
from searchr1_async.local import local_service
from searchr1_async.local.model_files import published_name
from searchr1_async.search.search import Search

Row = dict[str, Any]
PRECISIONS = ("float32", "bfloat16")
DEMO = "demo"
AGREEMENT = "log p of sampler and trainer, largest difference"
ACROSS = "log p on the device and on a CPU, largest difference"
TRAINED = "trained tokens/s (forward and backward)"
PREFILLED = "prefill tokens/s"
PEAK = "peak memory, GiB"
LOADED = "loading the model"
NO_FIT = "does not fit in memory"
_START_SECONDS, _PART_SECONDS = 900.0, 3600.0
_COMPARED = 8
"""Sequences that are scored on both devices."""
_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
    "exit code -9",
)
"""Of messages: CUDA's, those of the allocators and of cuBLAS, and of a process that the system killed."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the benchmark.

    Args:
        load: of agreement, sampling and training.
        at_once: numbers of requests in flight.
        prefill: requests at once and prompt tokens of each.
        rounds: per speed, of which the best counts.
        held_out: questions of the demo job's evaluations.
        demo: settings of the demo job that differ from those of `make run`.
    """

    load: Load
    at_once: tuple[int, ...]
    prefill: tuple[int, int]
    rounds: int
    held_out: int = HELD_OUT
    demo: Mapping[str, Any] = field(default_factory=dict)


WHOLE = Plan(Load(new=128, groups=32), at_once=(1, 32, 256, 1024), prefill=(64, 512), rounds=3)
QUICK = Plan(
    Load(prompt=16, new=4, groups=1, group_size=2),
    at_once=(1, 2),
    prefill=(2, 32),
    rounds=1,
    held_out=4,
    demo={
        "warm_up": WarmUp(steps=1, batch_size=4),
        "steps": 1,
        "group_size": 2,
        "groups_per_batch": 2,
        "minibatches": 1,
        "max_turns": 2,
        "time_limit": 60.0,
    },
)


@dataclass(frozen=True)
class Subject:
    """What is measured: a model (a name or a folder) on a device, with the meter of the device's memory."""

    model: str
    device: str
    meter: Callable[[], float]

    @property
    def label(self) -> str:
        """The model's name, of a folder its last part."""
        return published_name(self.model)


@dataclass(frozen=True)
class Scored:
    """Sequences, and their log-probabilities under weights that were saved."""

    sequences: list[list[int]]
    weights: str
    logprobs: NDArray[np.float64]


class Part:
    """The rows of one part (a precision, or the demo job), as far as it came."""

    def __init__(self, model: str, name: str) -> None:
        self.rows: list[Row] = []
        self.text = ""
        self._keys = {"model": model, "part": name}
        self._under_way = LOADED

    def begin(self, figure: str) -> None:
        """Names the figure that an error would be of."""
        self._under_way = figure

    def add(self, figure: str, value: float | None, **more: Any) -> None:
        row = {"figure": figure, "value": value, "low": None, "high": None, "problem": None}
        self.rows.append({**self._keys, **row, **more})

    def fail(self, error: BaseException) -> None:
        """The figure under way has the error instead of a value."""
        traceback.print_exception(error)
        self.add(self._under_way, None, problem=problem_of(error))


def problem_of(error: BaseException) -> str:
    """A short reason; :data:`NO_FIT` for want of memory."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = f"{type(error).__name__}: {error}"
    if any(sign in text.lower() for sign in _MEMORY):
        return NO_FIT
    if isinstance(error, TimeoutError):
        return "took too long"
    return text.splitlines()[0][:200]


@asynccontextmanager
async def recorded(subject: Subject, name: str) -> AsyncIterator[Part]:
    """A part that survives its errors and ends with the peak of memory."""
    part = Part(subject.label, name)
    print(f"{subject.label}: {name} on {subject.device}", file=sys.stderr, flush=True)
    async with peak_memory(subject.meter) as peak:
        try:
            with anyio.fail_after(_PART_SECONDS):
                yield part
        except Exception as error:
            part.fail(error)
    part.add(PEAK, peak.used / GIB)


@asynccontextmanager
async def connected(
    model: str, device: str, dtype: str, folder: Path
) -> AsyncIterator[tuple[tinker.ServiceClient, str]]:
    """A client of the embedded service, and the name that it gives the model."""
    async with local_service(
        model,
        folder=folder,
        device=device,
        dtype=dtype,
        start_timeout=_START_SECONDS,
    ) as service:
        client = tinker.ServiceClient(base_url=service.url, api_key=service.api_key)
        yield client, service.model_name
        await client.close("success")


async def measure_precision(subject: Subject, dtype: str, plan: Plan, folder: Path) -> list[Row]:
    """Agreement, then speeds in the order of the memory that they need; in float32 also against a CPU."""
    scored = None
    async with (
        recorded(subject, dtype) as part,
        connected(subject.model, subject.device, dtype, folder) as (client, name),
    ):
        trainer = await client.create_lora_training_client(name, rank=16, seed=0)
        sequences = await measure_training(part, trainer, plan)
        if dtype == "float32":
            part.begin(ACROSS)
            weights = (await trainer.save_weights_for_sampler("compared")).path
            sampler = await client.create_sampling_client(model_path=weights)
            scored = Scored(sequences, weights, await scores(sampler, sequences))
        await measure_speeds(part, await trainer.save_weights_and_get_sampling_client(), plan)
    if scored is None:
        return part.rows
    return await measure_across(subject, scored, folder) + part.rows


async def measure_training(part: Part, trainer: tinker.TrainingClient, plan: Plan) -> list[list[int]]:
    """Agreement and training speed; returns some of the sequences."""
    part.begin(AGREEMENT)
    agreed = await agreement(trainer, plan.load)
    part.add(AGREEMENT, agreed.largest)
    part.add("log p of sampler and trainer, mean difference", agreed.mean)
    part.add(TRAINED, agreed.trained_per_second)
    return agreed.sequences[:: plan.load.group_size][:_COMPARED]


async def measure_speeds(part: Part, sampler: tinker.SamplingClient, plan: Plan) -> None:
    part.begin(PREFILLED)
    part.add(PREFILLED, await prefilled_per_second(sampler, *plan.prefill, plan.rounds))
    for at_once in plan.at_once:
        figure = f"sampled tokens/s, {at_once:,} at once"
        part.begin(figure)
        part.add(figure, await sampled_per_second(sampler, plan.load, at_once, plan.rounds))


async def measure_across(subject: Subject, scored: Scored, folder: Path) -> list[Row]:
    """The same sequences under the same saved weights, by a service on the CPU that shares the folder."""
    part = Part(subject.label, "float32")
    part.begin(ACROSS)
    try:
        with anyio.fail_after(_PART_SECONDS):
            async with connected(subject.model, "cpu", "float32", folder) as (client, _):
                sampler = await client.create_sampling_client(model_path=scored.weights)
                found = await scores(sampler, scored.sequences)
        part.add(ACROSS, float(np.abs(found - scored.logprobs).max()))
    except Exception as error:
        part.fail(error)
    return part.rows


async def measure_demo(subject: Subject, plan: Plan, folder: Path) -> tuple[list[Row], str]:
    """The demo job of `make run` in the precision that the service chooses: its rows, and its table of evaluations."""
    async with recorded(subject, DEMO) as part:
        async with Search.local("atlas"):  # builds the index, which is not to count
            pass
        part.begin("minutes")
        local = LocalOptions(device=subject.device, start_timeout=_START_SECONDS)
        config = CONFIG.replace(model=subject.model, local=local, **plan.demo)
        began = time.monotonic()
        result, _ = await run_atlas(folder, config, plan.held_out)
        part.add("minutes", (time.monotonic() - began) / 60)
        part.add("optimizer steps", result.steps)
        for evaluation in result.evaluations:
            low, high = evaluation.exact_match_interval
            part.add(f"exact match, {evaluation.label}", evaluation.exact_match, low=low, high=high)
        part.text = comparison_table(result.evaluations)
    return part.rows, part.text
