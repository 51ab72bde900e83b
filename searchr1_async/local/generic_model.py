"""Any causal model of transformers: its own forward pass, with LoRA updates added by hooks.

Correct but slow (one sequence at a time, no prefix cache), for architectures that
:class:`~searchr1_async.local.transformer.LeanTransformer` does not support.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from searchr1_async.errors import ModelError
from searchr1_async.local.backend import Datum, Int32Array, Thresholds
from searchr1_async.local.lora import LoraAdapter, LoraSite, LoraWeights
from searchr1_async.local.runner import Owner, Prefilled, weights_of
from searchr1_async.local.trainer import Loss, MicroBatchResult, slope_of, with_sequence_ratio


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

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        # transformers 5.24 renamed the keyword and the output field, but only for some architectures.
        names = inspect.signature(model.model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

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
    def decode(self, handles: Sequence[_Handle], tokens: Sequence[int], owners: Sequence[Owner]) -> Tensor:
        rows = []
        for handle, token, owner in zip(handles, tokens, owners, strict=True):
            logits, handle.past = self._run(weights_of(owner), np.array([token], np.int32), handle.past)
            rows.append(logits[-1])
        return torch.stack(rows)

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
