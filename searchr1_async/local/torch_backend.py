"""A real language model behind the embedded Tinker service: sampling and training on one thread."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch

from searchr1_async.local.backend import (
    AdamParams,
    Adapter,
    Datum,
    ForwardBackwardResult,
    InflightClient,
    LoraConfig,
    SampleRequest,
    SampleResult,
    Snapshot,
    State,
    UserFault,
)
from searchr1_async.local.lora import LoraAdapter, LoraLayout, LoraWeights
from searchr1_async.local.machine import CoreWatch, HeapWatch, memory_is_short, threads_for, trim_heap
from searchr1_async.local.model_files import resolve_model
from searchr1_async.local.runner import Owner
from searchr1_async.local.sampler import Sampler, settle
from searchr1_async.local.torch_models import Engine, choose_device, choose_dtype, load_engine
from searchr1_async.local.trainer import adam_step, forward_backward

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""How often to check what other processes leave of the machine, and to give unused memory back."""
SAMPLING_QUANTUM_SECONDS = 1.0
"""How long sampling may run while a training micro-batch waits."""
_BATCH_CPU, _BATCH_GPU = 64, 1024
"""Sequences sampled at once: on a CPU more are no faster, only larger. So many on a GPU need a cache with a limit."""


class TorchBackend:
    """:class:`~searchr1_async.local.backend.Backend` over a Hugging Face model and LoRA adapters.

    All compute runs on one thread. Sampling has priority; a waiting adapter call gets one micro-batch after at most
    :data:`SAMPLING_QUANTUM_SECONDS` of sampling. Adapter calls run in submission order.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], tuple[Path, Engine]],
        *,
        threads: int | None = None,
        max_batch: int | None = None,
    ) -> None:
        """Use :meth:`load` instead."""
        self.model_name = name
        self._threads = threads
        self._arrived = threading.Condition()
        self._samples: deque[tuple[Owner, SampleRequest, Future[SampleResult]]] = deque()
        self._work: deque[tuple[Future[Any], Generator[None, None, Any]]] = deque()
        """Calls on adapters; each yields wherever sampling may interleave."""
        self._closing = False
        self._ready = threading.Event()
        loaded: Future[tuple[Path, Engine]] = Future()
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="torch-backend", daemon=True)
        self._thread.start()
        folder, engine = loaded.result()
        self.tokenizer_path = str(folder)
        self.max_context_length = engine.context
        self._engine = engine
        self._sampler = Sampler(
            engine.runner,
            engine.tokenizer,
            vocabulary=engine.vocabulary,
            context=engine.context,
            end_tokens=engine.end_tokens,
            max_batch=_usual_batch(engine) if max_batch is None else max_batch,
        )
        self._ready.set()
        # A thread inside torch at interpreter exit aborts the process.
        atexit.register(self.close)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        threads: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        memory_bytes: int | None = None,
        max_batch: int | None = None,
        max_rows: int | None = None,
    ) -> TorchBackend:
        """Load a model; takes seconds.

        Args:
            model: a folder, or a name (see :func:`~searchr1_async.local.model_files.resolve_model`).
            threads: compute threads; None is torch's default, one per core.
            dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on a GPU that has it, else float32.
            device: ``cpu``, ``cuda``, ``mps``, or ``auto``: the first accelerator found.
            memory_bytes: what the service may take in all; None: a quarter of the machine's memory, or 90 % of the GPU's.
            max_batch: maximum sequences sampled at once; None: 64, or on a GPU 1,024 as far as their keys and values fit.
            max_rows: maximum distinct tokens per training micro-batch; None: as many as are useful and fit.

        Raises:
            ModelError: the model cannot be found or used.
        """
        target = choose_device(device)
        precision = choose_dtype(dtype, target)

        def load() -> tuple[Path, Engine]:
            folder = resolve_model(model)
            engine = load_engine(folder, target, precision, memory_bytes, max_rows)
            logger.info("Loaded %s in %s on %s", model, precision, target)
            return folder, engine

        return cls(model, load, threads=threads, max_batch=max_batch)

    def create_adapter(self, lora: LoraConfig) -> Future[Adapter]:
        def new() -> LoraAdapter:
            layout = self._layout(lora)
            flat = layout.initial().to(self._engine.device)
            size = flat.nbytes / 2**20
            # With its gradient and two moments.
            logger.info("Memory: rank %d: %.1f MB in training, %.1f MB a snapshot", lora.rank, 4 * size, size)
            return LoraAdapter(layout, flat)

        return self._call(new)

    def snapshot(self, adapter: Adapter) -> Future[Snapshot]:
        return self._call(_own(adapter).frozen_copy)

    def sample(self, weights: Snapshot | InflightClient | None, request: SampleRequest) -> Future[SampleResult]:
        future: Future[SampleResult] = Future()
        with self._arrived:
            if self._refuses(future):
                return future
            self._samples.append((cast("Owner", weights), request, future))
            self._arrived.notify()
        return future

    def forward_backward(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_fn: str,
        loss_config: Mapping[str, float],
        forward_only: bool,
    ) -> Future[ForwardBackwardResult]:
        trainer = self._engine.trainer
        return self._submit(forward_backward(trainer, _own(adapter), data, loss_fn, loss_config, forward_only))

    def optim_step(self, adapter: Adapter, params: AdamParams) -> Future[Mapping[str, float]]:
        return self._call(lambda: adam_step(_own(adapter), params))

    def export_adapter(self, adapter: Adapter, optimizer: bool) -> Future[State]:
        return self._call(lambda: _own(adapter).export(optimizer))

    def import_adapter(self, lora: LoraConfig, state: State, optimizer: bool) -> Future[Adapter]:
        return self._call(lambda: LoraAdapter.restore(self._layout(lora), state, optimizer, self._engine.device))

    def import_snapshot(self, lora: LoraConfig, state: State) -> Future[Snapshot]:
        def read() -> LoraWeights:
            layout = self._layout(lora)
            return LoraWeights(layout, layout.from_state(state).to(self._engine.device))

        return self._call(read)

    def close(self) -> None:
        with self._arrived:
            self._closing = True
            self._arrived.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _layout(self, lora: LoraConfig) -> LoraLayout:
        return LoraLayout(self._engine.sites, lora)

    def _call(self, function: Callable[[], Any]) -> Future[Any]:
        def steps() -> Generator[None, None, Any]:
            return function()
            yield  # unreachable; makes this a generator

        return self._submit(steps())

    def _submit(self, steps: Generator[None, None, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        # Not cancellable: later calls on the adapter depend on it.
        future.set_running_or_notify_cancel()
        with self._arrived:
            if not self._refuses(future):
                self._work.append((future, steps))
                self._arrived.notify()
        return future

    def _refuses(self, future: Future[Any]) -> bool:
        if self._closing:
            future.set_exception(RuntimeError("The model's backend is closed."))
        return self._closing

    def _run(self, load: Callable[[], tuple[Path, Engine]], loaded: Future[tuple[Path, Engine]]) -> None:
        """Loads the model and works. All in one thread: with compute threads of two, OpenMP's go to sleep between operations."""
        most_threads = self._threads or torch.get_num_threads()
        torch.set_num_threads(most_threads)
        try:
            loaded.set_result(load())
        except BaseException as error:
            loaded.set_exception(error)
            return
        self._ready.wait()
        self._work_until_closed(most_threads)

    def _work_until_closed(self, most_threads: int) -> None:
        turns, cores = Turns(SAMPLING_QUANTUM_SECONDS), CoreWatch()
        heap = HeapWatch(self._engine.memory_limit)
        next_look = 0.0
        while self._take_arrivals():
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_SECONDS
                torch.set_num_threads(threads_for(most_threads, cores.cores, cores.others()))
                self._engine.runner.give_back()
                if memory_is_short():
                    logger.warning("The machine is short of memory: dropped what was cached of ended sequences")
                    self._engine.runner.shrink()
            if turns.training_is_due(bool(self._work), self._sampler.busy, time.monotonic()):
                self._train()
                turns.trained(time.monotonic())
            else:
                self._sample()
            heap.look()
        closed = RuntimeError("The model's backend was closed before this call finished.")
        self._sampler.fail_all(closed)
        for _, _, future in self._samples:
            settle(future, error=closed)
        for future, steps in self._work:
            steps.close()
            settle(future, error=closed)

    def _take_arrivals(self) -> bool:
        """Wait for work; False when the backend is closing."""
        if not self._has_work():
            self._engine.runner.give_back()
        with self._arrived:
            while not self._has_work():
                self._arrived.wait()
            if self._closing:
                return False
            arrivals = list(self._samples)
            self._samples.clear()
        for owner, request, future in arrivals:
            self._sampler.submit(owner, request, future)
        return True

    def _has_work(self) -> bool:
        return bool(self._closing or self._work or self._samples or self._sampler.busy)

    def _train(self) -> None:
        future, steps = self._work[0]
        try:
            next(steps)
            return
        except StopIteration as end:
            settle(future, result=end.value)
            if isinstance(end.value, ForwardBackwardResult):
                trim_heap()
        except Exception as error:
            if not isinstance(error, UserFault):
                logger.exception("A call on an adapter failed")
            settle(future, error=error)
        self._work.popleft()

    def _sample(self) -> None:
        try:
            self._sampler.step()
        except Exception as error:
            logger.exception("A sampling step failed; failing all its requests")
            self._sampler.fail_all(error)


class Turns:
    """Schedules sampling first, but a waiting micro-batch after at most ``quantum`` seconds of it. Holds no clock."""

    def __init__(self, quantum: float) -> None:
        self._quantum = quantum
        self._waiting_since: float | None = None

    def training_is_due(self, training_waits: bool, sampling_waits: bool, now: float) -> bool:
        if not training_waits:
            self._waiting_since = None
            return False
        if self._waiting_since is None:
            self._waiting_since = now
        return not sampling_waits or now - self._waiting_since >= self._quantum

    def trained(self, now: float) -> None:
        """A micro-batch finished; the next one starts waiting."""
        self._waiting_since = now


def _usual_batch(engine: Engine) -> int:
    has_limit = engine.runner.capacity is not None
    return _BATCH_GPU if has_limit and engine.device.type != "cpu" else _BATCH_CPU


def _own(adapter: Adapter) -> LoraAdapter:
    if not isinstance(adapter, LoraAdapter):
        raise TypeError(f"{type(adapter).__name__} is not an adapter of this backend")
    return adapter
