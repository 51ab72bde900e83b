from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from searchr1_async.local.backend import LoraConfig, UserFault
from searchr1_async.local.compat import has_onednn
from searchr1_async.local.lora import (
    FrozenLinear,
    InputGradLinear,
    LoraAdapter,
    LoraLayout,
    LoraLinear,
    LoraSite,
    LoraWeights,
    SiteWeights,
    rms_norm,
    rotary,
    swiglu,
)

SITES = (
    LoraSite("0.qkv", 8, (("model.layers.0.self_attn.q_proj", 8), ("model.layers.0.self_attn.k_proj", 4)), "attn"),
    LoraSite("0.down", 12, (("model.layers.0.mlp.down_proj", 8),), "mlp"),
    LoraSite("head", 8, (("lm_head", 20),), "unembed"),
)


def adapter(config: LoraConfig | None = None) -> LoraAdapter:
    layout = LoraLayout(SITES, config or LoraConfig(rank=4, seed=3))
    return LoraAdapter(layout, layout.initial())


def test_a_new_adapter_changes_nothing_and_its_seed_decides_it() -> None:
    first, second = adapter(), adapter()
    assert torch.equal(first.flat, second.flat)
    assert not torch.equal(first.flat, adapter(LoraConfig(rank=4, seed=4)).flat)
    assert not torch.equal(adapter(LoraConfig(rank=4)).flat, adapter(LoraConfig(rank=4)).flat)
    for site in first.sites.values():
        assert all(not block.any() for block in site.b)
        bound = site.a.shape[1] ** -0.5
        assert bound * 0.8 < float(site.a.detach().abs().max()) <= bound


def test_updates_are_scaled_by_32_over_the_rank() -> None:
    assert adapter().scale == 8.0
    assert adapter(LoraConfig(rank=32)).scale == 1.0


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (LoraConfig(rank=2, train_attn=False), {"0.down", "head"}),
        (LoraConfig(rank=2, train_mlp=False), {"0.qkv", "head"}),
        (LoraConfig(rank=2, train_unembed=False), {"0.qkv", "0.down"}),
    ],
)
def test_parts_can_be_left_out(config: LoraConfig, kept: set[str]) -> None:
    assert set(adapter(config).sites) == kept


@pytest.mark.parametrize(
    "config", [{"rank": 0}, {"rank": 5000}, {"train_attn": False, "train_mlp": False, "train_unembed": False}]
)
def test_a_configuration_that_makes_no_adapter_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserFault, match="lora_config"):
        LoraLayout(SITES, LoraConfig(**config))


def test_a_snapshot_is_a_copy() -> None:
    trained = adapter()
    snapshot = trained.frozen_copy()
    before = snapshot.sites["0.qkv"].a.clone()
    trained.flat.add_(1.0)
    assert torch.equal(snapshot.sites["0.qkv"].a, before)
    assert not torch.equal(trained.sites["0.qkv"].a, before)


def test_a_checkpoint_names_matrices_as_peft_does_and_restores_all() -> None:
    trained = adapter()
    trained.flat.copy_(torch.randn(trained.layout.size))
    for moment in trained.moments:
        moment.copy_(torch.rand(trained.layout.size))
    trained.step = 7

    state = trained.export(optimizer=True)
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_{}.weight"
    assert state[key.format("A")].shape == (4, 8)
    np.testing.assert_array_equal(state[key.format("B")], trained.sites["0.qkv"].b[1].detach().numpy())
    np.testing.assert_array_equal(state[key.format("A")], trained.sites["0.qkv"].a.detach().numpy()[4:])

    device = torch.device("cpu")
    restored = LoraAdapter.restore(trained.layout, state, optimizer=True, device=device)
    assert torch.equal(restored.flat, trained.flat)
    assert all(torch.equal(a, b) for a, b in zip(restored.moments, trained.moments, strict=True))
    assert restored.step == 7
    fresh = LoraAdapter.restore(trained.layout, state, optimizer=False, device=device)
    assert torch.equal(fresh.flat, trained.flat)
    assert fresh.step == 0
    assert not fresh.moments[0].any()


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    state = adapter().export(optimizer=False)
    device = torch.device("cpu")
    with pytest.raises(UserFault, match="no optimizer state"):
        LoraAdapter.restore(adapter().layout, state, optimizer=True, device=device)
    with pytest.raises(UserFault, match=r"has shape \[4, 8\], expected \[2, 8\]"):
        LoraLayout(SITES, LoraConfig(rank=2)).from_state(state)
    del state["base_model.model.lm_head.lora_B.weight"]
    with pytest.raises(UserFault, match=r"lm_head\.lora_B\.weight is missing"):
        adapter().layout.from_state(state)


def test_sampler_weights_are_compared_by_identity() -> None:
    layout = adapter().layout
    first, second = LoraWeights(layout, layout.initial()), LoraWeights(layout, layout.initial())
    assert first != second
    assert len({first, second}) == 2


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=pytest.mark.skipif(
    not has_onednn(torch.float32), reason="oneDNN's prepacked linear is not in this build of torch"))])  # fmt: skip
@pytest.mark.parametrize("rows", [0, 1, 2, 33, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_linear_equals_torchs_forward_and_backward(onednn: bool, rows: int, with_bias: bool) -> None:
    weight, bias = torch.randn(40, 24), torch.randn(40) if with_bias else None
    linear = FrozenLinear(weight, bias, onednn=onednn)
    x, dy = torch.randn(rows, 24), torch.randn(rows, 40)

    torch.testing.assert_close(linear.forward(x), functional.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    if onednn:
        linear.pack()
        torch.testing.assert_close(linear.forward_packed(x), functional.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear.backward(dy), dy @ weight, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not has_onednn(torch.float32), reason="oneDNN's linear is not in this build of torch")
def test_a_packed_copy_has_the_update_that_was_merged_last() -> None:
    weight, x = torch.randn(7, 5), torch.randn(3, 5)
    linear, update = (
        FrozenLinear(weight, onednn=True),
        SiteWeights(torch.randn(4, 5), (torch.randn(4, 2), torch.randn(3, 2))),
    )
    merged = weight + 0.5 * torch.cat([update.b[0] @ update.a[:2], update.b[1] @ update.a[2:]])

    for site, expected in [(None, weight), (update, merged), (None, weight)]:
        linear.pack(site, 0.5)
        torch.testing.assert_close(linear.forward_packed(x), functional.linear(x, expected))
        torch.testing.assert_close(linear.forward(x), functional.linear(x, weight))


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

    def kept(x: Tensor, *updates: Tensor) -> Tensor:
        return LoraLinear.apply(x, x, None, linear, 1.5, *updates)  # type: ignore[return-value]

    def computed_again(x: Tensor, *updates: Tensor) -> Tensor:
        return LoraLinear.apply(x.tanh(), x, torch.tanh, linear, 1.5, *updates)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(kept, (x, a, b1, b2))
    assert torch.autograd.gradcheck(computed_again, (x, a, b1, b2))
    assert torch.autograd.gradcheck(lambda t: InputGradLinear.apply(t, linear), (x,))


def test_updates_act_on_their_own_outputs() -> None:
    weight, x = torch.randn(7, 5), torch.randn(3, 5)
    a, b1, b2 = torch.randn(4, 5), torch.randn(4, 2), torch.randn(3, 2)

    y = LoraLinear.apply(x, x, None, FrozenLinear(weight), 0.5, a, b1, b2)

    merged = weight + 0.5 * torch.cat([b1 @ a[:2], b2 @ a[2:]])
    torch.testing.assert_close(y, functional.linear(x, merged))
