"""What the machine has for the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.local import machine
from searchr1_async.local.machine import CoreWatch, plan, threads_for
from searchr1_async.local.transformer import Shape

SMOLLM2 = Shape(layers=30, heads=9, kv_heads=3, head_size=64, hidden=576, vocabulary=49_152, context=8192, middle=1536)
PARAMETERS = 134_515_008
CPU = torch.device("cpu")
GB = 1 << 30


@given(st.integers(1 * GB, 64 * GB), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_the_parts_of_a_plan_fit_in_the_limit(limit: int, dtype: torch.dtype, packs: bool) -> None:
    memory = plan(SMOLLM2, PARAMETERS, CPU, dtype, packs=packs, limit=limit)

    assert memory.weights == PARAMETERS * dtype.itemsize
    assert 64 <= memory.rows <= 1024
    assert memory.ended <= memory.running
    assert memory.running >= SMOLLM2.context * SMOLLM2.cache_bytes(dtype), (
        "one sequence of the whole context always runs"
    )
    least = machine._PROCESS + memory.weights + memory.packed + 64 * SMOLLM2.activation_bytes(dtype)
    least += SMOLLM2.context * SMOLLM2.cache_bytes(dtype)
    total = machine._PROCESS + memory.weights + memory.packed + memory.activations + memory.running
    # What is always allowed may exceed the limit; what a plan adds to it does not.
    assert total <= max(limit, least + memory.activations)


def test_a_plan_lists_what_takes_the_memory() -> None:
    text = str(plan(SMOLLM2, PARAMETERS, CPU, torch.float32, packs=True, limit=6 * GB))
    for part in (
        "6,144 MB",
        "weights 513 MB",
        "packed copy for sampling 513 MB",
        "activations of 1024 tokens",
        "keys and values",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("most", "cores", "others", "threads"),
    [(2, 2, 0.0, 2), (2, 2, 0.4, 2), (2, 2, 0.6, 1), (2, 2, 2.0, 1), (8, 8, 3.2, 5), (4, 16, 3.0, 4), (1, 8, 0.0, 1)],
)
def test_threads_leave_the_cores_that_others_use(most: int, cores: int, others: float, threads: int) -> None:
    assert threads_for(most, cores, others) == threads


class Counters:
    """The counters of a machine with two cores."""

    def __init__(self) -> None:
        self.now = self.idle = self.user = self.system = 0.0

    def cpu_times(self) -> Counters:
        return self


class Sizes:
    """In place of a process of psutil; its memory is what a test says."""

    rss = 0

    def memory_info(self) -> Sizes:
        return self


def test_other_processes_are_what_is_neither_idle_nor_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    system, own = Counters(), Counters()
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: system)
    monkeypatch.setattr(machine.psutil, "Process", lambda: own)
    monkeypatch.setattr(machine.time, "monotonic", lambda: system.now)
    watch = CoreWatch()

    system.now, system.idle, own.user = 10.0, 5.0, 8.0
    assert watch.others() == pytest.approx(0.7)
    system.now, system.idle, own.user, own.system = 20.0, 5.0, 20.0, 8.0
    assert watch.others() == 0.0
    assert watch.others() == 0.0, "no time has passed"


def test_the_heap_is_trimmed_beyond_the_limit_and_only_if_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, trims = Sizes(), []
    monkeypatch.setattr(machine.psutil, "Process", lambda: sizes)
    monkeypatch.setattr(machine, "trim_heap", lambda: trims.append(sizes.rss))
    heap, MB = machine.HeapWatch(1000 << 20), 1 << 20

    for sizes.rss in (900 * MB, 1001 * MB, 1050 * MB, 1066 * MB, 1100 * MB):
        heap.look()

    assert trims == [1001 * MB, 1066 * MB]
