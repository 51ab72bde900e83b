"""Do exported weights say what the service says? Log-probabilities of real episodes, by the service and by transformers.

    PYTHONPATH=FOLDER_WITH_PEFT python benchmarks/export_agreement.py --episodes 50

An adapter of SmolLM2-135M is trained for a few supervised steps on the embedded service, plays episodes on atlas questions, and is
taken away in three ways: `export(format="peft")`, `export(format="merged")` and the SDK's `tinker checkpoint download`. Every
token of every episode is then scored by the service, by transformers + peft over the adapter and by transformers over the
merged weights, in float32. peft and accelerate are needed beside the package (`pip install --target FOLDER --no-deps peft
accelerate`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
import polars as pl
import tinker
import torch
from safetensors.numpy import load_file
from tinker import types
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import searchr1_async as sr
from benchmarks.report import write_result
from searchr1_async.local import DEFAULT_MODEL, LocalService, local_service

WARM_UP = (
    "<|im_start|>user\nWhat is the capital of Chile?<|im_end|>\n<|im_start|>assistant\n<search>capital of Chile</search>",
    "<|im_start|>user\nWhich river flows through Vienna?<|im_end|>\n<|im_start|>assistant\n<answer>Danube</answer>",
)
TOLERANCE = 1e-3


async def trained(client: tinker.ServiceClient, service: LocalService, steps: int) -> tinker.TrainingClient:
    """An adapter after a few supervised steps: none of its matrices is zero any more."""
    tokenizer = await anyio.to_thread.run_sync(AutoTokenizer.from_pretrained, service.tokenizer_path)
    trainer = await client.create_lora_training_client(service.model_name, rank=16, seed=1)
    datums: list[types.Datum] = []
    for text in WARM_UP:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        count = len(tokens) - 1
        inputs = {
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[count]),
            "weights": types.TensorData(data=[1.0] * count, dtype="float32", shape=[count]),
        }
        datums.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    for _ in range(steps):
        await trainer.forward_backward(datums, "cross_entropy")
        await trainer.optim_step(types.AdamParams(learning_rate=1e-3))
    return trainer


async def play(service: LocalService, checkpoint: str, count: int) -> list[list[int]]:
    """The tokens of one episode of each of so many questions."""
    groups = await sr.rollout(
        sr.load_questions("atlas", split="held_out")[:count],
        sr.Search.local("atlas", n_results=1, max_passage_words=40),
        checkpoint=checkpoint,
        service=service.url,
        model=service.model_name,
        tokenizer=service.tokenizer_path,
        group_size=1,
        format="tags",
        max_turns=2,
        max_tokens=32,
        max_trajectory_tokens=512,
        seed=1,
        progress=False,
    )
    return [list(episode.tokens) for group in groups for episode in group.episodes]


def scored_by(load: Callable[[], Any], episodes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probabilities of every token but the first, by a model of transformers."""
    model = load().eval()
    out = []
    for tokens in episodes:
        ids_T = torch.tensor(list(tokens))
        with torch.inference_mode():
            logprobs_TV = model(input_ids=ids_T[None]).logits[0, :-1].log_softmax(-1)
        out.append(logprobs_TV.gather(1, ids_T[1:, None])[:, 0].numpy())
    return out


def with_peft(base: str, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))


def downloaded(path: str, folder: Path) -> Path:
    """The adapter as the SDK's command line downloads it."""
    command = [str(Path(sys.executable).with_name("tinker")), "checkpoint", "download", path, "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.rglob("adapter_model.safetensors"))


def is_same(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


async def measure(episodes: int, steps: int, threads: int, scratch: Path) -> pl.DataFrame:
    async with local_service(folder=scratch / "service", threads=threads, dtype="float32", device="cpu") as service:
        os.environ.update(TINKER_BASE_URL=service.url, TINKER_API_KEY=service.api_key)
        client = await anyio.to_thread.run_sync(tinker.ServiceClient)
        await anyio.to_thread.run_sync(lambda: client.holder)
        trainer = await trained(client, service, steps)
        state = (await trainer.save_state("agreement")).path
        weights = (await trainer.save_weights_for_sampler("agreement")).path
        sampler = await client.create_sampling_client(weights)
        played = await play(service, weights, episodes)
        expected = []
        for tokens in played:
            values = await sampler.compute_logprobs(types.ModelInput.from_ints(tokens))
            expected.append(np.array(values[1:], dtype=np.float64))
        base = service.tokenizer_path
        # The tokenizer lies with the weights: no hub is asked for it.
        peft = await sr.export(state, scratch / "peft", base_model=base)
        merged = await sr.export(state, scratch / "merged", format="merged", base_model=base)
        same = is_same(downloaded(state, scratch / "cli"), peft / "adapter_model.safetensors")
        await client.close("success")
    rows = []
    for name, load in (
        ("transformers + peft, exported adapter", partial(with_peft, base, peft)),
        ("transformers, merged folder", partial(AutoModelForCausalLM.from_pretrained, merged, dtype=torch.float32)),
        ("transformers, base model alone", partial(AutoModelForCausalLM.from_pretrained, base, dtype=torch.float32)),
    ):
        found = await anyio.to_thread.run_sync(scored_by, load, played)
        differences = np.abs(np.concatenate(found) - np.concatenate(expected))
        row = {"way": name, "episodes": len(played), "tokens": differences.size}
        rows.append(row | {"largest": float(differences.max()), "mean": float(differences.mean())})
    print(f"tinker checkpoint download gives the same matrices: {same}")
    return pl.DataFrame(rows).with_columns(download_is_same=pl.lit(same))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--steps", type=int, default=3, help="supervised steps (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="export-agreement-") as scratch:
        table = asyncio.run(measure(options.episodes, options.steps, options.threads, Path(scratch)))
    lines = [
        "| Against the service's log-probabilities | Episodes | Tokens | Largest difference | Mean difference |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {row['way']} | {row['episodes']} | {row['tokens']:,} | {row['largest']:.1e} | {row['mean']:.1e} |"
            for row in table.iter_rows(named=True)
        ),
    ]
    same = bool(table["download_is_same"][0])
    write_result(
        "export",
        "Exported weights against the service",
        [
            f"{DEFAULT_MODEL}, a LoRA adapter of rank 16 after {options.steps} supervised steps (the output "
            "head, which is tied, adapted too), float32 everywhere. Absolute differences in nats over every token of the "
            "episodes, prompts and passages included. The last row says how far the adapter is from the base model.",
            "\n".join(lines),
            f"The matrices that `tinker checkpoint download` brings are {'equal' if same else 'NOT equal'} to those of `export`.",
        ],
        table,
    )
    agreed = table.filter(~pl.col("way").str.contains("alone"))["largest"].max()
    return 0 if same and isinstance(agreed, float) and agreed < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
