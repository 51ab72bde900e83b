"""The embedded service through the real tinker SDK: how fast it samples and trains, and whether sampler and trainer agree.

    python -m benchmarks local_service

Goals: 32 requests at once give at least 8 times the tokens per second of one, and log-probabilities of sampler and trainer for the
same tokens differ by less than 1e-3 in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import tinker
from tinker import types

from benchmarks.shared.report import write_result
from searchr1_async.local import DEFAULT_MODEL, local_service

PROMPT_TOKENS, NEW_TOKENS = 96, 64


def prompt(generator: random.Random, shared: list[int]) -> types.ModelInput:
    """A prompt of which the first half is shared by all, like a system prompt."""
    return types.ModelInput.from_ints(shared + [generator.randrange(100, 40_000) for _ in range(PROMPT_TOKENS // 2)])


async def sampling(client: tinker.SamplingClient, at_once: int, rounds: int) -> float:
    """New tokens a second with ``at_once`` single-sample requests in flight; the best of ``rounds``."""
    best = 0.0
    shared = list(range(1000, 1000 + PROMPT_TOKENS // 2))
    for number in range(rounds):
        generator = random.Random(f"{at_once}/{number}")
        params = types.SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, stop=[], seed=number)
        began = time.monotonic()
        futures = [client.sample(prompt(generator, shared), 1, params) for _ in range(at_once)]
        tokens = sum([len((await future).sequences[0].tokens) for future in futures])
        best = max(best, tokens / (time.monotonic() - began))
    return best


async def agreement(trainer: tinker.TrainingClient) -> tuple[float, float]:
    """The largest difference of log-probabilities between sampler and trainer, and training tokens a second.

    Groups of 8 share their prompt, as in reinforcement learning; the adapter is moved off zero first.
    """
    generator = random.Random(0)
    sampler = await trainer.save_weights_and_get_sampling_client()
    data, sampled = await _groups(sampler, generator)
    await trainer.forward_backward(data, "importance_sampling")
    await trainer.optim_step(types.AdamParams(learning_rate=1e-3))
    sampler = await trainer.save_weights_and_get_sampling_client()
    data, sampled = await _groups(sampler, generator)
    began = time.monotonic()
    output = await trainer.forward_backward(data, "importance_sampling")
    seconds = time.monotonic() - began
    worst = 0.0
    for record, logprobs in zip(output.loss_fn_outputs, sampled, strict=True):
        trained = np.asarray(record["logprobs"].to_numpy())[-len(logprobs) :]
        worst = max(worst, float(np.abs(trained - np.asarray(logprobs)).max()))
    return worst, sum(datum.model_input.length for datum in data) / seconds


async def _groups(
    sampler: tinker.SamplingClient, generator: random.Random
) -> tuple[list[types.Datum], list[list[float]]]:
    shared = list(range(1000, 1000 + PROMPT_TOKENS // 2))
    params = types.SamplingParams(max_tokens=NEW_TOKENS, stop=[], seed=1)
    prompts = [prompt(generator, shared) for _ in range(4)]
    answers = [await sampler.sample(one, 8, params) for one in prompts]
    data, logprobs = [], []
    for one, answer in zip(prompts, answers, strict=True):
        for sequence in answer.sequences:
            tokens = np.asarray([*one.to_ints(), *sequence.tokens], dtype=np.int64)
            known = np.zeros(len(tokens) - 1, dtype=np.float32)
            known[-len(sequence.tokens) :] = sequence.logprobs
            advantages = np.where(known != 0, generator.uniform(-1, 1), 0).astype(np.float32)
            inputs = {"target_tokens": tokens[1:], "logprobs": known, "advantages": advantages}
            data.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
                    loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
                )
            )
            logprobs.append(list(sequence.logprobs or []))
    return data, logprobs


async def measure(model: str, threads: int | None, rounds: int) -> pl.DataFrame:
    """All figures of one service, as one row a figure."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        async with local_service(model, folder=Path(folder), threads=threads, dtype="float32") as service:
            client = tinker.ServiceClient(base_url=service.url, api_key=service.api_key)
            trainer = await client.create_lora_training_client(service.model_name, rank=16, seed=0)
            sampler = await trainer.save_weights_and_get_sampling_client()
            await sampling(sampler, 1, 1)  # warm
            speeds = {at_once: await sampling(sampler, at_once, rounds) for at_once in (1, 8, 32, 64)}
            rows += [
                {"figure": f"sampled tokens/s, {at_once} at once", "value": speed} for at_once, speed in speeds.items()
            ]
            rows.append({"figure": "32 at once against one", "value": speeds[32] / speeds[1]})
            worst, trained = await agreement(trainer)
            rows.append({"figure": "trained tokens/s (forward and backward, groups of 8)", "value": trained})
            rows.append({"figure": "largest |log p sampler - log p trainer|", "value": worst})
            await client.close("success")
    return pl.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = asyncio.run(measure(options.model, options.threads, options.rounds))
    lines = ["| figure | value |", "| --- | --- |"]
    lines += [f"| {figure} | {value:.4g} |" for figure, value in table.iter_rows()]
    write_result("local_service", "The embedded service", ["\n".join(lines)], table)
