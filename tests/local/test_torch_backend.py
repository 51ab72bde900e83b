from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from searchr1_async.errors import ModelError
from searchr1_async.local.backend import (
    AdamParams,
    Adapter,
    Backend,
    Datum,
    LoraConfig,
    SampledSequence,
    SampleRequest,
    SampleResult,
    Snapshot,
    UserFault,
)
from searchr1_async.local.lora import LoraAdapter
from searchr1_async.local.torch_backend import TorchBackend, Turns
from searchr1_async.local.torch_models import choose_dtype
from searchr1_async.testing import make_tiny_model

WAIT = 60.0
LORA = LoraConfig(rank=4, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), context=512)


@pytest.fixture(scope="module")
def backend(folder: Path) -> Iterator[TorchBackend]:
    loaded = TorchBackend.load(str(folder), threads=1, dtype="float32", device="cpu", max_batch=16)
    yield loaded
    loaded.close()


def trained_adapter(backend: Backend, seed: int = 0) -> Adapter:
    """An adapter with a non-zero update."""
    adapter = backend.create_adapter(LORA).result(WAIT)
    assert isinstance(adapter, LoraAdapter)
    adapter.flat.add_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
    return adapter


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 400, length).astype(np.int32)


def request(tokens: np.ndarray, **options: Any) -> SampleRequest:
    return SampleRequest(tokens, **{"max_tokens": 12, "stop_tokens": (), "seed": 1, **options})


def one(future: Future[SampleResult]) -> SampledSequence:
    (sequence,) = future.result(WAIT).sequences
    return sequence


def datum_of(tokens: np.ndarray, weights: float = 1.0) -> Datum:
    inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": np.full(len(tokens) - 1, weights, np.float32)}
    return Datum(tokens[:-1].astype(np.int32), inputs)


def test_sampled_logprobs_are_the_trainers(backend: TorchBackend) -> None:
    adapter = trained_adapter(backend)
    snapshot = backend.snapshot(adapter).result(WAIT)
    shared, prompts = prompt(20), [np.concatenate([prompt(20), prompt(n, seed=n)]) for n in (1, 9, 30)]
    assert all((p[:20] == shared).all() for p in prompts)
    # Over 128 tokens, so that sequences outgrow their first pool.
    futures = [backend.sample(snapshot, request(p, num_samples=2, max_tokens=120, temperature=0.8)) for p in prompts]
    data, sampled = [], []
    for p, future in zip(prompts, futures, strict=True):
        for sequence in future.result(WAIT).sequences:
            data.append(datum_of(np.concatenate([p, sequence.tokens])))
            sampled.append(sequence.logprobs)

    result = backend.forward_backward(adapter, data, "cross_entropy", {}, True).result(WAIT)

    for logprobs, own in zip(result.logprobs, sampled, strict=True):
        np.testing.assert_allclose(logprobs[-len(own) :], own, atol=1e-3)


def test_later_turns_reuse_the_cache_and_agree_with_the_trainer(backend: TorchBackend) -> None:
    adapter = trained_adapter(backend, seed=1)
    snapshot = backend.snapshot(adapter).result(WAIT)
    history = prompt(40, seed=5)
    for turn in range(3):
        result = backend.sample(snapshot, request(history, seed=turn)).result(WAIT)
        assert result.prompt_cache_hit_tokens == (0 if turn == 0 else len(history) - 6)
        sequence = result.sequences[0]
        history = np.concatenate([history, sequence.tokens])
        trained = backend.forward_backward(adapter, [datum_of(history)], "cross_entropy", {}, True).result(WAIT)
        np.testing.assert_allclose(trained.logprobs[0][-12:], sequence.logprobs, atol=1e-3)
        # The last sampled token was never run; five tokens of a tool response follow.
        history = np.concatenate([history, prompt(5, seed=turn + 50)])


def test_greedy_continuations_are_those_of_transformers(backend: TorchBackend, folder: Path) -> None:
    tokens = prompt(25, seed=3)
    sequence = one(backend.sample(None, request(tokens, max_tokens=20, temperature=0.0)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    expected = model.generate(
        torch.from_numpy(tokens).long().unsqueeze(0),
        max_new_tokens=20,
        do_sample=False,
        attention_mask=torch.ones(1, 25),
    )
    assert sequence.tokens.tolist() == expected[0, 25:].tolist()
    assert sequence.stop_reason == "length"


def test_a_seed_gives_the_same_tokens_in_any_batch(backend: TorchBackend) -> None:
    snapshots: list[Snapshot | None] = [
        None,
        backend.snapshot(trained_adapter(backend, seed=2)).result(WAIT),
        backend.snapshot(trained_adapter(backend, seed=3)).result(WAIT),
    ]
    cases = [(snapshot, prompt(10 + i, seed=i)) for i, snapshot in enumerate(snapshots * 2)]
    alone = [one(backend.sample(snapshot, request(p))) for snapshot, p in cases]
    together = [backend.sample(snapshot, request(p)) for snapshot, p in cases]
    for expected, future in zip(alone, together, strict=True):
        got = one(future)
        assert got.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)
    assert len({tuple(sequence.tokens.tolist()) for sequence in alone}) == len(cases)


def test_samples_of_one_request_differ_and_may_exceed_the_batch(backend: TorchBackend) -> None:
    result = backend.sample(None, request(prompt(12), num_samples=40)).result(WAIT)
    assert len(result.sequences) == 40
    assert len({tuple(sequence.tokens.tolist()) for sequence in result.sequences}) > 30


def test_generation_ends_at_a_stop_token_which_is_kept(backend: TorchBackend) -> None:
    free = one(backend.sample(None, request(prompt(9), max_tokens=30)))
    stop = int(free.tokens[7])
    first = free.tokens.tolist().index(stop)

    stopped = one(backend.sample(None, request(prompt(9), max_tokens=30, stop_tokens=(stop,))))

    assert stopped.tokens.tolist() == free.tokens[: first + 1].tolist()
    assert stopped.stop_reason == "stop"


def test_the_models_end_token_stops_by_default(backend: TorchBackend) -> None:
    options = {"num_samples": 16, "max_tokens": 60, "temperature": 9.0}
    default = backend.sample(None, request(prompt(9), stop_tokens=None, **options)).result(WAIT)
    assert any(sequence.stop_reason == "stop" for sequence in default.sequences)
    for sequence in default.sequences:
        assert (sequence.tokens == 2).sum() == (sequence.stop_reason == "stop")
    never = backend.sample(None, request(prompt(9), stop_tokens=(), **options)).result(WAIT)
    assert all(len(sequence.tokens) == 60 for sequence in never.sequences)


def test_generation_ends_after_the_token_that_completes_a_stop_string(backend: TorchBackend, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    free = one(backend.sample(None, request(prompt(9), max_tokens=40)))
    texts = [tokenizer.decode(free.tokens[: n + 1]) for n in range(40)]
    # Four characters across a token boundary; tokens are random, so some texts are invalid UTF-8.
    end = next(
        n for n in range(6, 40) if "\ufffd" not in texts[n][-4:] and len(texts[n]) - len(texts[n - 1]) in {1, 2, 3}
    )
    string = texts[end][-4:]
    first = next(n for n, text in enumerate(texts) if string in text)

    stopped = one(backend.sample(None, request(prompt(9), max_tokens=40, stop_strings=("not there", string))))

    assert stopped.tokens.tolist() == free.tokens[: first + 1].tolist()
    assert stopped.stop_reason == "stop"


def test_prompt_and_topk_logprobs_are_those_of_transformers(backend: TorchBackend, folder: Path) -> None:
    tokens = prompt(200, seed=8)  # longer than one chunk of logits
    asked = request(tokens, max_tokens=2, prompt_logprobs=True, topk_prompt_logprobs=3, topk_sample_logprobs=4)
    results = [backend.sample(None, asked).result(WAIT) for _ in range(2)]  # the second time with a warm cache
    with torch.no_grad():
        whole = np.concatenate([tokens, results[0].sequences[0].tokens])
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(whole).long().unsqueeze(0)).logits[0]
        expected = torch.log_softmax(logits, -1)
    for result in results:
        assert result.prompt_logprobs is not None
        assert result.topk_prompt is not None
        assert np.isnan(result.prompt_logprobs[0])
        own = expected[:-1].gather(1, torch.from_numpy(whole[1:]).long().unsqueeze(1)).squeeze(1).numpy()
        np.testing.assert_allclose(result.prompt_logprobs[1:], own[:199], atol=1e-3)
        ids, values = result.topk_prompt
        assert ids.shape == values.shape == (200, 3)
        assert ids[0].tolist() == [0, 0, 0]
        assert np.isnan(values[0]).all()
        top = expected[:199].topk(3)
        np.testing.assert_allclose(values[1:], top.values.numpy(), atol=1e-3)
        (sequence,) = result.sequences
        assert sequence.topk is not None
        sampled_ids, sampled_values = sequence.topk
        np.testing.assert_allclose(sampled_values, expected[199:201].topk(4).values.numpy(), atol=1e-3)
        assert sampled_ids.shape == (2, 4)
        np.testing.assert_allclose(sequence.logprobs, own[199:201], atol=1e-3)


def test_a_prompt_longer_than_a_prefill_step_is_served(backend: TorchBackend) -> None:
    lengths = [480, 300, 450, 500]
    futures = [backend.sample(None, request(prompt(n, seed=n), max_tokens=4)) for n in lengths]
    assert [len(one(future).tokens) for future in futures] == [4] * 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_tokens": 500}, "exceed the model's context of 512 tokens"),
        ({"max_tokens": 0}, "at least 1"),
        ({"num_samples": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"topk_sample_logprobs": 100_000}, "topk_sample_logprobs"),
        ({"prompt": np.array([1, 100_000], np.int32)}, "token id outside"),
        ({"prompt": np.empty(0, np.int32)}, "empty"),
    ],
)
def test_a_bad_request_is_refused(backend: TorchBackend, bad: dict[str, Any], message: str) -> None:
    tokens = bad.pop("prompt", prompt(20))
    with pytest.raises(UserFault, match=message):
        backend.sample(None, request(tokens, **bad)).result(WAIT)


def test_without_max_tokens_the_context_is_filled(backend: TorchBackend) -> None:
    assert len(one(backend.sample(None, request(prompt(450), max_tokens=None))).tokens) == 62


def test_a_cancelled_request_leaves_the_others_alone(backend: TorchBackend) -> None:
    expected = one(backend.sample(None, request(prompt(20), max_tokens=25)))
    doomed = [backend.sample(None, request(prompt(20, seed=i), max_tokens=490)) for i in range(4)]
    kept = backend.sample(None, request(prompt(20), max_tokens=25))
    assert all(future.cancel() for future in doomed)
    assert one(kept).tokens.tolist() == expected.tokens.tolist()
    with pytest.raises(CancelledError):
        doomed[0].result(WAIT)


def test_weights_that_diverged_fail_their_own_requests_only(backend: TorchBackend) -> None:
    adapter = trained_adapter(backend)
    assert isinstance(adapter, LoraAdapter)
    adapter.flat.fill_(float("nan"))
    broken = backend.snapshot(adapter).result(WAIT)
    expected = one(backend.sample(None, request(prompt(20), max_tokens=25)))
    good, bad = backend.sample(None, request(prompt(20), max_tokens=25)), backend.sample(broken, request(prompt(20)))
    with pytest.raises(UserFault, match="diverged"):
        bad.result(WAIT)
    assert one(good).tokens.tolist() == expected.tokens.tolist()
    assert one(backend.sample(None, request(prompt(20), max_tokens=25))).tokens.tolist() == expected.tokens.tolist()


def test_the_memory_of_an_adapter_is_logged(backend: TorchBackend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "searchr1_async.local")
    adapter = backend.create_adapter(LORA).result(WAIT)
    assert isinstance(adapter, LoraAdapter)
    megabytes = adapter.flat.nbytes / 2**20
    assert caplog.messages == [f"Memory: rank 4: {4 * megabytes:.1f} MB in training, {megabytes:.1f} MB a snapshot"]


def test_calls_on_an_adapter_take_effect_in_order_while_others_sample(backend: TorchBackend) -> None:
    adapter = backend.create_adapter(LORA).result(WAIT)
    data = [datum_of(prompt(60, seed=i)) for i in range(3)]
    busy = [backend.sample(None, request(prompt(20, seed=i), max_tokens=400)) for i in range(4)]
    before = backend.snapshot(adapter)
    losses = []
    for _ in range(3):
        losses.append(backend.forward_backward(adapter, data, "cross_entropy", {}, False))
        backend.optim_step(adapter, AdamParams(learning_rate=1e-2))
    after = backend.snapshot(adapter)
    values = [future.result(WAIT).metrics["loss:sum"] for future in losses]
    assert values[0] > values[1] > values[2]
    scored = []
    for snapshot in (before, after):
        asked = request(prompt(60), max_tokens=1, prompt_logprobs=True)
        result = backend.sample(snapshot.result(WAIT), asked).result(WAIT)
        assert result.prompt_logprobs is not None
        scored.append(-result.prompt_logprobs[1:].sum())
    assert scored[1] < scored[0] - 1.0, "the first snapshot is from before the steps, the second from after"
    for future in busy:
        future.cancel()


def test_a_checkpoint_continues_training_exactly(backend: TorchBackend) -> None:
    adapter, data = backend.create_adapter(LORA).result(WAIT), [datum_of(prompt(30))]

    def step(trained: Adapter) -> float:
        result = backend.forward_backward(trained, data, "cross_entropy", {}, False).result(WAIT)
        backend.optim_step(trained, AdamParams(learning_rate=1e-2)).result(WAIT)
        return result.metrics["loss:sum"]

    step(adapter)
    state = backend.export_adapter(adapter, True).result(WAIT)
    restored = backend.import_adapter(LORA, state, True).result(WAIT)
    assert [step(restored) for _ in range(3)] == [step(adapter) for _ in range(3)]

    snapshot = backend.import_snapshot(LORA, backend.export_adapter(adapter, False).result(WAIT)).result(WAIT)
    own = backend.snapshot(adapter).result(WAIT)
    tokens = [one(backend.sample(weights, request(prompt(9)))).tokens.tolist() for weights in (snapshot, own)]
    assert tokens[0] == tokens[1]
    with pytest.raises(UserFault, match="does not fit"):
        backend.import_snapshot(LoraConfig(rank=8), state).result(WAIT)


def test_bad_training_calls_fail_alone(backend: TorchBackend) -> None:
    adapter = backend.create_adapter(LORA).result(WAIT)
    with pytest.raises(UserFault, match="lora_config"):
        backend.create_adapter(LoraConfig(rank=0)).result(WAIT)
    with pytest.raises(UserFault, match="Unknown loss_fn 'mystery'"):
        backend.forward_backward(adapter, [datum_of(prompt(9))], "mystery", {}, False).result(WAIT)
    good = backend.forward_backward(adapter, [datum_of(prompt(9))], "cross_entropy", {}, False)
    assert good.result(WAIT).metrics["loss:sum"] > 0.0


def test_a_snapshot_is_freed_when_unreferenced(backend: TorchBackend) -> None:
    snapshot = backend.snapshot(trained_adapter(backend)).result(WAIT)
    one(backend.sample(snapshot, request(prompt(9))))
    one(backend.sample(None, request(prompt(9))))  # the thread has finished the previous call
    reference = weakref.ref(snapshot)
    del snapshot
    gc.collect()
    assert reference() is None


def test_a_closed_backend_fails_open_and_new_requests(folder: Path) -> None:
    backend = TorchBackend.load(str(folder), threads=1, dtype="float32", device="cpu")
    open_requests = [backend.sample(None, request(prompt(20), max_tokens=490, num_samples=8)) for _ in range(4)]
    backend.close()
    backend.close()
    late = backend.sample(None, request(prompt(20)))
    for future in (*open_requests, late, backend.create_adapter(LORA)):
        with pytest.raises(RuntimeError, match="closed"):
            future.result(WAIT)


def test_another_architecture_samples_and_trains_alike(tmp_path: Path) -> None:
    make_tiny_model(
        tmp_path, config_class=GPT2Config, n_positions=256, num_hidden_layers=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    backend = TorchBackend.load(str(tmp_path), threads=1, dtype="float32", device="cpu")
    try:
        adapter = trained_adapter(backend)
        snapshot = backend.snapshot(adapter).result(WAIT)
        futures = [
            backend.sample(owner, request(prompt(20, seed=i), num_samples=2, prompt_logprobs=True))
            for i, owner in enumerate((snapshot, None))
        ]
        result, base = (future.result(WAIT) for future in futures)
        whole = [np.concatenate([prompt(20), sequence.tokens]) for sequence in result.sequences]
        trained = backend.forward_backward(
            adapter, [datum_of(tokens) for tokens in whole], "cross_entropy", {}, True
        ).result(WAIT)
        assert result.prompt_logprobs is not None
        for logprobs, sequence in zip(trained.logprobs, result.sequences, strict=True):
            np.testing.assert_allclose(logprobs[-12:], sequence.logprobs, atol=1e-3)
            np.testing.assert_allclose(logprobs[:19], result.prompt_logprobs[1:], atol=1e-3)
        assert not np.array_equal(base.sequences[0].tokens, result.sequences[0].tokens)
    finally:
        backend.close()


def test_bfloat16_samples_and_trains(folder: Path) -> None:
    backend = TorchBackend.load(str(folder), threads=1, dtype="bfloat16", device="cpu")
    try:
        adapter = trained_adapter(backend)
        snapshot = backend.snapshot(adapter).result(WAIT)
        sequence = one(backend.sample(snapshot, request(prompt(20))))
        data = [datum_of(np.concatenate([prompt(20), sequence.tokens]))]
        result = backend.forward_backward(adapter, data, "cross_entropy", {}, False).result(WAIT)
        np.testing.assert_allclose(result.logprobs[0][-12:], sequence.logprobs, atol=0.3)
        assert backend.optim_step(adapter, AdamParams()).result(WAIT)["grad_norm"] > 0.0
    finally:
        backend.close()


def test_sampling_comes_first_but_training_is_not_starved() -> None:
    turns = Turns(quantum=1.0)
    assert not turns.training_is_due(False, True, now=0.0)
    assert turns.training_is_due(True, False, now=1.0), "nothing to sample"
    turns.trained(now=2.0)
    assert not turns.training_is_due(True, True, now=2.9)
    assert turns.training_is_due(True, True, now=3.0), "waited for the quantum"
    turns.trained(now=5.0)
    assert not turns.training_is_due(True, True, now=5.5)
    assert not turns.training_is_due(False, True, now=5.6)
    assert not turns.training_is_due(True, True, now=9.0), "a new wait starts when work arrives"
    assert turns.training_is_due(True, True, now=10.0)


def test_a_model_that_cannot_be_loaded_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        TorchBackend.load(str(tmp_path))
    with pytest.raises(ModelError, match="int8"):
        choose_dtype("int8", torch.device("cpu"))


def test_the_default_precision_of_a_cpu_is_float32() -> None:
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
