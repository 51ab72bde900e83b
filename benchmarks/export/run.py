"""Do exported weights give the service's log-probabilities? A run is trained and exported, and its episodes are scored by both.

    PYTHONPATH=FOLDER_WITH_PEFT python -m benchmarks export

SmolLM2-135M learns to search on atlas questions: a warm-up and two steps of reinforcement learning on the embedded service, in
float32. The finished run rolls out held-out questions with the real search, answers a question, and is exported in three ways:
``run.export`` (PEFT), ``sr.export`` (merged) and the SDK's ``tinker checkpoint download``. Every token of every episode is then
scored by the service, by transformers + peft, by transformers on the merged folder, and by the base model. It fails if an exported
folder differs from the service by more than 1e-3, or if most episodes show no passage. Needs peft and accelerate
(``pip install --target FOLDER_WITH_PEFT --no-deps peft accelerate``).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
import polars as pl
import tinker
import torch
from safetensors.numpy import load_file
from tinker import types
from transformers import AutoModelForCausalLM

import searchr1_async as sr
from benchmarks.off_policy.world import World, atlas_world
from benchmarks.shared.report import write_result
from searchr1_async.events import StepFinished
from searchr1_async.local import DEFAULT_MODEL, local_service

WARM_UP = sr.WarmUp(steps=6, batch_size=8)
STEPS, GROUPS, GROUP_SIZE = 2, 3, 4
TOLERANCE = 1e-3
"""In nats; of the largest difference."""
QUESTION = "What is the capital of Namibia?"
WHEN = ("by `run.ask` while the run was under way", "by `sr.ask` on the finished run's folder")


async def learn(world: World, out_dir: Path, local: sr.config.LocalOptions) -> tuple[sr.Run, list[sr.Answer]]:
    """A finished run, and what it answered to the question after its first step and after its end."""
    run = sr.train(
        world.training(1),
        world.search(),
        out_dir,
        sr.TrainConfig(
            model=world.model,
            warm_up=WARM_UP,
            steps=STEPS,
            local=local,
            refill_groups=2 * GROUPS,  # so that no step is without a group to learn from
            **world.playing,
            **(world.learning | {"group_size": GROUP_SIZE}),
        ),
    )
    answers: list[sr.Answer] = []
    async for event in run:
        if isinstance(event, StepFinished) and event.step == 1:
            answers.append(await run.ask(QUESTION))
    await run
    answers.append(await sr.ask(QUESTION, config=sr.config.AskConfig(local=local), checkpoint=out_dir))
    return run, answers


async def scored_by_service(run: sr.Run, episodes: Sequence[sr.Episode], threads: int) -> tuple[np.ndarray, str, Path]:
    """Log-probabilities of every token but the first by the run's last weights; the base model's folder, and the adapter as
    ``tinker checkpoint download`` brings it."""
    kept = run.checkpoints[-1]
    assert kept.state_path is not None
    async with local_service(folder=run.out_dir / "service", threads=threads, dtype="float32", device="cpu") as service:
        connect = partial(tinker.ServiceClient, base_url=service.url, api_key=service.api_key)
        client = await anyio.to_thread.run_sync(connect)
        sampler = await (await anyio.to_thread.run_sync(client.create_sampling_client, kept.sampler_path))
        found = [await sampler.compute_logprobs(types.ModelInput.from_ints(list(e.tokens))) for e in episodes]
        await client.close("success")
        environment = os.environ | {"TINKER_BASE_URL": service.url, "TINKER_API_KEY": service.api_key}
        download = partial(downloaded, kept.state_path, run.out_dir.parent / "downloaded", environment)
        adapter = await anyio.to_thread.run_sync(download)
    expected = np.array([value for logprobs in found for value in logprobs[1:]], dtype=np.float64)
    return expected, service.tokenizer_path, adapter


def downloaded(state_path: str, folder: Path, environment: dict[str, str]) -> Path:
    """The adapter as the SDK's command line downloads it."""
    tinker_command = str(Path(sys.executable).with_name("tinker"))
    command = [tinker_command, "checkpoint", "download", state_path, "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return next(folder.rglob("adapter_model.safetensors"))


def is_same(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def with_peft(base: str, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))


def scored_by_transformers(load: Callable[[], Any], episodes: Sequence[sr.Episode]) -> list[np.ndarray]:
    """Log-probabilities of every token but the first."""
    model, found = load().eval(), []
    for episode in episodes:
        ids_T = torch.tensor(episode.tokens)
        with torch.inference_mode():
            logprobs_TV = model(input_ids=ids_T[None]).logits[0, :-1].log_softmax(-1)
        found.append(logprobs_TV.gather(1, ids_T[1:, None])[:, 0].numpy())
    return found


def distances(
    ways: Mapping[str, Callable[[], Any]], episodes: Sequence[sr.Episode], expected: np.ndarray
) -> pl.DataFrame:
    """One row a way to load weights: how far its log-probabilities are from those expected, in nats."""
    rows = []
    for way, load in ways.items():
        differences = np.abs(np.concatenate(scored_by_transformers(load, episodes)) - expected)
        rows.append((way, differences.size, float(differences.max()), float(differences.mean())))
    return pl.DataFrame(rows, schema=["way", "tokens", "largest", "mean"], orient="row")


async def prove(count: int, threads: int, folder: Path) -> bool:
    """Writes the result; whether it is as it should be."""
    world = atlas_world(count, GROUPS)
    local = sr.config.LocalOptions(threads=threads, dtype="float32", device="cpu")
    run, answers = await learn(world, folder / "run", local)
    groups = await sr.rollout(
        world.held_out[:count],
        world.search(),
        sr.RolloutConfig(group_size=1, seed=1, local=local, **world.playing),
        checkpoint=run.out_dir,
    )
    episodes = [episode for group in groups for episode in group.episodes]
    adapter = await run.export(folder / "adapter", local=local)
    merged = await sr.export(run.out_dir, folder / "merged", format="merged", local=local)
    expected, base, download = await scored_by_service(run, episodes, threads)
    same = is_same(download, adapter / "adapter_model.safetensors")
    from_folder = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    ways = {
        "transformers + peft, exported adapter": partial(with_peft, base, adapter),
        "transformers, merged folder": partial(from_folder, merged),
        "transformers, base model alone": partial(from_folder, base),
    }
    table = await anyio.to_thread.run_sync(distances, ways, episodes, expected)
    shown = sum(any(passages for call in one.calls for passages in call.results) for one in episodes)
    write_result(
        "export", "Exported weights against the service", body(run, answers, episodes, shown, table, same), table
    )
    *exported, untrained = table["largest"]
    return same and len(episodes) == count and shown > count / 2 and max(exported) < TOLERANCE < untrained


def body(
    run: sr.Run,
    answers: Sequence[sr.Answer],
    episodes: Sequence[sr.Episode],
    shown: int,
    table: pl.DataFrame,
    same: bool,
) -> list[str]:
    """The result in Markdown."""
    groups = " and ".join(f"{count:.0f}" for count in run.metrics["groups/trained"])
    turns = sum(len(episode.turns) for episode in episodes)
    sampled = sum(episode.action_token_count for episode in episodes)
    right = sum(episode.reward_parts["correct"] == 1 for episode in episodes)
    lines = [
        "| Against the service's log-probabilities | Tokens | Largest difference | Mean difference |",
        "|---|---:|---:|---:|",
        *(f"| {way} | {tokens:,} | {largest:.1e} | {mean:.1e} |" for way, tokens, largest, mean in table.iter_rows()),
    ]
    return [
        f"The run: `sr.train` of {DEFAULT_MODEL} on atlas questions with the embedded service in float32, a LoRA adapter of rank "
        f"{run.settings['learning']['lora_rank']} (the tied output head adapted too); a warm-up of {WARM_UP.steps} steps of "
        f"{WARM_UP.batch_size} demonstrations, then {run.step} steps of reinforcement learning, which trained on {groups} groups of "
        f"{GROUP_SIZE} episodes.",
        f"The episodes: {len(episodes)} held-out questions played by `sr.rollout(checkpoint=RUN)` with the local search. {shown} of "
        f"them made a search and were shown a passage; {right} answered right. {turns} turns, "
        f"{sum(len(episode.tokens) for episode in episodes):,} tokens, {sampled:,} of them sampled.",
        "\n".join(lines),
        "Absolute differences in nats over every token but the first of each episode, prompts and passages included, by peft "
        f"{version('peft')} and transformers in float32 over the service's own copy of the base model. The last row says how far "
        "the training went.",
        f"The matrices that `tinker checkpoint download` brings are {'equal' if same else 'NOT equal'} to those of `run.export`.",
        *(
            f"## Asked after step {answer.step}, {when}\n\n```\n{answer}\n```"
            for answer, when in zip(answers, WHEN, strict=True)
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1, help="of the service and of transformers (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):  # they would choose another service than the embedded one
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="export-agreement-") as folder:
        return 0 if asyncio.run(prove(options.episodes, options.threads, Path(folder))) else 1
