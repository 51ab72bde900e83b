from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from searchr1_async.local.kernels import (
    FrozenLinear,
    InputGradLinear,
    LoraLinear,
    onednn_available,
    rms_norm,
    rotary,
    swiglu,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.skipif(
    not onednn_available(), reason="oneDNN's prepacked linear is not in this build of torch"))])  # fmt: skip
@pytest.mark.parametrize("rows", [0, 1, 2, 33, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_linear_equals_torchs_forward_and_backward(packed: bool, rows: int, with_bias: bool) -> None:
    weight, bias = torch.randn(40, 24), torch.randn(40) if with_bias else None
    linear = FrozenLinear(weight, bias, packed=packed)
    x, dy = torch.randn(rows, 24), torch.randn(rows, 40)

    torch.testing.assert_close(linear.forward(x), functional.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear.backward(dy), dy @ weight, atol=1e-5, rtol=1e-5)


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_the_gradients_of_the_small_operations_are_right() -> None:
    weight = torch.randn(6, dtype=torch.float64)
    cos, sin = torch.randn(5, 1, 3, dtype=torch.float64), torch.randn(5, 1, 3, dtype=torch.float64)

    assert torch.autograd.gradcheck(swiglu, (_double(4, 10),))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (_double(5, 2, 6),))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (_double(4, 6),))


def test_the_gradients_of_a_fused_linear_with_updates_are_right() -> None:
    linear = FrozenLinear(torch.randn(7, 5, dtype=torch.float64))
    x, a, b1, b2 = _double(3, 5), _double(4, 5), _double(4, 2), _double(3, 2)

    assert torch.autograd.gradcheck(lambda *t: LoraLinear.apply(t[0], linear, 1.5, *t[1:]), (x, a, b1, b2))
    assert torch.autograd.gradcheck(lambda t: InputGradLinear.apply(t, linear), (x,))


def test_updates_act_on_their_own_outputs() -> None:
    weight, x = torch.randn(7, 5), torch.randn(3, 5)
    a, b1, b2 = torch.randn(4, 5), torch.randn(4, 2), torch.randn(3, 2)

    y = LoraLinear.apply(x, FrozenLinear(weight), 0.5, a, b1, b2)

    merged = weight + 0.5 * torch.cat([b1 @ a[:2], b2 @ a[2:]])
    torch.testing.assert_close(y, functional.linear(x, merged))
