"""Operations of a Llama-like model, each with the cheapest backward pass that frozen weights allow."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

# oneDNN's packed layout is used for 2 to this many rows: measured at 1.5 times MKL's speed with 32 rows, slower with 1,040.
_PACKED_ROWS = 256


def onednn_available() -> bool:
    """Whether oneDNN's prepacked linear exists and agrees with ``F.linear`` on random numbers."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    try:
        generator = torch.Generator().manual_seed(0)
        weight, x = torch.randn(48, 32, generator=generator), torch.randn(5, 32, generator=generator)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        logger.info("oneDNN's prepacked linear is not available; using torch's")
        return False
    return torch.allclose(y, functional.linear(x, weight), atol=1e-4)


class FrozenLinear:
    """``x Wᵀ + b`` with frozen weights, optionally with a second copy in oneDNN's packed layout.

    On a CPU, decode batches use the packed copy; larger batches and single rows (memory-bound anyway) use MKL.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, packed: bool = False) -> None:
        """``weight`` [out, in], ``bias`` [out]; ``packed`` uses oneDNN (float32 on a CPU only)."""
        self.weight = weight
        self.bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS) if packed else None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in] to [rows, out]."""
        if self._packed is None or not 1 < len(x) <= _PACKED_ROWS:
            return functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, self.bias, "none", [], "")

    def backward(self, dy: Tensor) -> Tensor:
        """The input gradient ``dy W``: [rows, out] to [rows, in]."""
        return dy @ self.weight


class LoraLinear(torch.autograd.Function):
    """A frozen linear with low-rank updates, for training.

    Projections of the same input share one frozen product and one product with their stacked A's; the B's apply per block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear, scale: float, a: Tensor, *b: Tensor) -> Tensor:  # type: ignore[override]
        y = linear.forward(x)
        z = x @ a.to(x.dtype).t()
        add_low_rank(y, z, b, scale)
        ctx.save_for_backward(x, z, a, *b)
        ctx.linear, ctx.scale = linear, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, a, *b = ctx.saved_tensors
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
        return dx, None, None, (dz.t() @ x).to(a.dtype), *db


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
