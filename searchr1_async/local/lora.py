"""LoRA: adapters (layout, weights, gradients, checkpoint names), and the operations of a model whose own weights are frozen.

Each operation has the cheapest backward pass that frozen weights allow.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from searchr1_async.local.backend import LoraConfig, UserFault
from searchr1_async.local.compat import onednn_linear, packed
from searchr1_async.local.model_files import LORA_ALPHA, matrix_name

_MEAN, _SQUARE, _STEP = "optimizer.mean.", "optimizer.square.", "optimizer.step"


@dataclass(frozen=True, slots=True)
class LoraSite:
    """Projections with a shared input and thus one stacked A; each has its own B."""

    key: str
    """The model's lookup key: ``3.qkv``, ``head``, …"""
    in_features: int
    parts: tuple[tuple[str, int], ...]
    """Hugging Face module path and output size."""
    kind: str
    """``attn``, ``mlp`` or ``unembed``: the :class:`LoraConfig` flag that enables it."""


@dataclass(frozen=True, slots=True)
class SiteWeights:
    a: Tensor
    """[parts · rank, in]: the parts' A's, stacked."""
    b: tuple[Tensor, ...]
    """[out, rank] per part."""


class LoraLayout:
    """An adapter's sites and the offset of each matrix in one flat vector.

    With one vector, snapshot, clipping and optimizer step are a few operations regardless of depth.
    """

    def __init__(self, sites: Sequence[LoraSite], config: LoraConfig) -> None:
        switched = {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": config.train_unembed}
        self.config = config
        self.sites = tuple(site for site in sites if switched[site.kind])
        if not self.sites:
            raise UserFault("lora_config trains nothing that this model has.")
        self.scale = LORA_ALPHA / config.rank
        self.names: dict[str, tuple[int, tuple[int, int]]] = {}
        """PEFT matrix name to offset and shape. A site's A's are adjacent, in the order of its parts."""
        offset = 0
        for site in self.sites:
            shapes = [(path, "A", (config.rank, site.in_features)) for path, _ in site.parts]
            shapes += [(path, "B", (out, config.rank)) for path, out in site.parts]
            for path, letter, shape in shapes:
                self.names[matrix_name(path, letter)] = (offset, shape)
                offset += shape[0] * shape[1]
        self.size = offset

    def views(self, flat: Tensor) -> dict[str, SiteWeights]:
        """Each site's matrices as views of ``flat`` [size]."""
        rank, offset, views = self.config.rank, 0, {}

        def take(rows: int, columns: int) -> Tensor:
            nonlocal offset
            view = flat[offset : offset + rows * columns].view(rows, columns)
            offset += rows * columns
            return view

        for site in self.sites:
            a = take(len(site.parts) * rank, site.in_features)
            views[site.key] = SiteWeights(a, tuple(take(out, rank) for _, out in site.parts))
        return views

    def initial(self) -> Tensor:
        """A's uniform in ±1/sqrt(in) (kaiming-uniform with a = sqrt(5)), B's zero."""
        seed = self.config.seed if self.config.seed is not None else secrets.randbits(62)
        generator = torch.Generator().manual_seed(seed % 2**63)
        flat = torch.zeros(self.size)
        for site in self.views(flat).values():
            bound = 1.0 / math.sqrt(site.a.shape[1])
            site.a.uniform_(-bound, bound, generator=generator)
        return flat

    def to_state(self, flat: Tensor, prefix: str = "") -> dict[str, NDArray[Any]]:
        array = flat.detach().cpu().numpy()
        return {
            prefix + name: array[offset : offset + rows * columns].reshape(rows, columns).copy()
            for name, (offset, (rows, columns)) in self.names.items()
        }

    def from_state(self, state: Mapping[str, NDArray[Any]], prefix: str = "") -> Tensor:
        """The flat vector from named matrices. Raises :class:`UserFault` if one is missing or has the wrong shape."""
        flat = np.empty(self.size, dtype=np.float32)
        for name, (offset, shape) in self.names.items():
            matrix = state.get(prefix + name)
            if matrix is None or matrix.shape != shape:
                found = "is missing" if matrix is None else f"has shape {list(matrix.shape)}"
                raise UserFault(
                    f"The checkpoint does not fit this model and lora_config: {prefix + name} {found}, "
                    f"expected {list(shape)}."
                )
            flat[offset : offset + matrix.size] = matrix.reshape(-1)
        return torch.from_numpy(flat)


class LoraWeights:
    """Immutable sampler weights (a snapshot). Compared by identity."""

    def __init__(self, layout: LoraLayout, flat: Tensor) -> None:
        self.layout = layout
        self.flat = flat
        self.sites = layout.views(flat)

    @property
    def scale(self) -> float:
        return self.layout.scale


class LoraAdapter:
    """Trainable weights, gradients and Adam moments, each one flat vector."""

    def __init__(self, layout: LoraLayout, flat: Tensor) -> None:
        self.layout = layout
        self.flat = flat
        self.gradient = torch.zeros_like(flat)
        self.gradient_is_zero = True
        self.step = 0

    @property
    def lora(self) -> LoraConfig:
        return self.layout.config

    @property
    def scale(self) -> float:
        return self.layout.scale

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Adam's running means of the gradient and its square."""
        return torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    @cached_property
    def sites(self) -> dict[str, SiteWeights]:
        """Autograd leaves that share memory with ``flat``; their gradients share memory with ``gradient``."""
        weights, gradients = self.layout.views(self.flat), self.layout.views(self.gradient)
        return {
            key: SiteWeights(
                _leaf(site.a, gradients[key].a),
                tuple(_leaf(b, g) for b, g in zip(site.b, gradients[key].b, strict=True)),
            )
            for key, site in weights.items()
        }

    def clear_gradient(self) -> None:
        self.gradient.zero_()
        self.gradient_is_zero = True

    def frozen_copy(self) -> LoraWeights:
        return LoraWeights(self.layout, self.flat.clone())

    def export(self, optimizer: bool) -> dict[str, NDArray[Any]]:
        """The weights by PEFT name and, with ``optimizer``, Adam's moments and step count."""
        state = self.layout.to_state(self.flat)
        if optimizer:
            mean, square = self.moments
            state |= self.layout.to_state(mean, _MEAN) | self.layout.to_state(square, _SQUARE)
            state[_STEP] = np.array([self.step], dtype=np.int64)
        return state

    @classmethod
    def restore(
        cls, layout: LoraLayout, state: Mapping[str, NDArray[Any]], optimizer: bool, device: torch.device
    ) -> LoraAdapter:
        """The inverse of :meth:`export`; without ``optimizer`` the moments start at zero.

        Raises :class:`UserFault` if the state does not fit or lacks the requested moments.
        """
        adapter = cls(layout, layout.from_state(state).to(device))
        if optimizer:
            if _STEP not in state:
                raise UserFault("The checkpoint has no optimizer state; load it without the optimizer.")
            mean, square = adapter.moments
            mean.copy_(layout.from_state(state, _MEAN))
            square.copy_(layout.from_state(state, _SQUARE))
            adapter.step = int(state[_STEP][0])
        return adapter


def _leaf(view: Tensor, gradient: Tensor) -> Tensor:
    leaf = view.detach().requires_grad_()
    leaf.grad = gradient
    return leaf


class FrozenLinear:
    """``x Wᵀ + b`` with frozen weights, and for sampling a copy of them that :meth:`pack` made."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, onednn: bool = False) -> None:
        """``weight`` [out, in], ``bias`` [out]; ``onednn``: multiply with oneDNN (on a CPU only)."""
        self.weight = weight
        self.bias = bias
        self._onednn = onednn
        self._packed: Tensor | None = None
        self._merged = False

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] to [rows, out]."""
        if self._onednn:
            return onednn_linear(x.contiguous(), self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def pack(self, update: SiteWeights | None = None, scale: float = 1.0) -> None:
        """Copies the weights, with ``update`` merged if there is one, in the layout that is fastest for few rows."""
        if self._packed is not None and update is None and not self._merged:
            return
        weight = self.weight
        if update is not None:
            weight = weight.clone()
            add_low_rank(weight.t(), update.a.t(), update.b, scale)
        self._packed = None  # freed before the new copy is made
        self._packed = packed(weight)
        self._merged = update is not None

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def forward_packed(self, x: Tensor) -> Tensor:
        """As :meth:`forward`, by the copy that :meth:`pack` made."""
        assert self._packed is not None
        return onednn_linear(x.contiguous(), self._packed, self.bias)

    def backward(self, dy: Tensor) -> Tensor:
        """The input gradient ``dy W``: [rows, out] to [rows, in]."""
        return dy @ self.weight


class LoraLinear(torch.autograd.Function):
    """A frozen linear with low-rank updates, for training.

    Projections of the same input share one frozen product and one product with their stacked A's; the B's apply per block.
    With ``before``, the input ``x`` is ``before(source)``, computed once more in the backward pass instead of being kept.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        source: Tensor,
        before: Callable[[Tensor], Tensor] | None,
        linear: FrozenLinear,
        scale: float,
        a: Tensor,
        *b: Tensor,
    ) -> Tensor:
        y = linear.forward(x)
        z = x @ a.to(x.dtype).t()
        add_low_rank(y, z, b, scale)
        ctx.save_for_backward(source if before else x, z, a, *b)
        ctx.before, ctx.linear, ctx.scale = before, linear, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        source, z, a, *b = ctx.saved_tensors
        x = ctx.before(source) if ctx.before else source
        rank, column = b[0].shape[1], 0
        dz = torch.empty_like(z)
        db: list[Tensor | None] = []
        for index, block in enumerate(b):
            part = dy[:, column : column + len(block)]
            ranks = slice(index * rank, (index + 1) * rank)
            dz[:, ranks] = part @ block.to(dy.dtype)
            db.append((part.t() @ z[:, ranks]).mul_(ctx.scale).to(block.dtype))
            column += len(block)
        dz.mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.linear.backward(dy).addmm_(dz, a.to(dz.dtype))
        return dx, None, None, None, None, (dz.t() @ x).to(a.dtype), *db


class InputGradLinear(torch.autograd.Function):
    """A frozen linear without low-rank update, for training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:  # type: ignore[override]
        ctx.linear = linear
        return linear.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return ctx.linear.backward(dy), None


def add_low_rank(y: Tensor, z: Tensor, b: tuple[Tensor, ...] | list[Tensor], scale: float) -> None:
    """In place, for each block j: ``y[:, columns of j] += scale · z[:, ranks of j] Bⱼᵀ``."""
    column = 0
    for index, block in enumerate(b):
        rank = block.shape[1]
        part = y[:, column : column + len(block)]
        part.addmm_(z[:, index * rank : (index + 1) * rank], block.to(y.dtype).t(), alpha=scale)
        column += len(block)


def _needs_graph(x: Tensor) -> bool:
    # Function.apply costs 25 µs per call, which adds up during decoding.
    return x.requires_grad and torch.is_grad_enabled()


class RmsNorm(torch.autograd.Function):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, with frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return _normed(x, weight, inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        # d/dx of x·r with r = (mean x² + eps)^-½:  r·g − x·r³·mean(g·x),  g = dy·weight.
        scaled = _wide(dy * weight)
        wide = _wide(x)
        inner = (scaled * wide).mean(-1, keepdim=True).mul_(inverse.pow(3))
        return scaled.mul_(inverse).sub_(wide * inner).to(x.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    """At least float32: squaring half-precision numbers loses too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(_wide(x), dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return (_wide(x) * inverse).to(x.dtype).mul_(weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _needs_graph(x):
        return _normed(x, weight, _inverse_rms(x, eps))
    return RmsNorm.apply(x, weight, eps)  # type: ignore[return-value]


class Rotary(torch.autograd.Function):
    """Rotary embedding on head halves: ``x`` [rows, heads, size], ``cos`` and ``sin`` [rows, 1, size / 2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    low, high = y.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return y


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not _needs_graph(x):
        return _rotated(x, cos, sin)
    return Rotary.apply(x, cos, sin)  # type: ignore[return-value]


class SwiGlu(torch.autograd.Function):
    """``silu(gate) · up`` with ``gate_up`` [rows, 2·size], gate first."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        dgate, dup = grad.chunk(2, dim=-1)
        torch.mul(dy, functional.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        return grad


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def swiglu(gate_up: Tensor) -> Tensor:
    if not _needs_graph(gate_up):
        return _gated(gate_up)
    return SwiGlu.apply(gate_up)  # type: ignore[return-value]
