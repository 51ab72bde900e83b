"""The choice of tokens, and samples whose weights are replaced while they run."""

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
from searchr1_async.local.sampler import ChoiceRule, Sampler, choose
from searchr1_async.local.torch_models import Engine, load_engine
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
            logits = runner.decode([handle], [[int(tokens[index - 1])]], [plan[index]])[0]
            runner.accept(handle, 1)
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


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("stop", [(), (7, 11, 13)])
def test_guesses_change_no_token(tmp_path: Path, at_once: int, stop: tuple[int, ...]) -> None:
    """A small vocabulary makes pairs of tokens come again, so that guesses are made and some are right."""
    folder = make_tiny_model(tmp_path, num_hidden_layers=2, context=256)
    outcomes: list[list[tuple[list[int], np.ndarray, str]]] = []
    steps = []
    for free_rows in (1, 6):
        engine = engine_of(folder)
        engine.runner.free_rows = free_rows
        sampler = sampler_of(engine)
        futures: list[Future[SampleResult]] = []
        for seed in range(at_once):
            request = SampleRequest(np.tile(PROMPT[:3], 5), max_tokens=TOKENS, stop_tokens=stop, seed=seed, top_k=4)
            futures.append(Future())
            sampler.submit(None, request, futures[-1])
        count = 0
        while sampler.busy:
            sampler.step()
            count += 1
        sequences = [future.result().sequences[0] for future in futures]
        outcomes.append([(s.tokens.tolist(), s.logprobs, s.stop_reason) for s in sequences])
        steps.append(count)
    for (tokens, logprobs, reason), (guessed, guessed_logprobs, guessed_reason) in zip(*outcomes, strict=True):
        assert (tokens, reason) == (guessed, guessed_reason)
        np.testing.assert_allclose(logprobs, guessed_logprobs, atol=1e-4)
    if not stop:
        assert steps[1] < steps[0], "some guesses were right"


def test_guesses_end_with_the_context(tmp_path: Path) -> None:
    engine = engine_of(make_tiny_model(tmp_path, num_hidden_layers=2, context=64))
    engine.runner.free_rows = 6
    sampler = sampler_of(engine)
    future = submit(sampler, None, PROMPT, 64 - len(PROMPT))
    finish(sampler)
    assert len(future.result().sequences[0].tokens) == 64 - len(PROMPT)


LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])


def frequencies(temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, draws: int = 20_000) -> np.ndarray:
    # A grid of draws instead of random ones makes frequencies exact to one draw.
    rules = [ChoiceRule(temperature, top_k, top_p, (i + 0.5) / draws) for i in range(draws if draws else 1)]
    tokens = choose(LOGITS.expand(len(rules), -1).contiguous(), rules).tokens
    return np.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, 0).numpy()
    np.testing.assert_allclose(frequencies(temperature), expected, atol=2e-4)


def test_top_k_keeps_the_k_likeliest_in_proportion() -> None:
    kept = torch.softmax(torch.where(LOGITS >= 1.0, LOGITS, -torch.inf), 0).numpy()
    np.testing.assert_allclose(frequencies(top_k=2, draws=2000), kept, atol=1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = torch.softmax(LOGITS, 0)
    p = float(probabilities[2] + probabilities[1]) - 1e-4
    kept = torch.softmax(torch.where(LOGITS >= 1.0, LOGITS, -torch.inf), 0).numpy()
    np.testing.assert_allclose(frequencies(top_p=p, draws=2000), kept, atol=1e-3)
    assert frequencies(top_p=1e-9, draws=100)[2] == 1.0


def test_log_probabilities_are_those_of_the_untempered_distribution() -> None:
    rules = [ChoiceRule(0.0, -1, 1.0, 0.3), ChoiceRule(0.3, -1, 1.0, 0.9), ChoiceRule(1.0, 1, 1.0, 0.9)]
    choices = choose(LOGITS.expand(3, -1).contiguous(), rules)

    assert choices.tokens.tolist() == [2, 2, 2]
    np.testing.assert_allclose(choices.logprobs, torch.log_softmax(LOGITS, 0)[2].expand(3).numpy(), rtol=1e-6)


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, -1).contiguous()
    rules = [ChoiceRule(1.0, -1, 1.0, uniform) for uniform in (0.0, 0.5, np.nextafter(1.0, 0.0))]
    assert choose(logits, rules).tokens.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "rule", [ChoiceRule(0.0, -1, 1.0, 0.5), ChoiceRule(1.0, -1, 1.0, 0.5), ChoiceRule(1.0, 3, 0.9, 0.5)]
)
def test_non_finite_logits_choose_nothing(rule: ChoiceRule) -> None:
    logits = torch.stack([LOGITS, torch.full((5,), torch.nan)])
    tokens = choose(logits, [rule, rule]).tokens
    assert tokens[0] >= 0
    assert tokens[1] == -1
