"""Forward pass for Llama-like models (Llama, Mistral, Qwen 2 and 3), shared by the sampler and the trainer.

Tokens of all sequences are rows of one matrix [rows, hidden]; only the attention, passed in, maps rows to sequences.
Decode, prefill and training differ only in it, so their log-probabilities agree up to rounding.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from searchr1_async.errors import ModelError
from searchr1_async.local.lora import (
    FrozenLinear,
    InputGradLinear,
    LoraAdapter,
    LoraLinear,
    LoraSite,
    LoraWeights,
    SiteWeights,
    add_low_rank,
    rms_norm,
    rotary,
    swiglu,
)

LEAN_ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    context: int
    middle: int
    """Outputs of the gate and of the up projection."""

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * dtype.itemsize

    def activation_bytes(self, dtype: torch.dtype) -> int:
        """What training keeps of one token for the backward pass.

        Of each layer: the two inputs of its norms, the gate and the up projection, the queries and the attention's output (twice),
        the keys and values, which each sequence of a group has with its own copy of the common prefix (counted as long as the rest).
        """
        attention = (3 * self.heads + 4 * self.kv_heads) * self.head_size
        return self.layers * (2 * self.hidden + attention + 2 * self.middle) * dtype.itemsize


class Attention(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` [rows, heads, size], ``k`` and ``v`` [rows, kv_heads, size], rotated. Returns [rows, heads · size]."""
        ...


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Rows that one adapter applies to; ``rows`` None means all."""

    weights: LoraWeights | LoraAdapter
    rows: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: FrozenLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: FrozenLinear
    mlp_norm: Tensor
    gate_up: FrozenLinear
    down: FrozenLinear


class LeanTransformer:
    """Frozen weights and their forward pass."""

    def __init__(self, config: Any, weights: Mapping[str, Tensor], *, onednn: bool) -> None:
        """``config``: transformers' configuration; ``weights``: a state dict with Hugging Face names.

        It keeps copies: the weights' file, if it is mapped into memory, can be closed.
        """
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.shape = Shape(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_size,
            config.hidden_size,
            config.vocab_size,
            config.max_position_embeddings,
            config.intermediate_size,
        )
        self.eps = float(config.rms_norm_eps)
        self.embedding = weights["model.embed_tokens.weight"].clone()
        self.norm = weights["model.norm.weight"].clone()
        tied = config.tie_word_embeddings or "lm_head.weight" not in weights
        head = self.embedding if tied else weights["lm_head.weight"].clone()
        self.head = FrozenLinear(head, _copy(weights.get("lm_head.bias")), onednn=onednn)
        self.layers = [self._layer(weights, f"model.layers.{i}.", onednn) for i in range(self.shape.layers)]
        self.can_pack = onednn
        # Rounded to half precision, merged weights would lose most of a small update.
        self.can_merge = onednn and self.embedding.dtype == torch.float32
        self._base_is_packed = False
        self._packed_adapter: Callable[[], LoraWeights | None] = _no_adapter
        self._frequencies, self._rope_scale = _rope_frequencies(config, head_size)
        self._rope: tuple[Tensor, Tensor] | None = None

    @property
    def parameters(self) -> int:
        """Numbers in the weights."""
        matrices = {id(linear.weight): linear.weight for _, linear in self._linears()} | {
            id(self.embedding): self.embedding
        }
        return sum(matrix.numel() for matrix in matrices.values())

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @staticmethod
    def _layer(weights: Mapping[str, Tensor], prefix: str, onednn: bool) -> _Layer:
        def fused(*names: str) -> FrozenLinear:
            matrices = [weights[f"{prefix}{name}.weight"] for name in names]
            biases = [weights.get(f"{prefix}{name}.bias") for name in names]
            present = [bias for bias in biases if bias is not None]
            if present and len(present) != len(names):
                raise ModelError(f"Only some of {', '.join(names)} have a bias.")
            return FrozenLinear(torch.cat(matrices), torch.cat(present) if present else None, onednn=onednn)

        return _Layer(
            weights[prefix + "input_layernorm.weight"].clone(),
            fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            _copy(weights.get(prefix + "self_attn.q_norm.weight")),
            _copy(weights.get(prefix + "self_attn.k_norm.weight")),
            fused("self_attn.o_proj"),
            weights[prefix + "post_attention_layernorm.weight"].clone(),
            fused("mlp.gate_proj", "mlp.up_proj"),
            fused("mlp.down_proj"),
        )

    def lora_sites(self) -> Iterator[LoraSite]:
        shape = self.shape
        query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        for i, layer in enumerate(self.layers):
            path = f"model.layers.{i}."
            middle = layer.down.in_features
            yield LoraSite(
                f"{i}.qkv",
                shape.hidden,
                (
                    (path + "self_attn.q_proj", query),
                    (path + "self_attn.k_proj", key),
                    (path + "self_attn.v_proj", key),
                ),
                "attn",
            )
            yield LoraSite(f"{i}.output", query, ((path + "self_attn.o_proj", shape.hidden),), "attn")
            yield LoraSite(
                f"{i}.gate_up",
                shape.hidden,
                ((path + "mlp.gate_proj", middle), (path + "mlp.up_proj", middle)),
                "mlp",
            )
            yield LoraSite(f"{i}.down", middle, ((path + "mlp.down_proj", shape.hidden),), "mlp")
        yield LoraSite("head", shape.hidden, (("lm_head", self.head.out_features),), "unembed")

    def hidden(self, tokens: Tensor, positions: Tensor, attention: Attention, lora: Sequence[LoraRows]) -> Tensor:
        """Final normed states [rows, hidden] of ``tokens`` [rows] at ``positions`` [rows].

        With gradients enabled, ``lora`` must be one trainable adapter for all rows.
        """
        shape = self.shape
        cos, sin = self.rotations(positions)
        x = self.embedding[tokens]
        rotated = shape.heads + shape.kv_heads
        for i, layer in enumerate(self.layers):
            norm = partial(rms_norm, weight=layer.attention_norm, eps=self.eps)
            qkv = self._linear(x, layer.qkv, f"{i}.qkv", lora, before=norm)
            qkv = qkv.view(len(x), rotated + shape.kv_heads, shape.head_size)
            q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q = rotary(rms_norm(q, layer.q_norm, self.eps), cos, sin)
                k = rotary(rms_norm(k, layer.k_norm, self.eps), cos, sin)
            else:
                q, k = rotary(qkv[:, :rotated], cos, sin).split([shape.heads, shape.kv_heads], dim=1)
            x = x + self._linear(attention(i, q, k, v), layer.output, f"{i}.output", lora)
            norm = partial(rms_norm, weight=layer.mlp_norm, eps=self.eps)
            gate_up = self._linear(x, layer.gate_up, f"{i}.gate_up", lora, before=norm)
            x = x + self._linear(gate_up, layer.down, f"{i}.down", lora, before=swiglu)
        return rms_norm(x, self.norm, self.eps)

    @torch.no_grad()
    def logits(self, hidden: Tensor, lora: Sequence[LoraRows]) -> Tensor:
        """[rows, hidden] to [rows, vocabulary], in float32."""
        return self._linear(hidden, self.head, "head", lora).float()

    def pack(self, adapter: LoraWeights | None) -> None:
        """Makes the copies that sampling multiplies by: of the base model, or of it with ``adapter`` merged.

        They take as much memory as the weights, and products of few rows half the time. A merged adapter costs no products of its own.
        """
        self._base_is_packed, self._packed_adapter = False, _no_adapter
        for key, linear in self._linears():
            linear.pack(adapter.sites.get(key) if adapter else None, adapter.scale if adapter else 1.0)
        self._base_is_packed = adapter is None
        if adapter is not None:
            self._packed_adapter = weakref.ref(adapter)

    @property
    def has_packed(self) -> bool:
        """Whether :meth:`pack` was called, even if its adapter is gone."""
        return self.head.is_packed

    def is_packed(self, adapter: LoraWeights | None) -> bool:
        """Whether :meth:`pack` was last called for it."""
        return self._base_is_packed if adapter is None else self._packed_adapter() is adapter

    def _linears(self) -> Iterator[tuple[str, FrozenLinear]]:
        for i, layer in enumerate(self.layers):
            yield f"{i}.qkv", layer.qkv
            yield f"{i}.output", layer.output
            yield f"{i}.gate_up", layer.gate_up
            yield f"{i}.down", layer.down
        yield "head", self.head

    def _linear(
        self,
        source: Tensor,
        linear: FrozenLinear,
        key: str,
        lora: Sequence[LoraRows],
        before: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One frozen product over all rows, plus each adapter's low-rank update on its rows.

        With ``before``, a function that takes little time, the input is ``before(source)``: training does not keep it.
        """
        x = before(source) if before else source
        if torch.is_grad_enabled() and isinstance(lora[0].weights, LoraAdapter):
            site = lora[0].weights.sites.get(key)
            if site is None:
                return InputGradLinear.apply(x, linear) if x.requires_grad else linear.forward(x)  # type: ignore[return-value]
            return LoraLinear.apply(x, source, before, linear, lora[0].weights.scale, site.a, *site.b)  # type: ignore[return-value]
        if len(lora) == 1 and lora[0].rows is None and lora[0].weights is self._packed_adapter():
            return linear.forward_packed(x)
        y = linear.forward_packed(x) if self._base_is_packed else linear.forward(x)
        for part in lora:
            site = part.weights.sites.get(key)
            if site is not None:
                _add(y, x, site, part)
        return y

    def rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [rows, 1, size / 2]."""
        if self._rope is None:
            angles = torch.outer(torch.arange(self.shape.context, dtype=torch.float32), self._frequencies)
            dtype = self.embedding.dtype
            self._rope = (
                (angles.cos() * self._rope_scale).to(self.device, dtype),
                (angles.sin() * self._rope_scale).to(self.device, dtype),
            )
        cos, sin = self._rope
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


def _no_adapter() -> None:
    """In place of a reference: no adapter is merged."""


def _copy(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.clone()


def _add(y: Tensor, x: Tensor, site: SiteWeights, part: LoraRows) -> None:
    if part.rows is None:
        add_low_rank(y, x @ site.a.to(x.dtype).t(), site.b, part.weights.scale)
        return
    update = torch.zeros(len(part.rows), y.shape[1], dtype=y.dtype, device=y.device)
    add_low_rank(update, x[part.rows] @ site.a.to(x.dtype).t(), site.b, part.weights.scale)
    y.index_add_(0, part.rows, update)


def _rope_frequencies(config: Any, head_size: int) -> tuple[Tensor, float]:
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        theta = float(parameters.get("rope_theta") or getattr(config, "rope_theta", 10000.0))
        exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
        return 1.0 / theta**exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.float(), float(scale)


def is_lean(config: Any) -> bool:
    """Whether :class:`LeanTransformer` computes this configuration exactly."""
    parameters = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        window = None
    return (
        config.model_type in LEAN_ARCHITECTURES
        and config.hidden_act == "silu"
        and parameters.get("rope_type", "default") in {"default", "linear", "llama3"}
        and parameters.get("partial_rotary_factor", 1.0) in {None, 1.0}
        and (window is None or window >= config.max_position_embeddings)
    )


def read_safetensors(folder: Path) -> dict[str, Tensor] | None:
    """A Hugging Face folder's state dict, or None if its weights are not safetensors."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    if not all((folder / file).is_file() for file in files):
        return None
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(folder / file)
    return weights
