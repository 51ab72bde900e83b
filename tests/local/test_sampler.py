"""Samples whose weights are replaced while they run."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from searchr1_async.local.backend import InflightClient, LoraConfig, SampleRequest, SampleResult
from searchr1_async.local.lora import LoraLayout, LoraWeights
from searchr1_async.local.runner import Owner
from searchr1_async.local.sampler import Sampler
from searchr1_async.local.torch_backend import Engine, load_engine
from searchr1_async.testing import make_tiny_model

PROMPT = np.random.default_rng(0).integers(3, 400, 20).astype(np.int32)
STEPS_BEFORE, TOKENS = 25, 60


class Target:
    """The target of an in-flight save."""

    def __init__(self, snapshot: LoraWeights) -> None:
        self.snapshot = snapshot


@pytest.fixture(scope="module", params=["lean", "through transformers"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    gpt2: dict[str, Any] = {
        "config_class": GPT2Config, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    arguments = {} if request.param == "lean" else gpt2
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2, context=256, **arguments)


def engine_of(folder: Path) -> Engine:
    return load_engine(folder, torch.device("cpu"), torch.float32, 2**24, 1536)


def weights_of(engine: Engine, seed: int) -> LoraWeights:
    layout = LoraLayout(engine.sites, LoraConfig(rank=4, seed=1))
    flat = layout.initial()
    flat.add_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
    return LoraWeights(layout, flat)


def sampler_of(engine: Engine) -> Sampler:
    return Sampler(
        engine.runner,
        engine.tokenizer,
        vocabulary=engine.vocabulary,
        context=engine.context,
        end_tokens=(2,),
        max_batch=8,
    )


def submit(sampler: Sampler, owner: Owner, prompt: np.ndarray, tokens: int = TOKENS) -> Future[SampleResult]:
    future: Future[SampleResult] = Future()
    sampler.submit(owner, SampleRequest(prompt, max_tokens=tokens, stop_tokens=(), seed=1), future)
    return future


def finish(sampler: Sampler) -> None:
    while sampler.busy:
        sampler.step()


def replay(folder: Path, tokens: np.ndarray, plan: list[LoraWeights]) -> np.ndarray:
    """Log-probabilities of ``tokens``, each computed with its weights from ``plan`` over the cache so far."""
    runner = engine_of(folder).runner
    ((handle,), logits) = (prefilled := runner.prefill(plan[0], [PROMPT], [1], False)[0]).handles, prefilled.logits
    logprobs = []
    for index, token in enumerate(tokens.tolist()):
        if index:
            logits = runner.decode([handle], [int(tokens[index - 1])], [plan[index]])[0]
        logprobs.append(float(torch.log_softmax(logits.float(), -1)[token]))
    return np.array(logprobs, np.float32)


def test_a_running_sample_continues_with_newer_weights_over_its_cache(folder: Path) -> None:
    engine = engine_of(folder)
    old, new = weights_of(engine, 1), weights_of(engine, 2)
    target, sampler = Target(old), sampler_of(engine)
    moving = submit(sampler, InflightClient(target), PROMPT)
    still = submit(sampler, old, PROMPT)
    for _ in range(STEPS_BEFORE):
        sampler.step()
    target.snapshot = new
    finish(sampler)

    (moved,), (kept,) = moving.result().sequences, still.result().sequences
    # The first step yields two tokens: one from prefill, one from decode.
    switch = STEPS_BEFORE + 1
    expected = replay(folder, moved.tokens, [old] * switch + [new] * (TOKENS - switch))
    np.testing.assert_allclose(moved.logprobs, expected, atol=1e-4)
    with_old = replay(folder, moved.tokens, [old] * TOKENS)
    np.testing.assert_allclose(moved.logprobs[:switch], with_old[:switch], atol=1e-4)
    assert np.abs(moved.logprobs[switch:] - with_old[switch:]).max() > 0.1
    np.testing.assert_allclose(kept.logprobs, replay(folder, kept.tokens, [old] * TOKENS), atol=1e-4)
    assert kept.tokens[:switch].tolist() == moved.tokens[:switch].tolist()


def test_a_client_keeps_its_own_cache(folder: Path) -> None:
    engine = engine_of(folder)
    if "gpt2" in (folder / "config.json").read_text():
        pytest.skip("the transformers path has no prefix cache")
    old, new = weights_of(engine, 1), weights_of(engine, 2)
    target, sampler = Target(old), sampler_of(engine)
    client = InflightClient(target)
    first = submit(sampler, client, PROMPT)
    finish(sampler)
    target.snapshot = new
    (sequence,) = first.result().sequences
    next_turn = np.concatenate([PROMPT, sequence.tokens, PROMPT[:5]])
    asked = {owner: submit(sampler, owner, next_turn, 4) for owner in (client, InflightClient(target), old, new)}
    finish(sampler)

    hits = [future.result().prompt_cache_hit_tokens for future in asked.values()]
    assert hits == [len(PROMPT) + TOKENS - 1, 0, 0, 0], "the last sampled token was never run"
    assert first.result().prompt_cache_hit_tokens == 0


def test_cache_hits_are_counted_once_per_request(folder: Path) -> None:
    engine = engine_of(folder)
    sampler = sampler_of(engine)
    futures: list[Future[SampleResult]] = []
    for _ in range(2):
        future: Future[SampleResult] = Future()
        # More samples than run at once: the second part hits the first one's cached prompt.
        sampler.submit(None, SampleRequest(PROMPT, num_samples=20, max_tokens=3, stop_tokens=()), future)
        finish(sampler)
        futures.append(future)
    reused = len(PROMPT) - 1 if "gpt2" not in (folder / "config.json").read_text() else 0
    assert [future.result().prompt_cache_hit_tokens for future in futures] == [0, reused]
