"""The load of the embedded service through the real tinker SDK: requests, the speeds they get, and the log-probabilities that return."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types

_TOKENS = range(100, 30_000)
"""Token ids of the prompts; every common vocabulary has them."""


@dataclass(frozen=True)
class Load:
    """Sizes of the requests.

    Args:
        prompt: tokens of a prompt; the first half is shared by all, like a system prompt.
        new: tokens sampled after it.
        groups: prompts of a training batch.
        group_size: continuations of each, which share the prompt as in reinforcement learning.
    """

    prompt: int = 96
    new: int = 64
    groups: int = 4
    group_size: int = 8


@dataclass(frozen=True)
class Agreement:
    """Sampler and trainer on the same tokens.

    Args:
        largest: difference of their log-probabilities, in nats.
        mean: of the absolute differences.
        trained_per_second: tokens a second of the forward and backward pass; shared prompts count in each sequence.
        sequences: token ids, prompt and continuation.
    """

    largest: float
    mean: float
    trained_per_second: float
    sequences: list[list[int]]


def prompt(generator: random.Random, load: Load) -> types.ModelInput:
    """A prompt of ``load.prompt`` random tokens, half of them shared."""
    shared = load.prompt // 2
    return types.ModelInput.from_ints([*range(1000, 1000 + shared), *_random_tokens(generator, load.prompt - shared)])


async def sampled_per_second(client: tinker.SamplingClient, load: Load, at_once: int, rounds: int) -> float:
    """New tokens a second with ``at_once`` single-sample requests in flight; the best of ``rounds``."""
    best = 0.0
    for number in range(rounds):
        generator = random.Random(f"{at_once}/{number}")
        params = types.SamplingParams(max_tokens=load.new, temperature=1.0, stop=[], seed=number)
        prompts = [prompt(generator, load) for _ in range(at_once)]
        began = time.monotonic()
        futures = [client.sample(one, 1, params) for one in prompts]
        tokens = sum([len((await future).sequences[0].tokens) for future in futures])
        best = max(best, tokens / (time.monotonic() - began))
    return best


async def prefilled_per_second(client: tinker.SamplingClient, requests: int, length: int, rounds: int) -> float:
    """Prompt tokens a second of ``requests`` at once with ``length`` tokens each, of which none are shared; the best of ``rounds``."""
    best = 0.0
    params = types.SamplingParams(max_tokens=1, stop=[])
    for number in range(rounds):
        generator = random.Random(f"prefill/{number}")
        prompts = [types.ModelInput.from_ints(_random_tokens(generator, length)) for _ in range(requests)]
        began = time.monotonic()
        futures = [client.sample(one, 1, params) for one in prompts]
        for future in futures:
            await future
        best = max(best, requests * length / (time.monotonic() - began))
    return best


async def next_turns_per_second(client: tinker.SamplingClient, load: Load, *, requests: int, new: int) -> float:
    """New prompt tokens a second where ``requests`` conversations go on at once: each prompt of the load, its sampled answer, and
    ``new`` tokens more, as of a search result. One token is sampled after them."""
    generator = random.Random("next turns")
    first = [prompt(generator, load) for _ in range(requests)]
    answers = [client.sample(one, 1, types.SamplingParams(max_tokens=16, stop=[], seed=1)) for one in first]
    going_on = []
    for one, answer in zip(first, answers, strict=True):
        tokens = [*one.to_ints(), *(await answer).sequences[0].tokens]
        going_on.append(types.ModelInput.from_ints([*tokens, *_random_tokens(generator, new)]))
    began = time.monotonic()
    futures = [client.sample(one, 1, types.SamplingParams(max_tokens=1, stop=[])) for one in going_on]
    for future in futures:
        await future
    return requests * new / (time.monotonic() - began)


async def agreement(trainer: tinker.TrainingClient, load: Load) -> Agreement:
    """How far sampler and trainer agree, with the adapter moved off zero by one optimizer step of 1e-3."""
    generator = random.Random(0)
    sampler = await trainer.save_weights_and_get_sampling_client()
    data, _ = await _groups(sampler, generator, load)
    await trainer.forward_backward(data, "importance_sampling")
    await trainer.optim_step(types.AdamParams(learning_rate=1e-3))
    sampler = await trainer.save_weights_and_get_sampling_client()
    data, sampled = await _groups(sampler, generator, load)
    began = time.monotonic()
    output = await trainer.forward_backward(data, "importance_sampling")
    seconds = time.monotonic() - began
    differences = np.concatenate(
        [
            np.abs(np.asarray(record["logprobs"].to_numpy())[-len(logprobs) :] - logprobs)
            for record, logprobs in zip(output.loss_fn_outputs, sampled, strict=True)
        ]
    )
    tokens = sum(datum.model_input.length for datum in data)
    sequences = [
        [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])] for datum in data
    ]
    return Agreement(float(differences.max()), float(differences.mean()), tokens / seconds, sequences)


async def scores(client: tinker.SamplingClient, sequences: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Log-probabilities of every token but the first of each sequence, one after another."""
    futures = [client.compute_logprobs(types.ModelInput.from_ints(list(one))) for one in sequences]
    return np.array([value for future in futures for value in (await future)[1:]], dtype=np.float64)


def _random_tokens(generator: random.Random, count: int) -> list[int]:
    return generator.choices(_TOKENS, k=count)


async def _groups(
    sampler: tinker.SamplingClient, generator: random.Random, load: Load
) -> tuple[list[types.Datum], list[NDArray[np.float32]]]:
    """A training batch with random advantages, and the log-probabilities of each continuation as they were sampled."""
    params = types.SamplingParams(max_tokens=load.new, stop=[], seed=1)
    prompts = [prompt(generator, load) for _ in range(load.groups)]
    futures = [sampler.sample(one, load.group_size, params) for one in prompts]
    data, sampled = [], []
    for one, future in zip(prompts, futures, strict=True):
        for sequence in (await future).sequences:
            tokens = np.asarray([*one.to_ints(), *sequence.tokens], dtype=np.int64)
            logprobs = np.asarray(sequence.logprobs, dtype=np.float32)
            known, advantages = np.zeros((2, len(tokens) - 1), dtype=np.float32)
            known[-len(logprobs) :], advantages[-len(logprobs) :] = logprobs, generator.uniform(-1, 1)
            inputs = {"target_tokens": tokens[1:], "logprobs": known, "advantages": advantages}
            data.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
                    loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
                )
            )
            sampled.append(logprobs)
    return data, sampled
