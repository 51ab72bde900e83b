"""Forward pass for Llama-like models (Llama, Mistral, Qwen 2 and 3), shared by the sampler and the trainer.

Tokens of all sequences are rows of one matrix [rows, hidden]; only the attention, passed in, maps rows to sequences.
Decode, prefill and training differ only in it, so their log-probabilities agree up to rounding.

Prefill and training pack sequences, so that each distinct (position, prefix) token is computed once: group members share
their prompt and all episodes the system prompt. A causal model's state depends only on the preceding tokens, so one row
serves all sequences that agree up to it, with the same log-probabilities and gradients.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from searchr1_async.errors import ModelError
from searchr1_async.local.backend import common_prefix_length
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
_QUERY_BLOCK = 512
"""Queries per block of attention: bounds the mask (queries times keys) and skips the keys after the block."""
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    vocabulary: int
    context: int


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

    def __init__(self, config: Any, weights: Mapping[str, Tensor], *, packed: bool) -> None:
        """``config``: transformers' configuration; ``weights``: a state dict with Hugging Face names."""
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.shape = Shape(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_size,
            config.hidden_size,
            config.vocab_size,
            config.max_position_embeddings,
        )
        self.eps = float(config.rms_norm_eps)
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        tied = config.tie_word_embeddings or "lm_head.weight" not in weights
        self.head = FrozenLinear(
            self.embedding if tied else weights["lm_head.weight"], weights.get("lm_head.bias"), packed=packed
        )
        self.layers = [self._layer(weights, f"model.layers.{i}.", packed) for i in range(self.shape.layers)]
        self._frequencies, self._rope_scale = _rope_frequencies(config, head_size)
        self._rope: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @staticmethod
    def _layer(weights: Mapping[str, Tensor], prefix: str, packed: bool) -> _Layer:
        def fused(*names: str) -> FrozenLinear:
            matrices = [weights[f"{prefix}{name}.weight"] for name in names]
            biases = [weights.get(f"{prefix}{name}.bias") for name in names]
            present = [bias for bias in biases if bias is not None]
            if present and len(present) != len(names):
                raise ModelError(f"Only some of {', '.join(names)} have a bias.")
            return FrozenLinear(
                matrices[0] if len(matrices) == 1 else torch.cat(matrices),
                torch.cat(present) if present else None,
                packed=packed,
            )

        return _Layer(
            weights[prefix + "input_layernorm.weight"],
            fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            weights.get(prefix + "self_attn.q_norm.weight"),
            weights.get(prefix + "self_attn.k_norm.weight"),
            fused("self_attn.o_proj"),
            weights[prefix + "post_attention_layernorm.weight"],
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
        cos, sin = self._rotations(positions)
        x = self.embedding[tokens]
        rotated = shape.heads + shape.kv_heads
        for i, layer in enumerate(self.layers):
            qkv = apply_lora(rms_norm(x, layer.attention_norm, self.eps), layer.qkv, f"{i}.qkv", lora)
            qkv = qkv.view(len(x), rotated + shape.kv_heads, shape.head_size)
            q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q = rotary(rms_norm(q, layer.q_norm, self.eps), cos, sin)
                k = rotary(rms_norm(k, layer.k_norm, self.eps), cos, sin)
            else:
                q, k = rotary(qkv[:, :rotated], cos, sin).split([shape.heads, shape.kv_heads], dim=1)
            x = x + apply_lora(attention(i, q, k, v), layer.output, f"{i}.output", lora)
            middle = swiglu(apply_lora(rms_norm(x, layer.mlp_norm, self.eps), layer.gate_up, f"{i}.gate_up", lora))
            x = x + apply_lora(middle, layer.down, f"{i}.down", lora)
        return rms_norm(x, self.norm, self.eps)

    @torch.no_grad()
    def logits(self, hidden: Tensor, lora: Sequence[LoraRows]) -> Tensor:
        """[rows, hidden] to [rows, vocabulary], in float32."""
        return apply_lora(hidden, self.head, "head", lora).float()

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._rope is None:
            angles = torch.outer(torch.arange(self.shape.context, dtype=torch.float32), self._frequencies)
            dtype = self.embedding.dtype
            self._rope = (
                (angles.cos() * self._rope_scale).to(self.device, dtype),
                (angles.sin() * self._rope_scale).to(self.device, dtype),
            )
        cos, sin = self._rope
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


def apply_lora(x: Tensor, linear: FrozenLinear, key: str, lora: Sequence[LoraRows]) -> Tensor:
    """One frozen product over all rows, plus each adapter's low-rank update on its rows."""
    if torch.is_grad_enabled() and isinstance(lora[0].weights, LoraAdapter):
        site = lora[0].weights.sites.get(key)
        if site is None:
            return InputGradLinear.apply(x, linear) if x.requires_grad else linear.forward(x)  # type: ignore[return-value]
        return LoraLinear.apply(x, linear, lora[0].weights.scale, site.a, *site.b)  # type: ignore[return-value]
    y = linear.forward(x)
    for part in lora:
        site = part.weights.sites.get(key)
        if site is not None:
            _add(y, x, site, part)
    return y


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


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows added by one sequence; they attend to ``context``, then causally to themselves."""

    start: int
    stop: int
    context: tuple[tuple[int, int], ...]
    """Row ranges [start, stop) of the preceding tokens, in order."""
    past: int | None = None
    """Index of the sequence whose cached tokens precede ``context``, if any."""
    past_length: int = 0


@dataclass(frozen=True, slots=True)
class PackedPrefix:
    """One sequence as cached tokens followed by row ranges."""

    past: int | None
    past_length: int
    ranges: tuple[tuple[int, int], ...]

    def cut(self, length: int) -> PackedPrefix:
        """The first ``length`` tokens."""
        ranges, left = [], length - self.past_length
        for start, stop in self.ranges:
            if left <= 0:
                break
            ranges.append((start, min(stop, start + left)))
            left -= stop - start
        kept = min(self.past_length, length)
        return PackedPrefix(self.past if kept else None, kept, tuple(ranges))

    def rows(self) -> Int64Array:
        """The row of each token after the cached ones."""
        return np.concatenate([np.arange(a, b) for a, b in self.ranges] or [np.empty(0, np.int64)]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Packed:
    tokens: Int64Array
    """[rows]"""
    positions: Int64Array
    """[rows]"""
    segments: tuple[Segment, ...]
    paths: tuple[PackedPrefix, ...]
    """One per sequence, in input order."""


def lexicographic_order(sequences: Sequence[NDArray[np.integer]]) -> list[int]:
    """Indices in lexicographic order, which makes sequences with a shared prefix neighbours."""
    # Big-endian bytes of non-negative integers compare as the integers do.
    keys = [np.ascontiguousarray(sequence, dtype=">i4").tobytes() for sequence in sequences]
    return sorted(range(len(sequences)), key=keys.__getitem__)


def pack(sequences: Sequence[NDArray[np.integer]], cached: Sequence[int] | None = None) -> Packed:
    """Pack ``sequences``; the first ``cached[i]`` tokens of each get no rows."""
    known = cached or [0] * len(sequences)
    paths: list[PackedPrefix | None] = [None] * len(sequences)
    segments: list[Segment] = []
    tokens: list[NDArray[np.integer]] = []
    positions: list[Int64Array] = []
    rows, previous = 0, -1
    for index in lexicographic_order(sequences):
        sequence, begin = sequences[index], known[index]
        prefix = PackedPrefix(index if begin else None, begin, ())
        if previous >= 0 and (shared := common_prefix_length(sequences[previous], sequence)) > begin:
            begin = shared
            before = paths[previous]
            assert before is not None
            prefix = before.cut(shared)
        new = len(sequence) - begin
        if new:
            segments.append(Segment(rows, rows + new, prefix.ranges, prefix.past, prefix.past_length))
            tokens.append(sequence[begin:])
            positions.append(np.arange(begin, len(sequence)))
            prefix = PackedPrefix(prefix.past, prefix.past_length, (*prefix.ranges, (rows, rows + new)))
        paths[index] = prefix
        rows += new
        previous = index
    return Packed(
        np.concatenate(tokens or [np.empty(0)]).astype(np.int64),
        np.concatenate(positions or [np.empty(0)]).astype(np.int64),
        tuple(segments),
        tuple(path for path in paths if path is not None),
    )


def micro_batches(sequences: Sequence[NDArray[np.integer]], max_rows: int) -> list[list[int]]:
    """Indices in batches of at most ``max_rows`` distinct tokens (a longer sequence gets its own batch)."""
    batches: list[list[int]] = []
    rows, previous = 0, -1
    for index in lexicographic_order(sequences):
        sequence = sequences[index]
        new = len(sequence)
        if batches:
            new -= common_prefix_length(sequences[previous], sequence)
        if not batches or rows + new > max_rows:
            batches.append([])
            rows, new = 0, len(sequence)
        batches[-1].append(index)
        rows += new
        previous = index
    return batches


class TreeAttention:
    """Each segment attends to its cached past, its preceding rows, and causally to itself."""

    def __init__(
        self, packed: Packed, shape: Shape, *, past: Mapping[int, Tensor] | None = None, keep: bool = False
    ) -> None:
        """``past[i]`` [2, layers, tokens, kv_heads, size]: cached keys and values of sequence i.

        ``keep`` collects every layer's keys and values in :attr:`kept`, each [rows, kv_heads, size].
        """
        self._segments = packed.segments
        self._lengths = [segment.stop - segment.start for segment in packed.segments]
        self._index = {segment.start: i for i, segment in enumerate(packed.segments)}
        self._past = past or {}
        self._groups = shape.heads // shape.kv_heads
        self._kv_heads = shape.kv_heads
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.kept: list[tuple[Tensor, Tensor]] | None = [] if keep else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kept is not None:
            self.kept.append((k, v))
        keys, values = k.split(self._lengths), v.split(self._lengths)
        outputs = [
            self._attend(queries, self._context(segment, layer, 0, keys), self._context(segment, layer, 1, values))
            for segment, queries in zip(self._segments, q.split(self._lengths), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _context(self, segment: Segment, layer: int, which: int, pieces: tuple[Tensor, ...]) -> Tensor:
        """All keys (``which`` 0) or values (1) visible to a segment, [1, kv_heads, tokens, size]."""
        parts = []
        if segment.past is not None:
            parts.append(self._past[segment.past][which, layer, : segment.past_length])
        for start, stop in (*segment.context, (segment.start, segment.stop)):
            piece = pieces[self._index[start]]
            parts.append(piece if len(piece) == stop - start else piece[: stop - start])
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tokens.transpose(0, 1).unsqueeze(0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, before = len(q), k.shape[2] - len(q)
        blocks = []
        for start in range(0, rows, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, rows)
            seen = before + stop
            block = q if rows <= _QUERY_BLOCK else q[start:stop]
            # Stack the heads of a key group as additional queries instead of repeating the keys.
            grouped = block.view(len(block), self._kv_heads, self._groups, -1).permute(1, 2, 0, 3)
            grouped = grouped.reshape(1, self._kv_heads, self._groups * len(block), -1)
            mask = None if len(block) == 1 else self._mask(len(block), seen, q)
            out = functional.scaled_dot_product_attention(grouped, k[:, :, :seen], v[:, :, :seen], attn_mask=mask)
            out = out.view(self._kv_heads, self._groups, len(block), -1).permute(2, 0, 1, 3)
            blocks.append(out.reshape(len(block), -1))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _mask(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """[groups · queries, keys]: causal, with the last query seeing every key."""
        mask = self._masks.get((queries, keys, like.dtype))
        if mask is None:
            square = torch.full((queries, keys), float("-inf"), dtype=like.dtype, device=like.device)
            mask = square.triu_(keys - queries + 1).repeat(self._groups, 1)
            self._masks[queries, keys, like.dtype] = mask
        return mask
