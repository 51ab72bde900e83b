"""A backend without a model: a function of the prompt replies after a modelled latency. For benchmarks and tests.

Training updates :mod:`~searchr1_async.local.scripted_model`. The log of all requests and their drawn latencies gives the
lower-bound time of a run.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from searchr1_async.local import scripted_model
from searchr1_async.local.backend import (
    AdamParams,
    Adapter,
    Datum,
    ForwardBackwardResult,
    InflightClient,
    LoraConfig,
    SampledSequence,
    SampleRequest,
    SampleResult,
    Snapshot,
    State,
    UserFault,
)
from searchr1_async.local.scripted_model import PrefixCache, ScriptedAdapter, Weights, logprobs_of

logger = logging.getLogger(__name__)

Reply = Callable[[list[int], random.Random], "list[int] | str | TimedReply"]
"""Maps prompt tokens and a random generator to new tokens, or to text (the backend then needs a tokenizer)."""
Result = TypeVar("Result")
Own = TypeVar("Own")


@dataclass(frozen=True, slots=True)
class TimedReply:
    """A script's reply with an explicit latency and a label for the log."""

    content: list[int] | str
    """New tokens, or text."""
    seconds: float | None = None
    """None draws it from the latency model."""
    label: str = ""
    """Only written to the log."""


@dataclass(frozen=True, slots=True)
class ServedSequence:
    label: str
    seconds: float
    """Its own latency; the request takes as long as its slowest sequence."""
    tokens: int
    """New tokens."""


@dataclass(frozen=True, slots=True)
class Served:
    kind: str
    """``sample``, ``forward_backward``, ``forward``, ``optim_step``, ``snapshot`` (weights for sampling), ``export``
    (a checkpoint), ``import`` or ``create``."""
    began: float
    """Start, in :func:`time.monotonic` seconds (shared by all processes of a machine on Linux)."""
    seconds: float
    version: int
    """Optimizer steps of the weights sampled from or saved, or of those before the training call."""
    tokens: int = 0
    """Prompt tokens, or tokens of all examples."""
    examples: int = 0
    sequences: tuple[ServedSequence, ...] = ()

    @property
    def ended(self) -> float:
        """When its result was ready, unless cancelled."""
        return self.began + self.seconds


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of one sample: ``max(floor, prompt * prefill + tokens * decode) * lognormal(jitter)`` seconds.

    Drawn per continuation; a request takes as long as its slowest one.
    """

    prefill: float = 0.0
    """Seconds per prompt token."""
    decode: float = 0.0
    """Seconds per new token."""
    floor: float = 0.0
    """Minimum seconds, before jitter."""
    jitter: float = 0.0
    """Sigma of the lognormal factor; its median is 1."""

    def draw(self, prompt_tokens: int, new_tokens: int, chance: random.Random) -> float:
        seconds = max(self.floor, prompt_tokens * self.prefill + new_tokens * self.decode)
        return seconds * math.exp(chance.gauss(0.0, self.jitter)) if self.jitter else seconds


@dataclass(frozen=True, slots=True)
class TrainingTimes:
    """Durations in seconds on the training device, which runs one call at a time."""

    per_token: float = 0.0
    """Forward and backward of one token; forward alone takes a third."""
    optim_step: float = 0.0
    save: float = 0.0
    """Export or snapshot."""


class TimerThread:
    """Calls functions when due on one daemon thread, ordered by due time, then submission."""

    def __init__(self, name: str) -> None:
        self._heap: list[tuple[float, int, Callable[[], None], Future[Any] | None]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call_at(self, due: float, function: Callable[[], None], future: Future[Any] | None = None) -> None:
        """``due`` in :func:`time.monotonic` seconds. ``future`` is cancelled if the thread closes first."""
        with self._changed:
            if not self._closed:
                heapq.heappush(self._heap, (due, next(self._order), function, future))
                self._changed.notify()
                return
        if future is not None:
            future.cancel()

    def close(self) -> None:
        """Ends the thread and cancels open futures."""
        with self._changed:
            self._closed = True
            waiting, self._heap = self._heap, []
            self._changed.notify()
        for _, _, _, future in waiting:
            if future is not None:
                future.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    wait = self._heap[0][0] - time.monotonic() if self._heap else None
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if self._closed:
                    return
                _, _, function, _ = heapq.heappop(self._heap)
            try:
                function()
            except Exception:
                logger.exception("a timer callback failed")


class ScriptedBackend:
    """A :class:`~searchr1_async.local.backend.Backend` whose replies come from a function.

    ``reply`` runs on the backend's thread when a sample starts and must be fast. Its generator is seeded from ``seed`` and
    the request's seed (or its arrival number). Its tokens are cut at ``max_tokens`` and after the first stop token. At most
    ``max_concurrent`` samples run at once; the rest queue.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        model_name: str = "scripted",
        tokenizer_path: str = "",
        latency: Latency | None = None,
        training: TrainingTimes | None = None,
        max_concurrent: int = 1 << 20,
        max_context_length: int = 32768,
        seed: int = 0,
        latency_log: Path | None = None,
    ) -> None:
        self.served: list[Served] = []
        """Every request in scheduling order; written to ``latency_log`` on close."""
        self._reply = reply
        self._model_name = model_name
        self._tokenizer_path = tokenizer_path
        self._latency = latency or Latency()
        self._training = training or TrainingTimes()
        self._max_concurrent = max_concurrent
        self._max_context_length = max_context_length
        self._seed = seed
        self._latency_log = latency_log
        self._tokenizer: Any = None
        self._arrivals = itertools.count()
        self._queue: deque[tuple[int, Any, SampleRequest, Future[SampleResult]]] = deque()
        self._base = Weights()
        self._caches: WeakKeyDictionary[Any, PrefixCache] = WeakKeyDictionary()
        self._running = 0
        self._training_free_at = 0.0
        self._timers = TimerThread("scripted-backend")

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def tokenizer_path(self) -> str:
        return self._tokenizer_path

    @property
    def max_context_length(self) -> int:
        return self._max_context_length

    @property
    def latencies(self) -> list[float]:
        """Latency of each sample request, in order of start."""
        return [request.seconds for request in self.served if request.kind == "sample"]

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(self, weights: Snapshot | InflightClient | None, request: SampleRequest) -> Future[SampleResult]:
        """Uses the weights current at the sample's start for the whole sample."""
        future: Future[SampleResult] = Future()
        arrival = next(self._arrivals)
        source = self._base if weights is None else weights
        self._timers.call_at(0.0, lambda: self._enqueue(arrival, source, request, future), future)
        return future

    def _enqueue(
        self, arrival: int, source: Snapshot | InflightClient, request: SampleRequest, future: Future[SampleResult]
    ) -> None:
        if len(request.prompt) > self._max_context_length:
            _fail(future, UserFault(f"prompt: {len(request.prompt)} tokens exceed {self._max_context_length}"))
            return
        self._queue.append((arrival, source, request, future))
        self._start_samples()

    def _start_samples(self) -> None:
        while self._queue and self._running < self._max_concurrent:
            arrival, source, request, future = self._queue.popleft()
            if future.cancelled():
                continue
            try:
                weights = _own(source.target.snapshot if isinstance(source, InflightClient) else source, Weights)
                result, drawn = self._generate(arrival, weights, request)
                cache = self._caches.setdefault(source, PrefixCache())
                # Prompt log-probabilities need the whole prompt, so there are no cache hits.
                if not (request.prompt_logprobs or request.topk_prompt_logprobs):
                    result = replace(result, prompt_cache_hit_tokens=cache.hits(request.prompt))
                cache.add(request.prompt, [sequence.tokens for sequence in result.sequences])
            except Exception as error:
                _fail(future, error)
                continue
            now, seconds = time.monotonic(), max(sequence.seconds for sequence in drawn)
            self.served.append(
                Served("sample", now, seconds, weights.version, tokens=len(request.prompt), sequences=drawn)
            )
            self._running += 1
            # A cancelled sample frees its slot immediately, on the timer thread regardless of which thread cancelled it.
            future.add_done_callback(lambda _: self._timers.call_at(0.0, self._end_sample))
            self._timers.call_at(now + seconds, lambda f=future, r=result: _resolve(f, lambda: r), future)

    def _end_sample(self) -> None:
        self._running -= 1
        self._start_samples()

    def _generate(
        self, arrival: int, weights: Weights, request: SampleRequest
    ) -> tuple[SampleResult, tuple[ServedSequence, ...]]:
        prompt = request.prompt.tolist()
        chance = random.Random(f"{self._seed} {request.seed if request.seed is not None else f'nr {arrival}'}")
        generated = [self._continue(prompt, weights, request, chance) for _ in range(request.num_samples)]
        drawn: list[ServedSequence] = []
        for sequence, reply in generated:
            seconds = reply.seconds
            if seconds is None:
                seconds = self._latency.draw(len(prompt), len(sequence.tokens), chance)
            drawn.append(ServedSequence(reply.label, seconds, len(sequence.tokens)))
        prompt_logprobs = topk_prompt = None
        if request.prompt_logprobs or request.topk_prompt_logprobs:
            prompt_logprobs = logprobs_of(request.prompt, weights)
            prompt_logprobs[0] = np.nan
        if request.topk_prompt_logprobs:
            topk_prompt = scripted_model.topk(request.prompt, weights, request.topk_prompt_logprobs)
            topk_prompt[0][0], topk_prompt[1][0] = 0, np.nan
        if not request.prompt_logprobs:
            prompt_logprobs = None
        return SampleResult(tuple(sequence for sequence, _ in generated), prompt_logprobs, topk_prompt), tuple(drawn)

    def _continue(
        self, prompt: list[int], weights: Weights, request: SampleRequest, chance: random.Random
    ) -> tuple[SampledSequence, TimedReply]:
        given = self._reply(prompt, chance)
        reply = given if isinstance(given, TimedReply) else TimedReply(given)
        tokens = self._encode(reply.content) if isinstance(reply.content, str) else list(reply.content)
        limit = self._max_context_length - len(prompt) if request.max_tokens is None else request.max_tokens
        end = min(self._stop_at(tokens, request), len(tokens))
        stop_reason = "stop" if end <= limit else "length"
        array = np.asarray(tokens[: min(end, limit)], np.int32)
        topk = (
            scripted_model.topk(array, weights, request.topk_sample_logprobs) if request.topk_sample_logprobs else None
        )
        return SampledSequence(array, logprobs_of(array, weights), stop_reason, topk), reply

    def _stop_at(self, tokens: list[int], request: SampleRequest) -> int:
        """Number of tokens up to and including the first stop."""
        ends = [tokens.index(stop) + 1 for stop in request.stop_tokens or () if stop in tokens]
        if request.stop_strings:
            tokenizer = self._load_tokenizer()
            for count in range(1, len(tokens) + 1):
                text = tokenizer.decode(tokens[:count])
                if any(stop in text for stop in request.stop_strings):
                    ends.append(count)
                    break
        return min(ends, default=len(tokens))

    def _encode(self, text: str) -> list[int]:
        tokenizer = self._load_tokenizer()
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            if not self._tokenizer_path:
                raise UserFault("this scripted service has no tokenizer, so it cannot handle text")
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_path)
        return self._tokenizer

    # -- training ------------------------------------------------------------------------------------------------

    def create_adapter(self, lora: LoraConfig) -> Future[Adapter]:
        return self._train(Served("create", 0.0, 0.0, 0), lambda: ScriptedAdapter(lora))

    def snapshot(self, adapter: Adapter) -> Future[Snapshot]:
        own = _own(adapter, ScriptedAdapter)
        return self._train(self._call("snapshot", self._training.save, own), lambda: replace(own.weights))

    def forward_backward(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_fn: str,
        loss_config: Mapping[str, float],
        forward_only: bool,
    ) -> Future[ForwardBackwardResult]:
        own = _own(adapter, ScriptedAdapter)
        tokens = sum(len(datum.tokens) for datum in data)
        seconds = self._training.per_token * tokens / (3 if forward_only else 1)
        call = self._call("forward" if forward_only else "forward_backward", seconds, own, tokens, len(data))
        return self._train(call, lambda: scripted_model.forward_backward(own, data, loss_fn, loss_config, forward_only))

    def optim_step(self, adapter: Adapter, params: AdamParams) -> Future[Mapping[str, float]]:
        own = _own(adapter, ScriptedAdapter)
        call = self._call("optim_step", self._training.optim_step, own)
        return self._train(call, lambda: scripted_model.optim_step(own, params))

    def export_adapter(self, adapter: Adapter, optimizer: bool) -> Future[State]:
        own = _own(adapter, ScriptedAdapter)

        def export() -> State:
            state = {"bias": np.array([own.weights.bias]), "version": np.array([own.weights.version])}
            return {**state, "moments": np.array(own.moments)} if optimizer else state

        return self._train(self._call("export", self._training.save, own), export)

    def import_adapter(self, lora: LoraConfig, state: State, optimizer: bool) -> Future[Adapter]:
        def load() -> Adapter:
            first, second = (float(moment) for moment in state["moments"]) if optimizer else (0.0, 0.0)
            weights = scripted_model.weights_in(state)
            return ScriptedAdapter(lora, weights, moments=(first, second), steps_submitted=weights.version)

        return self._train(Served("import", 0.0, self._training.save, scripted_model.weights_in(state).version), load)

    def import_snapshot(self, lora: LoraConfig, state: State) -> Future[Snapshot]:
        weights = scripted_model.weights_in(state)
        return self._train(Served("import", 0.0, self._training.save, weights.version), lambda: weights)

    def _call(self, kind: str, seconds: float, adapter: ScriptedAdapter, tokens: int = 0, examples: int = 0) -> Served:
        # Earlier calls may still be queued, so the adapter's own version is not up to date.
        version = adapter.steps_submitted
        if kind == "optim_step":
            adapter.steps_submitted += 1
        return Served(kind, 0.0, seconds, version, tokens, examples)

    def _train(self, call: Served, work: Callable[[], Result]) -> Future[Result]:
        """Schedules work on the training device; it takes effect when its time is up, in call order."""
        future: Future[Result] = Future()
        began = max(time.monotonic(), self._training_free_at)
        due = self._training_free_at = began + call.seconds
        self.served.append(replace(call, began=began))
        self._timers.call_at(due, lambda: _resolve(future, work), future)
        return future

    def close(self) -> None:
        self._timers.close()
        if self._latency_log is not None:
            rows = (json.dumps(asdict(request)) for request in self.served)
            self._latency_log.write_text("".join(f"{row}\n" for row in rows))


def _own(value: Any, kind: type[Own]) -> Own:
    if not isinstance(value, kind):
        raise TypeError(f"not an object of this backend: {value!r}")
    return value


def _resolve(future: Future[Result], work: Callable[[], Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)


def _fail(future: Future[Any], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
