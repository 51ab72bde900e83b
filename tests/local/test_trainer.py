"""The trainer against an independent reference: merged weights in transformers' model, with plain autograd."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen3Config
from transformers.pytorch_utils import Conv1D

from searchr1_async.local import trainer
from searchr1_async.local.backend import AdamParams, Datum, ForwardBackwardResult, LoraConfig, UserFault
from searchr1_async.local.lora import LoraAdapter, LoraLayout
from searchr1_async.local.torch_models import Engine, load_engine
from searchr1_async.local.trainer import LOSSES, adam_step, forward_backward, with_sequence_ratio
from searchr1_async.testing import make_tiny_model

LORA = LoraConfig(rank=4, seed=1)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen 2, untied": {"config_class": Qwen2Config, "tie_word_embeddings": False},
    "qwen 3": {"config_class": Qwen3Config, "head_dim": 32},
    "gpt 2, through transformers": {
        "config_class": GPT2Config,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


def engine_of(folder: Path, max_rows: int = 1536) -> Engine:
    return load_engine(folder, torch.device("cpu"), torch.float32, 2**24, max_rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2, **arguments)
        for name, arguments in MODELS.items()
    }


@pytest.fixture
def llama(folders: dict[str, Path]) -> Engine:
    return engine_of(folders["llama"])


def new_adapter(engine: Engine, config: LoraConfig = LORA) -> LoraAdapter:
    """Non-zero B's, so that every matrix has a gradient and the update an effect."""
    layout = LoraLayout(engine.sites, config)
    flat = layout.initial()
    flat.add_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    return LoraAdapter(layout, flat)


def group_data(loss_fn: str, seed: int = 0) -> list[Datum]:
    """Two groups of three with a shared system prompt, zero-weight prompts and one duplicate datum."""
    rng = np.random.default_rng(seed)
    system, data = rng.integers(3, 400, 9), []
    for _ in range(2):
        prompt = np.concatenate([system, rng.integers(3, 400, 6)])
        for _ in range(3):
            full = np.concatenate([prompt, rng.integers(3, 400, rng.integers(4, 12))])
            length = len(full) - 1
            weight = np.where(np.arange(length) >= len(prompt) - 1, rng.normal(size=length), 0.0).astype(np.float32)
            inputs: dict[str, Any] = {"target_tokens": full[1:]}
            if loss_fn == "cross_entropy":
                inputs["weights"] = weight
            else:
                inputs |= {"advantages": weight, "logprobs": rng.normal(-6.0, 1.0, length).astype(np.float32)}
                if loss_fn == "gspo":
                    inputs["sequence_ratio_mask"] = (weight != 0.0).astype(np.float32)
            data.append(Datum(full[:-1].astype(np.int32), inputs))
    return [*data, data[1]]


def finish(steps: Generator[None, None, ForwardBackwardResult]) -> ForwardBackwardResult:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def run(
    engine: Engine, adapter: LoraAdapter, data: list[Datum], loss_fn: str, forward_only: bool = False, **config: float
) -> ForwardBackwardResult:
    return finish(forward_backward(engine.trainer, adapter, data, loss_fn, config, forward_only))


def reference(
    folder: Path, adapter: LoraAdapter, data: list[Datum], loss_fn: str
) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    """Loss, log-probabilities and gradients by PEFT name, from weights W + s·BA and autograd."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prefix, leaves, merged = "base_model.model.", {}, {}
    for name, matrix in adapter.layout.to_state(adapter.flat).items():
        leaves[name] = torch.from_numpy(matrix).requires_grad_()
    for name in leaves:
        if ".lora_A." not in name:
            continue
        path = name.removeprefix(prefix).removesuffix(".lora_A.weight")
        update = adapter.scale * leaves[name.replace("lora_A", "lora_B")] @ leaves[name]
        weight = model.get_parameter(path + ".weight").detach()
        transposed = isinstance(model.get_submodule(path), Conv1D)
        merged[path + ".weight"] = weight + (update.t() if transposed else update)
    loss, thresholds = LOSSES[loss_fn], LOSSES[loss_fn].inputs.config
    total, logprobs = torch.zeros(()), []
    # Tied embeddings are unchanged: only the head is adapted.
    embedding = model.get_input_embeddings().weight.detach().clone()
    for datum in data:
        embedded = embedding[torch.from_numpy(datum.tokens).long()].unsqueeze(0)
        logits = torch.func.functional_call(model, merged, kwargs={"inputs_embeds": embedded}, tie_weights=False).logits
        targets = torch.from_numpy(datum.loss_inputs["target_tokens"]).long().unsqueeze(1)
        lp = torch.log_softmax(logits[0], -1).gather(1, targets).squeeze(1)
        inputs = {name: torch.from_numpy(datum.loss_inputs[name]) for name in loss.inputs.fields}
        if loss.inputs.is_sequential:
            inputs = with_sequence_ratio(inputs, lp, [len(lp)])
        total = total + loss.terms(lp, inputs, thresholds).sum()
        logprobs.append(lp.detach())
    total.backward()
    return float(total.detach()), logprobs, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Path, Engine]:
    return folders[request.param], engine_of(folders[request.param])


@pytest.mark.parametrize("loss_fn", list(LOSSES))
def test_loss_logprobs_and_gradients_equal_the_reference(case: tuple[Path, Engine], loss_fn: str) -> None:
    folder, engine = case
    adapter, data = new_adapter(engine), group_data(loss_fn)

    result = run(engine, adapter, data, loss_fn)

    loss, logprobs, gradients = reference(folder, adapter, data, loss_fn)
    # Terms of both signs almost cancel, so allow absolute rounding errors.
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-4, abs=1e-4)
    for ours, theirs in zip(result.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    ours_by_name = adapter.layout.to_state(adapter.gradient)
    assert set(ours_by_name) == set(gradients)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0.0, name
        np.testing.assert_allclose(ours_by_name[name] / scale, gradient.numpy() / scale, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("part", ["train_attn", "train_mlp", "train_unembed"])
def test_untrained_parts_do_not_change_the_other_gradients(llama: Engine, part: str) -> None:
    data = group_data("cross_entropy")
    config = LoraConfig(rank=4, seed=1, **{part: False})
    layout = LoraLayout(llama.sites, config)
    adapter, whole = (
        LoraAdapter(layout, layout.initial()),
        LoraAdapter(LoraLayout(llama.sites, LORA), torch.zeros(LoraLayout(llama.sites, LORA).size)),
    )
    # Same A's in both and zero B's: leaving a part out must not change the other gradients.
    names = layout.to_state(adapter.flat)
    whole.flat.copy_(whole.layout.from_state(whole.layout.to_state(whole.flat) | names))

    run(llama, adapter, data, "cross_entropy")
    run(llama, whole, data, "cross_entropy")

    full = whole.layout.to_state(whole.gradient)
    for name, gradient in layout.to_state(adapter.gradient).items():
        np.testing.assert_allclose(gradient, full[name], atol=1e-3 * max(1.0, np.abs(full[name]).max()))


def test_small_micro_batches_give_the_same_and_pause_between_them(folders: dict[str, Path]) -> None:
    data = group_data("ppo")
    results = []
    for max_rows in (1536, 30):
        engine = engine_of(folders["llama"], max_rows)
        adapter = new_adapter(engine)
        steps = forward_backward(engine.trainer, adapter, data, "ppo", {}, False)
        pauses = 0
        while True:
            try:
                next(steps)
                pauses += 1
            except StopIteration as end:
                results.append((pauses, end.value, adapter.gradient.clone()))
                break
    (one, whole, gradient), (many, parts, summed) = results
    assert one == 1 < many
    torch.testing.assert_close(summed, gradient, atol=1e-2, rtol=1e-3)
    for a, b in zip(whole.logprobs, parts.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_gradients_add_up_and_forward_only_adds_none(llama: Engine) -> None:
    adapter, data = new_adapter(llama), group_data("cross_entropy")
    run(llama, adapter, data, "cross_entropy")
    once = adapter.gradient.clone()
    forward = run(llama, adapter, data, "cross_entropy", forward_only=True)
    assert torch.equal(adapter.gradient, once)
    again = run(llama, adapter, data, "cross_entropy")
    torch.testing.assert_close(adapter.gradient, 2 * once)
    assert forward.metrics["loss:sum"] == pytest.approx(again.metrics["loss:sum"])


def test_a_loss_that_is_not_finite_clears_the_gradients_and_keeps_the_weights(llama: Engine) -> None:
    adapter, good = new_adapter(llama), group_data("importance_sampling")
    before = adapter.flat.clone()
    run(llama, adapter, good, "importance_sampling")
    extreme = Datum(good[0].tokens, {**good[0].loss_inputs, "logprobs": np.full(len(good[0].tokens), -1e4, np.float32)})

    with pytest.raises(UserFault, match=r"not finite.*gradients were cleared"):
        run(llama, adapter, [*good, extreme], "importance_sampling")

    assert not adapter.gradient.any()
    assert torch.equal(adapter.flat, before)
    run(llama, adapter, good, "importance_sampling")
    assert adapter.gradient.isfinite().all()


def test_adam_is_torchs_adamw_with_global_clipping() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = LoraLayout(_some_sites(), LoraConfig(rank=2, seed=0))
    adapter = LoraAdapter(layout, layout.initial())
    expected = torch.nn.Parameter(adapter.flat.clone())
    params = AdamParams(learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0)
    optimizer = torch.optim.AdamW([expected], lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for steps, factor in enumerate((10.0, 0.001, 1.0), 1):
        gradient = torch.randn(layout.size, generator=generator) * factor
        adapter.gradient.copy_(gradient)
        expected.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([expected], 1.0)
        optimizer.step()

        metrics = adam_step(adapter, params)

        torch.testing.assert_close(adapter.flat, expected.detach(), atol=1e-6, rtol=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert metrics["optimizer_steps"] == steps
        assert not adapter.gradient.any()


def _some_sites() -> tuple[Any, ...]:
    from searchr1_async.local.lora import LoraSite

    return (LoraSite("0.down", 5, (("down", 3),), "mlp"),)


@pytest.mark.parametrize("params", [{"learning_rate": -1.0}, {"beta2": 1.0}, {"eps": float("nan")}])
def test_adam_refuses_parameters_out_of_range(params: dict[str, float]) -> None:
    with pytest.raises(UserFault, match="adam_params"):
        AdamParams(**params)


def test_a_sequences_ratio_does_not_depend_on_chunks(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of three rows, every sequence spans several chunks."""
    data = group_data("gspo")
    results = []
    for rows in (256, 3):
        monkeypatch.setattr(trainer, "_HEAD_CHUNK", rows)
        adapter = new_adapter(llama)
        result = run(llama, adapter, data, "gspo", clip_low_threshold=0.0, clip_high_threshold=100.0)
        results.append((result.metrics["loss:sum"], adapter.gradient.clone()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert float(results[0][1].abs().max()) > 1e-3
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss(llama: Engine) -> None:
    layout = LoraLayout(llama.sites, LoraConfig(rank=8, seed=0))
    adapter = LoraAdapter(layout, layout.initial())
    data = group_data("cross_entropy")
    data = [Datum(d.tokens, {**d.loss_inputs, "weights": np.ones(len(d.tokens), np.float32)}) for d in data]
    losses = []
    for _ in range(15):
        losses.append(run(llama, adapter, data, "cross_entropy").metrics["loss:sum"])
        adam_step(adapter, AdamParams(learning_rate=3e-3))
    assert losses[-1] < 0.6 * losses[0]
