"""The embedded service's own transformer beside transformers and peft, on the same sampling and the same training.

    PYTHONPATH=FOLDER_WITH_PEFT python -m benchmarks lean_transformer

Each is loaded in a process of its own and measured in turn, so that both see the same machine. The sampler's load is requests of
96 prompt tokens, half of them common to all, and 64 new tokens; the trainer's is 4 prompts with 8 continuations each, as in
reinforcement learning. Goal: the own transformer stays if it is at least twice as fast.
Needs peft and accelerate (``pip install --target FOLDER_WITH_PEFT --no-deps peft accelerate``).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import polars as pl

from benchmarks.shared.report import write_result
from searchr1_async.local import DEFAULT_MODEL
from searchr1_async.local.model_files import resolve_model

PROMPT, NEW, GROUPS, GROUP = 96, 64, 4, 8
RANK = 16
OWN, LIBRARY = "own transformer", "transformers + peft"


def prompts(count: int, seed: int) -> np.ndarray:
    """Token ids [count, PROMPT]; the first half of each row is the same, like a system prompt."""
    random = np.random.default_rng(seed)
    tokens_BP = random.integers(100, 40_000, (count, PROMPT), dtype=np.int64)
    tokens_BP[:, : PROMPT // 2] = np.arange(1000, 1000 + PROMPT // 2)
    return tokens_BP


def batch(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [GROUPS * GROUP, PROMPT + NEW], old log-probabilities [.., NEW] and advantages [GROUPS * GROUP]."""
    random = np.random.default_rng(seed)
    new_BN = random.integers(100, 40_000, (GROUPS * GROUP, NEW), dtype=np.int64)
    tokens_BT = np.concatenate([prompts(GROUPS, seed).repeat(GROUP, 0), new_BN], 1)
    logprobs_BN = random.uniform(-12, -8, (GROUPS * GROUP, NEW)).astype(np.float32)
    return tokens_BT, logprobs_BN, random.uniform(-1, 1, GROUPS * GROUP).astype(np.float32)


class Contender(Protocol):
    def sample(self, prompts_BP: np.ndarray) -> int:
        """Samples NEW tokens after each prompt at temperature 1; returns their number."""
        ...

    def train(self, tokens_BT: np.ndarray, logprobs_BN: np.ndarray, advantages_B: np.ndarray) -> float:
        """Forward and backward of the importance-sampling loss, and an Adam step; returns the loss."""
        ...


class Own:
    """The embedded service's backend, in this process."""

    def __init__(self, model: str) -> None:
        from searchr1_async.local.backend import AdamParams, LoraConfig
        from searchr1_async.local.torch_backend import TorchBackend

        self._backend = TorchBackend.load(model, dtype="float32", device="cpu")
        self._adapter = self._backend.create_adapter(LoraConfig(RANK, seed=0, train_unembed=False)).result()
        self._adam = AdamParams(learning_rate=1e-4)
        self._weights = self._backend.snapshot(self._adapter).result()

    def sample(self, prompts_BP: np.ndarray) -> int:
        from searchr1_async.local.backend import SampleRequest

        requests = [SampleRequest(row.astype(np.int32), max_tokens=NEW, seed=1, stop_tokens=()) for row in prompts_BP]
        results = [self._backend.sample(self._weights, request) for request in requests]
        return sum(len(result.result().sequences[0].tokens) for result in results)

    def train(self, tokens_BT: np.ndarray, logprobs_BN: np.ndarray, advantages_B: np.ndarray) -> float:
        from searchr1_async.local.backend import Datum

        data = []
        for tokens, logprobs, advantage in zip(tokens_BT, logprobs_BN, advantages_B, strict=True):
            known, advantages = np.zeros((2, len(tokens) - 1), dtype=np.float32)
            known[-NEW:], advantages[-NEW:] = logprobs, advantage
            inputs = {"target_tokens": tokens[1:], "logprobs": known, "advantages": advantages}
            data.append(Datum(tokens[:-1].astype(np.int32), inputs))
        calls = self._backend.forward_backward(self._adapter, data, "importance_sampling", {}, False)
        self._backend.optim_step(self._adapter, self._adam).result()
        return calls.result().metrics["loss:sum"]


class Library:
    """``generate`` on a batch, and a padded training batch of a group at a time."""

    def __init__(self, model: str) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self._model: Any = get_peft_model(base, config)
        self._optimizer = torch.optim.Adam([p for p in self._model.parameters() if p.requires_grad], lr=1e-4)

    def sample(self, prompts_BP: np.ndarray) -> int:
        import torch

        self._model.eval()
        tokens_BP = torch.from_numpy(prompts_BP)
        with torch.inference_mode():
            answer_BT = self._model.generate(
                input_ids=tokens_BP,
                attention_mask=torch.ones_like(tokens_BP),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=NEW,
                max_new_tokens=NEW,
                pad_token_id=0,
            )
        return answer_BT[:, PROMPT:].numel()

    def train(self, tokens_BT: np.ndarray, logprobs_BN: np.ndarray, advantages_B: np.ndarray) -> float:
        import torch

        self._model.train()
        total = 0.0
        for begin in range(0, len(tokens_BT), GROUP):
            rows = slice(begin, begin + GROUP)
            tokens = torch.from_numpy(tokens_BT[rows])
            logits = self._model(input_ids=tokens[:, :-1], logits_to_keep=NEW).logits
            chosen = logits.log_softmax(-1).gather(-1, tokens[:, -NEW:, None])[..., 0]
            ratios = (chosen - torch.from_numpy(logprobs_BN[rows])).exp()
            loss = -(ratios * torch.from_numpy(advantages_B[rows])[:, None]).sum()
            loss.backward()
            total += loss.item()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


CONTENDERS: dict[str, Callable[[str], Contender]] = {OWN: Own, LIBRARY: Library}


def serve(name: str, model: str) -> None:
    """One contender: answers each line of standard input, a figure's name, with a figure."""
    contender = CONTENDERS[name](model)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for seed, line in enumerate(sys.stdin):
        figure, began = line.strip(), time.monotonic()
        if figure == "memory":
            value: Any = {"loaded": loaded, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        elif figure == "train":
            tokens_BT, logprobs_BN, advantages_B = batch(seed)
            began = time.monotonic()
            contender.train(tokens_BT, logprobs_BN, advantages_B)
            value = tokens_BT.size / (time.monotonic() - began)
        else:
            value = contender.sample(prompts(int(figure), seed)) / (time.monotonic() - began)
        print(json.dumps(value), flush=True)


class Process:
    def __init__(self, name: str, model: str) -> None:
        command = [sys.executable, "-m", "benchmarks", "lean_transformer", "--model", model, "--contender", name]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, figure: str) -> Any:
        """A figure of the contender, which is measured now."""
        assert self._child.stdin
        assert self._child.stdout
        print(figure, file=self._child.stdin, flush=True)
        if not (line := self._child.stdout.readline()):
            raise SystemExit(f"a contender ended: {self._child.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._child.stdin
        self._child.stdin.close()
        self._child.wait(30)


FIGURES = {
    "1": "sampled tokens/s, 1 request",
    "32": "sampled tokens/s, 32 requests at once",
    "train": "trained tokens/s, 4 groups of 8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help="serve one; used by the benchmark itself")
    options = parser.parse_args()
    if options.contender:
        serve(options.contender, options.model)
        return
    contenders = {name: Process(name, options.model) for name in CONTENDERS}
    found = [
        {"figure": figure, "contender": name, "round": round_, "value": contender.ask(figure)}
        for round_ in range(options.rounds + 1)
        for figure in FIGURES
        for name, contender in contenders.items()
    ]
    memory = {name: contender.ask("memory") for name, contender in contenders.items()}
    for contender in contenders.values():
        contender.close()
    table = pl.DataFrame([row for row in found if row["round"]])  # round 0 warms up
    lines = [
        f"| median of {options.rounds} rounds | {OWN} | {LIBRARY} | ratio (range over the rounds) |",
        "| --- " * 4 + "|",
    ]
    for figure, label in FIGURES.items():
        own, library = (table.filter(figure=figure, contender=name)["value"] for name in (OWN, LIBRARY))
        ratios = own / library
        lines.append(
            f"| {label} | {own.median():.1f} | {library.median():.1f} | {ratios.median():.2f} "
            f"({ratios.min():.2f} to {ratios.max():.2f}) |"
        )
    for key, label in (("loaded", "memory after loading, MB"), ("peak", "peak memory, MB")):
        lines.append(f"| {label} | {memory[OWN][key]:.0f} | {memory[LIBRARY][key]:.0f} | |")
    import peft

    body = [
        f"peft {peft.__version__}; float32, LoRA of rank {RANK} on all linear layers but the output.",
        "\n".join(lines),
    ]
    write_result("lean_transformer", "The own transformer beside transformers and peft", body, table)


if __name__ == "__main__":
    main()
