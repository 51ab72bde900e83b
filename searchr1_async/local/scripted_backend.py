"""A backend without a model: a function of the prompt replies after a modelled latency, and each request is logged. For tests.

Its weights are one number: token ``t`` has log-probability ``scale_free(t) * exp(-bias)``, and Tinker's losses and Adam
update ``bias``. So the sampler and the trainer agree at the same version, versions differ, and checkpoint round-trips can be
tested.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import logging
import math
import random
import sched
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from searchr1_async.local.backend import (
    AdamParams,
    Adapter,
    Datum,
    Float32Array,
    ForwardBackwardResult,
    InflightClient,
    Int32Array,
    LoraConfig,
    SampledSequence,
    SampleRequest,
    SampleResult,
    Snapshot,
    State,
    UserFault,
    check_data,
    common_prefix_length,
    find_inputs,
    loss_and_slope,
)
from searchr1_async.local.process import Latency, Served, ServedSequence, TimedReply, TrainingTimes

logger = logging.getLogger(__name__)

MOST_TOKENS = 2_000_000
"""Maximum tokens cached per sampler; beyond it the cache is cleared."""
Reply = Callable[[list[int], random.Random], "list[int] | str | TimedReply"]
"""Maps prompt tokens and a random generator to new tokens, or to text (the backend then needs a tokenizer)."""
Result = TypeVar("Result")
_Call = tuple[int, Any, SampleRequest, "Future[SampleResult]"]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Weights:
    """A snapshot: an immutable version. Compared by identity, since each snapshot has its own prefix cache."""

    bias: float = 0.0
    version: int = 0
    """Optimizer steps."""


@dataclass(slots=True, eq=False)
class ScriptedAdapter:
    """A trainable version: one parameter with its gradient and Adam moments."""

    lora: LoraConfig
    weights: Weights = field(default_factory=Weights)
    gradient: float = 0.0
    moments: tuple[float, float] = (0.0, 0.0)
    steps_submitted: int = 0
    """Optimizer steps submitted, including those still queued."""


def scale_free(tokens: NDArray[Any]) -> NDArray[Any]:
    """A fixed log-probability per token id in [-2.1, -0.1]; same shape, float64."""
    return -0.1 - 2.0 * ((tokens.astype(np.uint64) * np.uint64(2654435761)) % np.uint64(1 << 32)) / 2.0**32


def logprobs_of(tokens: NDArray[Any], weights: Weights) -> Float32Array:
    """Log-probabilities of tokens at a version, for both sampler and trainer; same shape."""
    return (scale_free(tokens) * math.exp(-weights.bias)).astype(np.float32)


def topk(tokens: NDArray[Any], weights: Weights, k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Each token and the k - 1 following ids, most likely first: ids and log-probabilities, each [N, k]."""
    ids = np.asarray(tokens, np.int32)[:, None] + np.arange(k, dtype=np.int32)
    logprobs = logprobs_of(ids, weights)
    order = np.argsort(-logprobs, axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)


def weights_in(state: State) -> Weights:
    return Weights(float(state["bias"][0]), int(state["version"][0]))


def forward_backward(
    adapter: ScriptedAdapter,
    data: Sequence[Datum],
    loss_fn: str,
    loss_config: Mapping[str, float],
    forward_only: bool,
) -> ForwardBackwardResult:
    """Tinker's losses and their gradient: d logprob / d bias = -logprob."""
    inputs, config = find_inputs(loss_fn, loss_config)
    check_data(data, loss_fn, inputs)
    loss, gradient, rows = 0.0, 0.0, []
    for datum in data:
        logprobs = logprobs_of(datum.loss_inputs["target_tokens"], adapter.weights)
        rows.append(logprobs)
        lp = logprobs.astype(np.float64)
        value, slope = loss_and_slope(loss_fn, lp, datum.loss_inputs, config)
        loss += value
        gradient += float(np.sum(slope * -lp))
    if not forward_only:
        adapter.gradient += gradient
    return ForwardBackwardResult(tuple(rows), {"loss:sum": loss})


def optim_step(adapter: ScriptedAdapter, params: AdamParams) -> dict[str, float]:
    gradient = adapter.gradient
    norm = abs(gradient)
    if params.grad_clip_norm and norm > params.grad_clip_norm:
        gradient *= params.grad_clip_norm / norm
    step = adapter.weights.version + 1
    first = params.beta1 * adapter.moments[0] + (1 - params.beta1) * gradient
    second = params.beta2 * adapter.moments[1] + (1 - params.beta2) * gradient**2
    direction = first / (1 - params.beta1**step) / (math.sqrt(second / (1 - params.beta2**step)) + params.eps)
    bias = adapter.weights.bias * (1 - params.learning_rate * params.weight_decay) - params.learning_rate * direction
    adapter.weights = replace(adapter.weights, bias=bias, version=step)
    adapter.moments, adapter.gradient = (first, second), 0.0
    return {"unclipped_grad_l2": norm}


class PrefixCache:
    """The token sequences that one sampler has run; a sequence replaces its own prefixes."""

    def __init__(self) -> None:
        # Sorted. Big-endian bytes sort like the integers, so sequences with the longest common prefix are neighbours.
        self._texts: list[bytes] = []
        self._tokens = 0

    def hits(self, prompt: Int32Array) -> int:
        """Number of cached tokens of ``prompt``, excluding the last one, whose logits are always needed."""
        place = bisect.bisect(self._texts, _key(prompt))
        near = self._texts[max(0, place - 1) : place + 1]
        known = (common_prefix_length(np.frombuffer(text, ">i4"), prompt) for text in near)
        return min(max(known, default=0), len(prompt) - 1)

    def add(self, prompt: Int32Array, continuations: Sequence[Int32Array]) -> None:
        """Cache a prompt with each continuation, without the last token, which was never run."""
        if self._tokens > MOST_TOKENS:
            self._texts.clear()
            self._tokens = 0
        for tokens in continuations:
            key = _key(np.concatenate([prompt, tokens[:-1]]))
            place = bisect.bisect_left(self._texts, key)
            if place < len(self._texts) and self._texts[place].startswith(key):
                continue
            while place and key.startswith(self._texts[place - 1]):
                place -= 1
                self._tokens -= len(self._texts.pop(place)) // 4
            self._texts.insert(place, key)
            self._tokens += len(key) // 4


def _key(tokens: Int32Array) -> bytes:
    return np.ascontiguousarray(tokens, dtype=">i4").tobytes()


class TimerThread:
    """Calls functions when due on one daemon thread, ordered by due time, then submission."""

    def __init__(self, name: str) -> None:
        self._calls = sched.scheduler(time.monotonic)
        self._changed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call_at(self, due: float, function: Callable[[], None], future: Future[Any] | None = None) -> None:
        """``due`` in :func:`time.monotonic` seconds. ``future`` is cancelled if the thread closes first."""
        self._calls.enterabs(due, 0, self._call, (function, future))
        self._changed.set()
        if self._closed and future is not None:
            future.cancel()

    def close(self) -> None:
        """Ends the thread and cancels open futures."""
        self._closed = True
        self._changed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for call in self._calls.queue:
            if call.argument[1] is not None:
                call.argument[1].cancel()

    def _run(self) -> None:
        while not self._closed:
            self._changed.wait(self._calls.run(blocking=False))
            self._changed.clear()  # before the next look at calls and at the end, so that neither is missed

    def _call(self, function: Callable[[], None], future: Future[Any] | None) -> None:
        if self._closed:
            if future is not None:
                future.cancel()
            return
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
        self.model_name = model_name
        self.tokenizer_path = tokenizer_path
        self._latency = latency or Latency()
        self._training = training or TrainingTimes()
        self._max_concurrent = max_concurrent
        self.max_context_length = max_context_length
        self._seed = seed
        self._latency_log = latency_log
        self._arrivals = itertools.count()
        self._queue: deque[_Call] = deque()
        self._base = Weights()
        self._caches: WeakKeyDictionary[Any, PrefixCache] = WeakKeyDictionary()
        self._running = 0
        self._training_free_at = 0.0
        self._timers = TimerThread("scripted-backend")

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(self, weights: Snapshot | InflightClient | None, request: SampleRequest) -> Future[SampleResult]:
        """Uses the weights current at the sample's start for the whole sample."""
        future: Future[SampleResult] = Future()
        if len(request.prompt) > self.max_context_length:
            future.set_exception(UserFault(f"prompt: {len(request.prompt)} tokens exceed {self.max_context_length}"))
            return future
        call = (next(self._arrivals), self._base if weights is None else weights, request, future)
        self._timers.call_at(0.0, lambda: self._enqueue(call), future)
        return future

    def _enqueue(self, call: _Call) -> None:
        self._queue.append(call)
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
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
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
            count = len(sequence.tokens)
            seconds = self._latency.draw(len(prompt), count, chance) if reply.seconds is None else reply.seconds
            drawn.append(ServedSequence(reply.label, seconds, count))
        prompt_logprobs = topk_prompt = None
        if request.prompt_logprobs:
            prompt_logprobs = logprobs_of(request.prompt, weights)
            prompt_logprobs[0] = np.nan
        if request.topk_prompt_logprobs:
            topk_prompt = topk(request.prompt, weights, request.topk_prompt_logprobs)
            topk_prompt[0][0], topk_prompt[1][0] = 0, np.nan
        return SampleResult(tuple(sequence for sequence, _ in generated), prompt_logprobs, topk_prompt), tuple(drawn)

    def _continue(
        self, prompt: list[int], weights: Weights, request: SampleRequest, chance: random.Random
    ) -> tuple[SampledSequence, TimedReply]:
        given = self._reply(prompt, chance)
        reply = given if isinstance(given, TimedReply) else TimedReply(given)
        tokens = self._encode(reply.content) if isinstance(reply.content, str) else list(reply.content)
        limit = self.max_context_length - len(prompt) if request.max_tokens is None else request.max_tokens
        end = min(self._stop_at(tokens, request), len(tokens))
        stop_reason = "stop" if end <= limit else "length"
        array = np.asarray(tokens[: min(end, limit)], np.int32)
        top = topk(array, weights, request.topk_sample_logprobs) if request.topk_sample_logprobs else None
        return SampledSequence(array, logprobs_of(array, weights), stop_reason, top), reply

    def _stop_at(self, tokens: list[int], request: SampleRequest) -> int:
        """Number of tokens up to and including the first stop."""
        ends = [tokens.index(stop) + 1 for stop in request.stop_tokens or () if stop in tokens]
        if request.stop_strings:
            for count in range(1, len(tokens) + 1):
                text = self._tokenizer.decode(tokens[:count])
                if any(stop in text for stop in request.stop_strings):
                    ends.append(count)
                    break
        return min(ends, default=len(tokens))

    def _encode(self, text: str) -> list[int]:
        tokens, end = self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id
        return tokens if end is None else [*tokens, end]

    @functools.cached_property
    def _tokenizer(self) -> Any:
        if not self.tokenizer_path:
            raise UserFault("this scripted service has no tokenizer, so it cannot handle text")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_path)

    # -- training ------------------------------------------------------------------------------------------------

    def create_adapter(self, lora: LoraConfig) -> Future[Adapter]:
        return self._train("create", 0.0, 0, lambda: ScriptedAdapter(lora))

    def snapshot(self, adapter: Adapter) -> Future[Snapshot]:
        own = _own(adapter, ScriptedAdapter)
        return self._train("snapshot", self._training.save, own.steps_submitted, lambda: replace(own.weights))

    def forward_backward(
        self,
        adapter: Adapter,
        data: Sequence[Datum],
        loss_fn: str,
        loss_config: Mapping[str, float],
        forward_only: bool,
    ) -> Future[ForwardBackwardResult]:
        own, tokens = _own(adapter, ScriptedAdapter), sum(len(datum.tokens) for datum in data)
        return self._train(
            "forward" if forward_only else "forward_backward",
            self._training.per_token * tokens / (3 if forward_only else 1),
            own.steps_submitted,
            lambda: forward_backward(own, data, loss_fn, loss_config, forward_only),
            tokens,
            len(data),
        )

    def optim_step(self, adapter: Adapter, params: AdamParams) -> Future[Mapping[str, float]]:
        own = _own(adapter, ScriptedAdapter)
        version = own.steps_submitted
        own.steps_submitted += 1
        return self._train("optim_step", self._training.optim_step, version, lambda: optim_step(own, params))

    def export_adapter(self, adapter: Adapter, optimizer: bool) -> Future[State]:
        own = _own(adapter, ScriptedAdapter)

        def export() -> State:
            state = {"bias": np.array([own.weights.bias]), "version": np.array([own.weights.version])}
            return {**state, "moments": np.array(own.moments)} if optimizer else state

        return self._train("export", self._training.save, own.steps_submitted, export)

    def import_adapter(self, lora: LoraConfig, state: State, optimizer: bool) -> Future[Adapter]:
        weights = weights_in(state)

        def load() -> Adapter:
            first, second = (float(moment) for moment in state["moments"]) if optimizer else (0.0, 0.0)
            return ScriptedAdapter(lora, weights, moments=(first, second), steps_submitted=weights.version)

        return self._train("import", self._training.save, weights.version, load)

    def import_snapshot(self, lora: LoraConfig, state: State) -> Future[Snapshot]:
        weights = weights_in(state)
        return self._train("import", self._training.save, weights.version, lambda: weights)

    def _train(
        self, kind: str, seconds: float, version: int, work: Callable[[], Result], tokens: int = 0, examples: int = 0
    ) -> Future[Result]:
        """Schedules work on the training device; it takes effect when its time is up, in call order."""
        future: Future[Result] = Future()
        began = max(time.monotonic(), self._training_free_at)
        due = self._training_free_at = began + seconds
        self.served.append(Served(kind, began, seconds, version, tokens, examples))
        self._timers.call_at(due, lambda: _resolve(future, work), future)
        return future

    def close(self) -> None:
        self._timers.close()
        if self._latency_log is not None:
            rows = (json.dumps(asdict(request)) for request in self.served)
            self._latency_log.write_text("".join(f"{row}\n" for row in rows))


def _own(value: Any, kind: type[Result]) -> Result:
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
