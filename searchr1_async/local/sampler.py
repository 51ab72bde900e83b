"""Sampling: the choice of next tokens from logits, and continuous batching.

Requests join and leave the running batch at every decode step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchr1_async.local.backend import (
    Float32Array,
    Int32Array,
    SampledSequence,
    SampleRequest,
    SampleResult,
    UserFault,
)
from searchr1_async.local.runner import Owner, Prefilled, Runner

logger = logging.getLogger(__name__)

_LOGITS_CHUNK = 128
"""Prompt positions whose logits are in memory at once."""


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """Sampling parameters of one row."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float
    """Drawn from [0, 1) by the sequence's own generator, so that its tokens do not depend on the batch."""


@dataclass(frozen=True, slots=True)
class Choices:
    tokens: NDArray[np.int64]
    """[rows]; -1 where the logits are not finite."""
    logprobs: NDArray[np.float32]
    """[rows], under the untempered, untruncated distribution, as the trainer computes them."""
    log_normalizer: Tensor
    """[rows], logsumexp of the logits."""


def choose(logits: Tensor, rules: Sequence[ChoiceRule]) -> Choices:
    """Choose one token per row of ``logits`` [rows, vocabulary] (float32).

    Applies temperature, top-k, top-p, then inverts the cumulative distribution at the row's uniform draw.
    """
    log_normalizer = torch.logsumexp(logits, dim=-1)
    tokens = torch.empty(len(rules), dtype=torch.int64, device=logits.device)
    greedy = [i for i, rule in enumerate(rules) if rule.temperature == 0.0]
    plain = [i for i, rule in enumerate(rules) if rule.temperature > 0.0 and rule.top_k < 1 and rule.top_p >= 1.0]
    if greedy:
        tokens[greedy] = _rows(logits, greedy).argmax(-1)
    if plain:
        tokens[plain] = _invert(_probabilities(logits, log_normalizer, plain, rules), plain, rules)
    for i in sorted(set(range(len(rules))) - set(greedy) - set(plain)):
        tokens[i] = _truncated(logits[i], rules[i])
    logprobs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - log_normalizer
    bad = ~torch.isfinite(log_normalizer)
    tokens.masked_fill_(bad, -1)
    return Choices(tokens.cpu().numpy(), logprobs.cpu().numpy(), log_normalizer)


def _rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[list(rows)]


def _probabilities(logits: Tensor, log_normalizer: Tensor, rows: Sequence[int], rules: Sequence[ChoiceRule]) -> Tensor:
    """Tempered, unnormalized probabilities."""
    chosen = _rows(logits, rows)
    if all(rules[i].temperature == 1.0 for i in rows):
        return (chosen - _rows(log_normalizer, rows).unsqueeze(1)).exp_()
    heat = torch.tensor([rules[i].temperature for i in rows], device=logits.device).unsqueeze(1)
    return (chosen - chosen.amax(-1, keepdim=True)).div_(heat).exp_()


def _invert(weights: Tensor, rows: Sequence[int], rules: Sequence[ChoiceRule]) -> Tensor:
    cumulative = weights.cumsum_(-1)
    uniform = torch.tensor([rules[i].uniform for i in rows], dtype=weights.dtype, device=weights.device)
    total = cumulative[:, -1]
    # Keep the goal below the total despite rounding; right=True then finds the first token whose cumulative weight
    # exceeds it, so a token of weight zero is never chosen.
    goal = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, goal.unsqueeze(1), right=True).squeeze(1)
    return index.clamp_(max=weights.shape[-1] - 1)  # only matters for non-finite rows


def _truncated(logits: Tensor, rule: ChoiceRule) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        return torch.zeros((), dtype=torch.int64, device=logits.device)
    vocabulary = len(logits)
    count = min(rule.top_k, vocabulary) if rule.top_k >= 1 else vocabulary
    values, ids = torch.topk(logits, count)
    weights = torch.softmax(values / rule.temperature, -1)
    # Keep a token while the preceding ones sum to less than top_p; always keep the first.
    weights = weights.masked_fill((weights.cumsum(-1) - weights) >= rule.top_p, 0.0)
    if rule.top_p <= 0.0:
        return ids[0]
    return ids[_invert(weights.unsqueeze(0), [0], [rule])[0]]


class Decoder(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> Any: ...


@dataclass(eq=False, slots=True)
class _Job:
    request: SampleRequest
    owner: Owner
    future: Future[SampleResult]
    max_tokens: int
    stop_tokens: frozenset[int]
    started: int = 0
    done: dict[int, SampledSequence] = field(default_factory=dict)
    cached_tokens: int = 0
    prompt_logprobs: Float32Array | None = None
    topk_prompt: tuple[Int32Array, Float32Array] | None = None

    @property
    def most_tokens(self) -> int:
        """Of one sequence, prompt included."""
        return len(self.request.prompt) + self.max_tokens

    @property
    def over(self) -> bool:
        return self.future.done()

    @property
    def all_logits(self) -> bool:
        return self.request.prompt_logprobs or self.request.topk_prompt_logprobs > 0


@dataclass(eq=False, slots=True)
class _Running:
    """One running continuation of a request."""

    job: _Job
    index: int
    generator: np.random.Generator
    handle: Any
    draws: list[float] = field(default_factory=list)
    """Drawn and not used yet."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[tuple[Int32Array, Float32Array]] = field(default_factory=list)

    def rules(self, tokens: int) -> list[ChoiceRule]:
        """For the next tokens. Each place has its own draw, whether guesses came before it or not."""
        request = self.job.request
        self.draws += [self.generator.random() for _ in range(tokens - len(self.draws))]
        return [ChoiceRule(request.temperature, request.top_k, request.top_p, draw) for draw in self.draws[:tokens]]

    def guesses(self, count: int) -> list[int]:
        """What followed when the last two tokens stood together before: answers copy from questions and passages."""
        text = np.concatenate([self.job.request.prompt, np.array(self.tokens, np.int32)])
        places = np.flatnonzero((text[:-2] == text[-2]) & (text[1:-1] == text[-1]))
        return text[places[-1] + 2 :][:count].tolist() if len(places) else []


class Sampler:
    """All sampling requests of one model. Call :meth:`step` while :attr:`busy`.

    Single-threaded, except that futures may be cancelled from any thread.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Decoder,
        *,
        vocabulary: int,
        context: int,
        end_tokens: Sequence[int],
        max_batch: int,
        prefill_tokens: int = 1024,
    ) -> None:
        """``max_batch``: maximum running sequences; ``prefill_tokens``: maximum new prompt tokens per step."""
        self._runner = runner
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._context = context
        self._end_tokens = frozenset(end_tokens)
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[_Job] = deque()
        self._running: list[_Running] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    def submit(self, owner: Owner, request: SampleRequest, future: Future[SampleResult]) -> None:
        """Queue a request; an invalid one fails its future immediately."""
        try:
            max_tokens = self._check(request)
        except UserFault as fault:
            settle(future, error=fault)
            return
        stop = self._end_tokens if request.stop_tokens is None else frozenset(request.stop_tokens)
        self._waiting.append(_Job(request, owner, future, max_tokens, stop))

    def fail_all(self, error: Exception) -> None:
        for job in {id(job): job for job in (*self._waiting, *(item.job for item in self._running))}.values():
            settle(job.future, error=error)
        self._waiting.clear()
        for item in self._running:
            self._runner.finish(item.handle, item.job.owner, None)
        self._running.clear()

    def step(self) -> None:
        """Drop cancelled requests, prefill prompts that fit, then decode one token of every running sequence."""
        self._drop_finished_jobs()
        self._admit()
        if self._running:
            batch = list(self._running)
            tokens = self._tokens_to_run(batch)
            logits = self._runner.decode([item.handle for item in batch], tokens, [item.job.owner for item in batch])
            self._extend(batch, logits, [run[1:] for run in tokens])

    def _tokens_to_run(self, batch: Sequence[_Running]) -> list[list[int]]:
        """The last token of each sequence, and guesses at the next ones if there are rows that take no time; as many of each."""
        left = min(self._context - len(item.job.request.prompt) - len(item.tokens) for item in batch)
        most = min(self._runner.free_rows // len(batch) - 1, left)
        guesses = [item.guesses(most) if most > 0 else [] for item in batch]
        count = max(map(len, guesses))
        return [
            [item.tokens[-1], *guessed, *[0] * (count - len(guessed))]
            for item, guessed in zip(batch, guesses, strict=True)
        ]

    def _check(self, request: SampleRequest) -> int:
        """Whether it fits this model; returns the maximum number of new tokens."""
        length = len(request.prompt)
        if request.prompt.min() < 0 or request.prompt.max() >= self._vocabulary:
            raise UserFault(f"The prompt contains a token id outside 0 to {self._vocabulary - 1}.")
        max_tokens = self._context - length if request.max_tokens is None else request.max_tokens
        if length + max(max_tokens, 1) > self._context:
            raise UserFault(
                f"A prompt of {length} tokens and max_tokens {request.max_tokens} exceed the model's context of "
                f"{self._context} tokens."
            )
        for name, k in (("prompt", request.topk_prompt_logprobs), ("sample", request.topk_sample_logprobs)):
            if k > self._vocabulary:
                raise UserFault(f"topk_{name}_logprobs is {k}; it must lie between 0 and {self._vocabulary}.")
        return max_tokens

    def _drop_finished_jobs(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.over)
        gone = [item for item in self._running if item.job.over]
        for item in gone:
            self._end(item)

    def _end(self, item: _Running, *, useless: bool = False) -> None:
        tokens = np.concatenate([item.job.request.prompt, np.array(item.tokens, dtype=np.int32)])
        self._runner.finish(item.handle, item.job.owner, None if useless else tokens)
        self._running.remove(item)

    def _admit(self) -> None:
        """Start waiting requests in FIFO order, prefilling those of one owner together."""
        room = self._max_batch - len(self._running)
        held = sum(item.job.most_tokens for item in self._running)
        groups: dict[tuple[Owner, bool], list[tuple[_Job, int]]] = {}
        budget = self._prefill_tokens
        for job in list(self._waiting):
            if room < 1 or budget < 1:
                break
            count = min(room, job.request.num_samples - job.started)
            if self._runner.capacity is not None:
                # One always runs, so that none waits forever.
                count = min(count, max((self._runner.capacity - held) // job.most_tokens, int(held == 0)))
            if count < 1:
                break
            room -= count
            held += count * job.most_tokens
            known = 0 if job.all_logits else self._runner.cached(job.owner, job.request.prompt)
            budget -= len(job.request.prompt) - known
            groups.setdefault((job.owner, job.all_logits), []).append((job, count))
        for (owner, all_logits), members in groups.items():
            self._prefill(owner, all_logits, members)

    def _prefill(self, owner: Owner, all_logits: bool, members: list[tuple[_Job, int]]) -> None:
        prompts = [job.request.prompt for job, _ in members]
        prefilled = self._runner.prefill(owner, prompts, [count for _, count in members], all_logits)
        started: list[_Running] = []
        rows: list[Tensor] = []
        for (job, _count), result in zip(members, prefilled, strict=True):
            if job.started == 0:
                job.cached_tokens = result.cached_tokens
                self._score_prompt(job, result)
            for handle in result.handles:
                started.append(_Running(job, job.started, self._generator(job.request, job.started), handle))
                job.started += 1
                rows.append(result.logits)
            if job.started == job.request.num_samples:
                self._waiting.remove(job)
        self._running.extend(started)
        self._extend(started, torch.stack(rows), [()] * len(started))

    @staticmethod
    def _generator(request: SampleRequest, index: int) -> np.random.Generator:
        return np.random.default_rng(None if request.seed is None else [request.seed % 2**63, index])

    def _score_prompt(self, job: _Job, result: Prefilled) -> None:
        if result.prompt_logits is None:
            return
        prompt, k = job.request.prompt, job.request.topk_prompt_logprobs
        logprobs = np.full(len(prompt), np.nan, dtype=np.float32)
        ids, values = np.zeros((len(prompt), k), np.int32), np.full((len(prompt), k), np.nan, np.float32)
        for start in range(0, len(prompt) - 1, _LOGITS_CHUNK):
            stop = min(start + _LOGITS_CHUNK, len(prompt) - 1)
            logits = result.prompt_logits(start, stop)
            normalizer = logits.logsumexp(-1, keepdim=True)
            targets = torch.from_numpy(prompt[start + 1 : stop + 1].astype(np.int64)).to(logits.device).unsqueeze(1)
            logprobs[start + 1 : stop + 1] = (logits.gather(1, targets) - normalizer).squeeze(1).cpu().numpy()
            if k:
                top = logits.topk(k)
                ids[start + 1 : stop + 1] = top.indices.cpu().numpy()
                values[start + 1 : stop + 1] = (top.values - normalizer).cpu().numpy()
        if job.request.prompt_logprobs:
            job.prompt_logprobs = logprobs
        if k:
            job.topk_prompt = ids, values

    def _extend(self, batch: Sequence[_Running], logits: Tensor, guesses: Sequence[Sequence[int]]) -> None:
        """Chooses the next tokens of every sequence in ``batch``: those after its guesses too, as long as they were right.

        ``logits`` [sequences · (guesses + 1), vocabulary]. A guess that is right is the token that would have been chosen without it.
        """
        count = len(guesses[0]) + 1
        choices = choose(logits, [rule for item in batch for rule in item.rules(count)])
        new_rows: list[range] = []
        for number, (item, guessed) in enumerate(zip(batch, guesses, strict=True)):
            first = number * count
            right = next((i for i, guess in enumerate(guessed) if guess != choices.tokens[first + i]), len(guessed))
            new_rows.append(range(first, first + right + 1))
            del item.draws[: right + 1]
            if item.tokens:
                self._runner.accept(item.handle, right + 1)
        # Only now: a sequence that ends may move the others' slots, as far as they are accepted.
        for item, rows in zip(batch, new_rows, strict=True):
            for row in rows:
                if self._add(item, row, logits, choices):
                    break

    def _add(self, item: _Running, row: int, logits: Tensor, choices: Choices) -> bool:
        """Adds a chosen token to its sequence; returns whether the sequence is over."""
        token = int(choices.tokens[row])
        if token < 0:
            fault = UserFault("The log-probabilities under these weights are not finite: training has diverged.")
            settle(item.job.future, error=fault)
            self._end(item, useless=True)
            return True
        item.tokens.append(token)
        item.logprobs.append(float(choices.logprobs[row]))
        if k := item.job.request.topk_sample_logprobs:
            top = logits[row].topk(k)
            values = top.values - choices.log_normalizer[row]
            item.topk.append((top.indices.cpu().numpy().astype(np.int32), values.cpu().numpy()))
        reason = self._stop_reason(item)
        if reason is None:
            return False
        self._end(item)
        self._complete(item, reason)
        return True

    def _stop_reason(self, item: _Running) -> Literal["stop", "length"] | None:
        if item.tokens[-1] in item.job.stop_tokens:
            return "stop"
        if item.job.request.stop_strings and self._completes_stop_string(item):
            return "stop"
        return "length" if len(item.tokens) >= item.job.max_tokens else None

    def _completes_stop_string(self, item: _Running) -> bool:
        strings = item.job.request.stop_strings
        # A token may be a single byte, so a string can span as many tokens as it has bytes; the extra four keep
        # decoding from starting inside one of its characters.
        window = max(len(string.encode()) for string in strings) + 4
        text = self._tokenizer.decode(item.tokens[-window:], skip_special_tokens=False)
        return any(string in text for string in strings)

    def _complete(self, item: _Running, reason: Literal["stop", "length"]) -> None:
        job = item.job
        topk = None
        if item.topk:
            topk = np.stack([ids for ids, _ in item.topk]), np.stack([values for _, values in item.topk])
        tokens, logprobs = np.array(item.tokens, np.int32), np.array(item.logprobs, np.float32)
        job.done[item.index] = SampledSequence(tokens, logprobs, reason, topk)
        if len(job.done) == job.request.num_samples:
            sequences = tuple(job.done[index] for index in range(job.request.num_samples))
            result = SampleResult(sequences, job.prompt_logprobs, job.topk_prompt, job.cached_tokens)
            settle(job.future, result=result)


def settle(future: Future[Any], *, result: Any = None, error: BaseException | None = None) -> None:
    """Resolve a future unless it was cancelled."""
    action: Callable[[], None] = (lambda: future.set_exception(error)) if error else (lambda: future.set_result(result))
    try:
        action()
    except InvalidStateError:
        logger.debug("Dropped the result of a cancelled request")
