"""The embedded service's own transformer beside transformers + peft and llama.cpp, on the same sampling and the same training.

    PYTHONPATH=FOLDER python -m benchmarks lean_transformer

Each is loaded in a process of its own and measured in turn, so that all see the same machine. The sampler's load is requests of
96 prompt tokens, half of them common to all, and 64 new tokens at temperature 1 with their log-probabilities; the trainer's is 4
prompts with 8 continuations each, as in reinforcement learning. llama.cpp only samples. All have a LoRA adapter, float32 weights and
one thread per core. Goal: the own transformer stays if it is at least twice as fast.

FOLDER has the libraries; a contender whose library is missing is left out. llama-cpp-python is compiled for this machine, which needs
a C++ compiler and about 8 minutes of CPU time:

    pip install --target FOLDER --no-deps peft accelerate
    CMAKE_ARGS=-DLLAVA_BUILD=OFF pip install --target FOLDER --no-deps llama-cpp-python diskcache
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from benchmarks.shared.report import write_result
from searchr1_async.local import DEFAULT_MODEL
from searchr1_async.local.model_files import resolve_model

PROMPT, NEW, GROUPS, GROUP = 96, 64, 4, 8
RANK = 16
OWN, LIBRARY, LLAMA = "own transformer", "transformers + peft", "llama.cpp"
NEEDS = {LIBRARY: ("peft", "peft"), LLAMA: ("llama_cpp", "llama-cpp-python")}
"""A contender's module and the package that has it."""
SETTINGS = {LLAMA: {"OMP_WAIT_POLICY": "passive"}}
"""A contender's environment. llama.cpp's threads else spin while they wait: beside other work a token took ten times as long."""
LARGEST = 64
"""The most requests at once."""


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
    def sample(self, prompts_BP: np.ndarray) -> np.ndarray:
        """Samples NEW tokens after each prompt at temperature 1; returns their log-probabilities [len(prompts_BP), NEW]."""
        ...

    def train(self, tokens_BT: np.ndarray, logprobs_BN: np.ndarray, advantages_B: np.ndarray) -> float | None:
        """Forward and backward of the importance-sampling loss, and an Adam step; returns the loss, None if it cannot train."""
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

    def sample(self, prompts_BP: np.ndarray) -> np.ndarray:
        from searchr1_async.local.backend import SampleRequest

        requests = [SampleRequest(row.astype(np.int32), max_tokens=NEW, seed=1, stop_tokens=()) for row in prompts_BP]
        results = [self._backend.sample(self._weights, request) for request in requests]
        return np.stack([result.result().sequences[0].logprobs for result in results])

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

    def sample(self, prompts_BP: np.ndarray) -> np.ndarray:
        import torch

        self._model.eval()
        tokens_BP = torch.from_numpy(prompts_BP)
        with torch.inference_mode():
            answer = self._model.generate(
                input_ids=tokens_BP,
                attention_mask=torch.ones_like(tokens_BP),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=NEW,
                max_new_tokens=NEW,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            columns = zip(answer.logits, answer.sequences[:, PROMPT:].split(1, 1), strict=True)
            return torch.cat([logits.log_softmax(-1).gather(1, chosen) for logits, chosen in columns], 1).numpy()

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


def write_gguf(folder: Path, model: Path, adapter: Path) -> None:
    """The Hugging Face Llama in ``folder`` as llama.cpp reads it, in float32, and an adapter of rank RANK with zero B's.

    llama.cpp rotates adjacent rows of Q and K, Hugging Face rows half a head apart.
    """
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    base, lora = gguf.GGUFWriter(model, "llama"), gguf.GGUFWriter(adapter, "llama")
    base.add_tokenizer_model("no_vocab")
    base.add_vocab_size(config["vocab_size"])
    base.add_context_length(config["max_position_embeddings"])
    base.add_embedding_length(config["hidden_size"])
    base.add_block_count(config["num_hidden_layers"])
    base.add_feed_forward_length(config["intermediate_size"])
    base.add_head_count(config["num_attention_heads"])
    base.add_head_count_kv(config["num_key_value_heads"])
    base.add_layer_norm_rms_eps(config["rms_norm_eps"])
    base.add_rope_freq_base(config["rope_theta"])
    lora.add_type("adapter")
    lora.add_string("adapter.type", "lora")
    lora.add_float32("adapter.lora.alpha", 32.0)
    random = np.random.default_rng(0)
    with safe_open(folder / "model.safetensors", "np") as weights:
        for path in weights.keys():  # noqa: SIM118, not a dictionary
            name, weight = str(names.get_name(path, (".weight",))), weights.get_tensor(path)
            if count := heads.get(".".join(path.rsplit(".", 2)[1:])):
                halves = weight.reshape(count, 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
            base.add_tensor(name, weight)
            if "_proj" in path:
                bound = weight.shape[1] ** -0.5
                a = random.uniform(-bound, bound, (RANK, weight.shape[1])).astype(np.float32)
                lora.add_tensor(f"{name}.lora_a", a)
                lora.add_tensor(f"{name}.lora_b", np.zeros((len(weight), RANK), np.float32))
    for writer in (base, lora):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


class LlamaCpp:
    """llama.cpp by its C interface: requests are the sequences of one batch, and begin as copies of the common prefix.

    Keys and values are float32, without flash attention: either of the library's defaults (float16, flash attention where it can)
    moves log-probabilities by up to 0.024. The service's own sampler chooses the tokens, since it would do so in the service too.
    """

    def __init__(self, model: str) -> None:
        import llama_cpp
        import torch

        self._api: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept, since C calls it
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder, "model.gguf"), Path(folder, "adapter.gguf")
            write_gguf(resolve_model(model), *files)
            weights = self._api.llama_model_load_from_file(bytes(files[0]), llama_cpp.llama_model_default_params())
            adapter = self._api.llama_adapter_lora_init(weights, bytes(files[1]))
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = LARGEST + 1
        options.n_ctx = options.n_batch = options.n_seq_max * (PROMPT + NEW)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        torch.set_num_threads(1)  # a second pool of threads that wait actively would take the cores from llama.cpp's
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._api.llama_init_from_model(weights, options)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        self._api.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))
        self._memory = self._api.llama_get_memory(self._context)
        self._batch: Any = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        self._vocabulary = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(weights))
        self._decode(prompts(1, 0)[:, : PROMPT // 2], 0, LARGEST)

    def _decode(self, tokens_BT: np.ndarray, begin: int, sequence: int = 0) -> np.ndarray:
        """Appends tokens at position ``begin`` of the sequences from ``sequence`` on; returns next-token logits [B, vocabulary]."""
        count, length = tokens_BT.shape
        batch = self._batch
        batch.n_tokens = tokens_BT.size
        for row, token in enumerate(tokens_BT.ravel().tolist()):
            batch.token[row] = token
            batch.pos[row] = begin + row % length
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence + row // length
            batch.logits[row] = row % length == length - 1
        if error := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed: {error}")
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (count, self._vocabulary))

    def sample(self, prompts_BP: np.ndarray) -> np.ndarray:
        import torch

        from searchr1_async.local.sampler import ChoiceRule, choose

        random = np.random.default_rng(1)
        for sequence in range(len(prompts_BP)):
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self._api.llama_memory_seq_cp(self._memory, LARGEST, sequence, -1, -1)
        new_BT, begin = prompts_BP[:, PROMPT // 2 :], PROMPT // 2
        logprobs_NB = []
        while len(logprobs_NB) < NEW:
            logits = torch.from_numpy(self._decode(new_BT, begin))
            chosen = choose(logits, [ChoiceRule(1.0, -1, 1.0, random.random()) for _ in prompts_BP])
            begin += new_BT.shape[1]
            new_BT = chosen.tokens[:, None]
            logprobs_NB.append(chosen.logprobs)
        return np.stack(logprobs_NB, 1)

    def train(self, tokens_BT: np.ndarray, logprobs_BN: np.ndarray, advantages_B: np.ndarray) -> None:
        return None


CONTENDERS: dict[str, Callable[[str], Contender]] = {OWN: Own, LIBRARY: Library, LLAMA: LlamaCpp}


def serve(name: str, model: str) -> None:
    """One contender: answers each line of standard input, a figure's name, with a figure (null if it has none)."""
    contender = CONTENDERS[name](model)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for seed, line in enumerate(sys.stdin):
        figure, value = line.strip(), None
        if figure == "memory":
            value = {"loaded": loaded, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        elif figure == "train":
            examples = batch(seed)
            began = time.monotonic()
            if contender.train(*examples) is not None:
                value = examples[0].size / (time.monotonic() - began)
        else:
            prompts_BP = prompts(int(figure), seed)
            began = time.monotonic()
            logprobs_BN = contender.sample(prompts_BP)
            value = logprobs_BN.size / (time.monotonic() - began)
            if logprobs_BN.shape != (len(prompts_BP), NEW) or not np.isfinite(logprobs_BN).all():
                raise ValueError(f"{name}: log-probabilities {logprobs_BN.shape}, not all of them finite")
        print(json.dumps(value), flush=True)


class Process:
    def __init__(self, name: str, model: str) -> None:
        command = [sys.executable, "-m", "benchmarks", "lean_transformer", "--model", model, "--contender", name]
        environment = os.environ | SETTINGS.get(name, {})
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

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


FIGURES = {str(count): f"sampled tokens/s, {count} requests at once" for count in (1, 8, 32, LARGEST)}
FIGURES["train"] = f"trained tokens/s, {GROUPS} groups of {GROUP}"


def table_lines(table: pl.DataFrame, memory: dict[str, dict[str, float]]) -> list[str]:
    """Medians of each contender, and the ratios of the own transformer to each other within a round, as a Markdown table.

    Args:
        table: columns ``figure``, ``contender``, ``round`` and ``value``, without the rounds that warm up.
        memory: each contender's megabytes ``loaded`` and at their ``peak``.
    """
    others = [name for name in memory if name != OWN]
    rows = [["median", *memory, *(f"own / {name}: median (range)" for name in others)]]
    rows.append(["---"] * len(rows[0]))
    for figure, label in FIGURES.items():
        values = {name: table.filter(figure=figure, contender=name)["value"] for name in memory}
        ratios = [values[OWN] / values[name] for name in others]
        rows.append([label, *("" if each.median() is None else f"{each.median():.1f}" for each in values.values())])
        rows[-1] += [
            "" if each.median() is None else f"{each.median():.2f} ({each.min():.2f} to {each.max():.2f})"
            for each in ratios
        ]
    for key, label in (("loaded", "memory after loading, MB"), ("peak", "peak memory, MB")):
        rows.append([label, *(f"{each[key]:.0f}" for each in memory.values()), *("" for _ in others)])
    return [f"| {' | '.join(row)} |" for row in rows]


def installed() -> dict[str, str]:
    """The contenders whose library is here, each with its library and version; says which are left out."""
    found = {OWN: ""}
    for name, (module, package) in NEEDS.items():
        if importlib.util.find_spec(module):
            found[name] = f"{package} {importlib.metadata.version(package)}"
        else:
            print(f"{name} is left out: {package} is not on PYTHONPATH; --help says how to install it.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help="serve one; used by the benchmark itself")
    options = parser.parse_args()
    if options.contender:
        serve(options.contender, options.model)
        return
    libraries = installed()
    contenders = {name: Process(name, options.model) for name in libraries}
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
    versions = ", ".join(filter(None, libraries.values()))
    body = [
        f"{versions}; {options.rounds} rounds; float32, LoRA of rank {RANK} on all linear layers but the output.",
        "\n".join(table_lines(table, memory)),
    ]
    write_result("lean_transformer", "The own transformer beside transformers + peft and llama.cpp", body, table)


if __name__ == "__main__":
    main()
