"""A real language model behind the embedded Tinker service: sampling and training on one thread."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from searchr1_async.errors import ModelError
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
from searchr1_async.local.generic_model import GenericRunner, GenericTrainer, HookedModel
from searchr1_async.local.lora import LoraAdapter, LoraLayout, LoraSite, LoraWeights, onednn_available
from searchr1_async.local.model_files import resolve_model
from searchr1_async.local.runner import LeanRunner, Owner, Runner
from searchr1_async.local.sampler import Decoder, Sampler, settle
from searchr1_async.local.trainer import LeanTrainer, Trainer, adam_step, forward_backward
from searchr1_async.local.transformer import LeanTransformer, is_lean, read_safetensors

logger = logging.getLogger(__name__)

SAMPLING_QUANTUM_SECONDS = 1.0
"""How long sampling may run while a training micro-batch waits."""


@dataclass(frozen=True, slots=True)
class Engine:
    runner: Runner
    trainer: Trainer
    sites: tuple[LoraSite, ...]
    tokenizer: Decoder
    vocabulary: int
    context: int
    end_tokens: tuple[int, ...]
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Work:
    """A call on an adapter: a generator that yields wherever sampling may interleave."""

    future: Future[Any]
    steps: Generator[None, None, Any]


class TorchBackend:
    """:class:`~searchr1_async.local.backend.Backend` over a Hugging Face model and LoRA adapters.

    All compute runs on one thread. Sampling has priority; a waiting adapter call gets one micro-batch after at most
    :data:`SAMPLING_QUANTUM_SECONDS` of sampling. Adapter calls run in submission order.
    """

    def __init__(
        self, name: str, folder: Path, engine: Engine, *, threads: int | None = None, max_batch: int = 64
    ) -> None:
        """Use :meth:`load` instead."""
        self._name = name
        self._folder = folder
        self._engine = engine
        self._threads = threads
        self._sampler = Sampler(
            engine.runner,
            engine.tokenizer,
            vocabulary=engine.vocabulary,
            context=engine.context,
            end_tokens=engine.end_tokens,
            max_batch=max_batch,
        )
        self._arrived = threading.Condition()
        self._samples: deque[tuple[Owner, SampleRequest, Future[SampleResult]]] = deque()
        self._work: deque[_Work] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="torch-backend", daemon=True)
        self._thread.start()
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
        kv_cache_bytes: int = 2 * 1024**3,
        max_batch: int = 64,
        max_rows: int = 1536,
    ) -> TorchBackend:
        """Load a model; takes seconds.

        Args:
            model: a folder, or a name (see :func:`~searchr1_async.local.model_files.resolve_model`).
            threads: compute threads; None is torch's default, one per core.
            dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the hardware multiplies it faster.
            device: ``cpu``, ``cuda``, ``mps``, or ``auto``: the first accelerator found.
            kv_cache_bytes: size limit of the prefix cache (running sequences not included).
            max_batch: maximum sequences sampled at once.
            max_rows: maximum distinct tokens per training micro-batch.

        Raises:
            ModelError: the model cannot be found or used.
        """
        files = resolve_model(model)
        target = choose_device(device)
        precision = choose_dtype(dtype, target)
        engine = load_engine(files.folder, target, precision, kv_cache_bytes, max_rows)
        logger.info("Loaded %s in %s on %s", model, precision, target)
        return cls(files.name, files.folder, engine, threads=threads, max_batch=max_batch)

    @property
    def model_name(self) -> str:
        return self._name

    @property
    def tokenizer_path(self) -> str:
        return str(self._folder)

    @property
    def max_context_length(self) -> int:
        return self._engine.context

    def create_adapter(self, lora: LoraConfig) -> Future[Adapter]:
        return self._call(lambda: self._new_adapter(lora))

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

    def _new_adapter(self, lora: LoraConfig) -> LoraAdapter:
        layout = self._layout(lora)
        return LoraAdapter(layout, layout.initial().to(self._engine.device))

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
                self._work.append(_Work(future, steps))
                self._arrived.notify()
        return future

    def _refuses(self, future: Future[Any]) -> bool:
        if self._closing:
            future.set_exception(RuntimeError("The model's backend is closed."))
        return self._closing

    def _loop(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        turns = Turns(SAMPLING_QUANTUM_SECONDS)
        while self._take_arrivals():
            if turns.training_is_due(bool(self._work), self._sampler.busy, time.monotonic()):
                self._train()
                turns.trained(time.monotonic())
            else:
                self._sample()
        closed = RuntimeError("The model's backend was closed before this call finished.")
        self._sampler.fail_all(closed)
        for _, _, future in self._samples:
            settle(future, error=closed)
        for work in self._work:
            work.steps.close()
            settle(work.future, error=closed)

    def _take_arrivals(self) -> bool:
        """Wait for work; False when the backend is closing."""
        with self._arrived:
            while not (self._closing or self._work or self._samples or self._sampler.busy):
                self._arrived.wait()
            if self._closing:
                return False
            arrivals = list(self._samples)
            self._samples.clear()
        for owner, request, future in arrivals:
            self._sampler.submit(owner, request, future)
        return True

    def _train(self) -> None:
        work = self._work[0]
        try:
            next(work.steps)
            return
        except StopIteration as end:
            settle(work.future, result=end.value)
        except UserFault as fault:
            settle(work.future, error=fault)
        except Exception as error:
            logger.exception("A call on an adapter failed")
            settle(work.future, error=error)
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


def _own(adapter: Adapter) -> LoraAdapter:
    if not isinstance(adapter, LoraAdapter):
        raise TypeError(f"{type(adapter).__name__} is not an adapter of this backend")
    return adapter


def choose_device(device: str) -> torch.device:
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 with AMX or AVX-512 BF16 on a CPU or on a recent GPU; elsewhere it is slowly emulated."""
    if dtype != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if dtype not in known:
            raise ModelError(f"Unknown dtype {dtype!r}; use 'auto', 'float32' or 'bfloat16'.")
        return known[dtype]
    if device.type == "cpu":
        capable = (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported)
        return torch.bfloat16 if any(check() for check in capable) else torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load_engine(folder: Path, device: torch.device, dtype: torch.dtype, cache_bytes: int, max_rows: int) -> Engine:
    """Loads a Hugging Face folder. Raises :class:`ModelError` if it cannot be read."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if is_lean(config):
            model = _lean_model(folder, config, device, dtype)
            runner, trainer = LeanRunner(model, cache_bytes), LeanTrainer(model, max_rows=max_rows)
            sites = tuple(model.lora_sites())
        else:
            logger.info("%s models use the transformers forward pass, one sequence at a time", config.model_type)
            hooked, text = HookedModel(_load_model(folder, dtype).to(device)), config.get_text_config()
            trainer = GenericTrainer(hooked, vocabulary=text.vocab_size, context=text.max_position_embeddings)
            runner, sites = GenericRunner(hooked), hooked.sites
        ends = end_tokens(folder, config, tokenizer)
        return Engine(runner, trainer, sites, tokenizer, trainer.vocabulary, trainer.context, ends, device)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {error}") from error


def _lean_model(folder: Path, config: Any, device: torch.device, dtype: torch.dtype) -> LeanTransformer:
    weights = read_safetensors(folder)
    if weights is None:
        weights = _load_model(folder, dtype).state_dict()
    weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    packed = device.type == "cpu" and dtype == torch.float32 and onednn_available()
    return LeanTransformer(config, weights, packed=packed)


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def end_tokens(folder: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text ids: those of the generation config (else the model config), plus the tokenizer's."""
    from transformers import GenerationConfig

    named: Any = None
    if (folder / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    if named is None:
        named = getattr(config, "eos_token_id", None)
    ids = set(named if isinstance(named, list | tuple) else [named]) | {tokenizer.eos_token_id}
    return tuple(sorted(i for i in ids if i is not None))
