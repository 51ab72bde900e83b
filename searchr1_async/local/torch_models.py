"""Loading of a language model for :mod:`~searchr1_async.local.torch_backend`, and the models of other architectures.

:class:`~searchr1_async.local.transformer.LeanTransformer` runs the architectures it supports. Any other causal model of
transformers runs its own forward pass, with LoRA updates added by hooks: correct but slow (one sequence at a time, no prefix
cache).
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from searchr1_async.errors import ModelError
from searchr1_async.local.backend import Datum, Int32Array, Thresholds
from searchr1_async.local.compat import has_onednn
from searchr1_async.local.lora import LoraAdapter, LoraSite, LoraWeights
from searchr1_async.local.machine import default_limit, plan
from searchr1_async.local.runner import LeanRunner, Owner, Prefilled, Runner, weights_of
from searchr1_async.local.sampler import Decoder
from searchr1_async.local.trainer import LeanTrainer, Loss, MicroBatchResult, Trainer, slope_of, with_sequence_ratio
from searchr1_async.local.transformer import LeanTransformer, is_lean, read_safetensors

logger = logging.getLogger(__name__)


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
    memory_limit: int
    """Bytes that the process, or the GPU's memory, may take."""


def load_engine(
    folder: Path, device: torch.device, dtype: torch.dtype, memory_bytes: int | None = None, max_rows: int | None = None
) -> Engine:
    """Loads a Hugging Face folder. Raises :class:`ModelError` if it cannot be read.

    ``memory_bytes``: see :func:`~searchr1_async.local.machine.plan`; ``max_rows``: distinct tokens of a training micro-batch, in place
    of the plan's.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        limit = memory_bytes if memory_bytes is not None else default_limit(device)
        if is_lean(config):
            model = _lean_model(folder, config, device, dtype)
            memory = plan(model.shape, model.parameters, device, dtype, packs=model.can_pack, limit=limit)
            logger.info("Memory: %s", memory)
            runner, trainer = LeanRunner(model, memory), LeanTrainer(model, max_rows=max_rows or memory.rows)
            sites = tuple(model.lora_sites())
        else:
            logger.info("%s models use the transformers forward pass, one sequence at a time", config.model_type)
            hooked, text = HookedModel(_load_model(folder, dtype).to(device)), config.get_text_config()
            trainer = GenericTrainer(hooked, vocabulary=text.vocab_size, context=text.max_position_embeddings)
            runner, sites = GenericRunner(hooked), hooked.sites
        ends = end_tokens(folder, config, tokenizer)
        return Engine(runner, trainer, sites, tokenizer, trainer.vocabulary, trainer.context, ends, device, limit)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {error}") from error


def _lean_model(folder: Path, config: Any, device: torch.device, dtype: torch.dtype) -> LeanTransformer:
    weights = read_safetensors(folder)
    if weights is None:
        weights = _load_model(folder, dtype).state_dict()
    weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    return LeanTransformer(config, weights, onednn=device.type == "cpu" and has_onednn(dtype))


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


def choose_device(device: str) -> torch.device:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch finds no CUDA device here; use 'auto' or 'cpu'.")
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU that has it, else float32.

    On a CPU bfloat16 trains faster with AMX or AVX-512 BF16, but sampler and trainer then differ by up to 0.07 nats a token: what is
    sampled is no longer the policy that is trained. That is for the user to choose.
    """
    if dtype != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if dtype not in known:
            raise ModelError(f"Unknown dtype {dtype!r}; use 'auto', 'float32' or 'bfloat16'.")
        return known[dtype]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


class HookedModel:
    """A frozen transformers model; inside :meth:`using` every linear layer adds the adapter's update."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._active: LoraWeights | LoraAdapter | None = None
        head = model.get_output_embeddings()  # type: ignore[operator]
        sites: list[LoraSite] = []
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                inputs, outputs = module.in_features, module.out_features
            elif isinstance(module, Conv1D):
                inputs, outputs = module.nx, module.nf
            else:
                continue
            attention = "attn" in path or "attention" in path
            kind = "unembed" if module is head else "attn" if attention else "mlp"
            sites.append(LoraSite(path, inputs, ((path, outputs),), kind))
            module.register_forward_hook(self._hook(path))
        if not sites:
            raise ModelError(f"{type(model).__name__} has no linear layer to adapt.")
        self.sites = tuple(sites)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def using(self, weights: LoraWeights | LoraAdapter | None) -> Iterator[nn.Module]:
        self._active = weights
        try:
            yield self.model
        finally:
            self._active = None

    def _hook(self, path: str) -> Any:
        def add_update(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            site = self._active.sites.get(path) if self._active else None
            if self._active is None or site is None:
                return output
            (x,) = inputs
            update = x @ site.a.to(x.dtype).t() @ site.b[0].to(x.dtype).t()
            return output + self._active.scale * update

        return add_update


@dataclass(eq=False, slots=True)
class _Handle:
    past: Any


class GenericRunner:
    """:class:`~searchr1_async.local.runner.Runner` over :class:`HookedModel`."""

    capacity = None
    free_rows = 1

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        # transformers 5.24 renamed the keyword and the output field, but only for some architectures.
        names = inspect.signature(model.model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    def shrink(self) -> None:
        """It caches nothing."""

    def give_back(self) -> None:
        """It holds nothing."""

    def cached(self, owner: Owner, prompt: Int32Array) -> int:
        return 0

    @torch.no_grad()
    def prefill(
        self, owner: Owner, prompts: Sequence[Int32Array], copies: Sequence[int], all_logits: bool
    ) -> list[Prefilled]:
        results = []
        for prompt, count in zip(prompts, copies, strict=True):
            logits, past = self._run(weights_of(owner), prompt, None)
            handles = [_Handle(past), *(_Handle(copy.deepcopy(past)) for _ in range(count - 1))]
            every = (lambda start, stop, logits=logits: logits[start:stop]) if all_logits else None
            results.append(Prefilled(tuple(handles[:count]), logits[-1], 0, every))
        return results

    @torch.no_grad()
    def decode(self, handles: Sequence[_Handle], tokens: Sequence[Sequence[int]], owners: Sequence[Owner]) -> Tensor:
        rows = []
        for handle, (token,), owner in zip(handles, tokens, owners, strict=True):
            logits, handle.past = self._run(weights_of(owner), np.array([token], np.int32), handle.past)
            rows.append(logits[-1])
        return torch.stack(rows)

    def accept(self, handle: _Handle, tokens: int) -> None:
        """It was given one token, which is right."""

    def finish(self, handle: _Handle, owner: Owner, tokens: Int32Array | None) -> None:
        handle.past = None

    def _run(self, owner: LoraWeights | None, tokens: Int32Array, past: Any) -> tuple[Tensor, Any]:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._model.device).unsqueeze(0)
        with self._model.using(owner) as model:
            output = model(input_ids=ids, use_cache=True, **{self._cache_name: past})
        return output.logits[0].float(), output[self._cache_name]


class GenericTrainer:
    """Micro-batches of one sequence, with plain autograd."""

    def __init__(self, model: HookedModel, *, vocabulary: int, context: int) -> None:
        self._model = model
        self.vocabulary = vocabulary
        self.context = context

    def batches(self, data: Sequence[Datum]) -> list[list[int]]:
        return [[index] for index in range(len(data))]

    def run(
        self, adapter: LoraAdapter, data: Sequence[Datum], loss: Loss, config: Thresholds, forward_only: bool
    ) -> MicroBatchResult:
        device, logprobs, total = self._model.device, [], 0.0
        for datum in data:
            ids = torch.from_numpy(datum.tokens.astype(np.int64)).to(device)
            targets = torch.from_numpy(np.asarray(datum.loss_inputs["target_tokens"], np.int64)).to(device)
            inputs = {
                name: torch.from_numpy(np.asarray(datum.loss_inputs[name], np.float32)).to(device)
                for name in loss.inputs.fields
            }
            with torch.set_grad_enabled(not forward_only), self._model.using(adapter) as model:
                logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
                lp = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
            if loss.inputs.is_sequential:
                inputs = with_sequence_ratio(inputs, lp, [len(lp)])
            value, slope = slope_of(lp.detach(), inputs, loss, config)
            if not forward_only and math.isfinite(value):
                torch.autograd.backward(lp, slope)
            logprobs.append(lp.detach().cpu().numpy())
            total += value
        return MicroBatchResult(logprobs, total)
