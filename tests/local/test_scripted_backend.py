from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.local import scripted_backend as scripted_model
from searchr1_async.local.backend import AdamParams, Datum, LoraConfig, SampleRequest, UserFault
from searchr1_async.local.process import Latency, TimedReply, TrainingTimes
from searchr1_async.local.scripted_backend import PrefixCache, ScriptedBackend, Weights, logprobs_of
from tests.local.serving import read_log, successors

PROMPT = np.array([5, 6, 7], np.int32)
DEADLINE = 20.0


@pytest.fixture
def backends() -> Iterator[list[ScriptedBackend]]:
    opened: list[ScriptedBackend] = []
    yield opened
    for backend in opened:
        backend.close()


def make(backends: list[ScriptedBackend], reply: Any = successors, **more: Any) -> ScriptedBackend:
    backends.append(ScriptedBackend(reply, **more))
    return backends[-1]


def example(**columns: list[float]) -> Datum:
    inputs: dict[str, Any] = {name: np.array(values, np.float32) for name, values in columns.items()}
    return Datum(PROMPT, {"target_tokens": np.array([6, 7, 8]), **inputs})


def test_a_reply_is_cut_at_its_limit_and_at_stops(backends: list[ScriptedBackend]) -> None:
    backend = make(backends)

    def play(**more: Any) -> tuple[list[int], str]:
        (sequence,) = backend.sample(None, SampleRequest(PROMPT, **more)).result(DEADLINE).sequences
        assert len(sequence.logprobs) == len(sequence.tokens)
        return sequence.tokens.tolist(), sequence.stop_reason

    assert play() == ([6, 7, 8, 2], "stop")
    assert play(max_tokens=4) == ([6, 7, 8, 2], "stop")
    assert play(max_tokens=3) == ([6, 7, 8], "length")
    assert play(stop_tokens=(7,)) == ([6, 7], "stop")
    assert play(stop_tokens=(7,), max_tokens=1) == ([6], "length")


def test_the_same_seed_gives_the_same_reply(backends: list[ScriptedBackend]) -> None:
    def gamble(prompt: list[int], chance: random.Random) -> list[int]:
        return [chance.randrange(1000) for _ in range(8)]

    first, second = make(backends, gamble, seed=4), make(backends, gamble, seed=4)
    request = SampleRequest(PROMPT, num_samples=3)
    replies = [
        [sequence.tokens.tolist() for sequence in b.sample(None, request).result(DEADLINE).sequences] for b in backends
    ]
    assert replies[0] == replies[1]
    assert len({tuple(tokens) for tokens in replies[0]}) == 3
    seeded = SampleRequest(PROMPT, seed=9)
    again = [b.sample(None, seeded).result(DEADLINE).sequences[0].tokens.tolist() for b in (first, first, second)]
    assert again[0] == again[1] == again[2]


def test_prompt_and_top_logprobs_have_their_shapes(backends: list[ScriptedBackend]) -> None:
    request = SampleRequest(PROMPT, prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=3)
    result = make(backends).sample(None, request).result(DEADLINE)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs.shape == (3,)
    assert np.isnan(result.prompt_logprobs[0])
    assert result.topk_prompt is not None
    assert result.topk_prompt[0].shape == result.topk_prompt[1].shape == (3, 2)
    topk = result.sequences[0].topk
    assert topk is not None
    assert topk[0].shape == (4, 3)
    assert (np.diff(topk[1]) <= 0).all()


def test_latency_follows_its_formula() -> None:
    chance = random.Random(0)
    assert Latency(prefill=0.1, decode=1.0).draw(10, 2, chance) == pytest.approx(3.0)
    assert Latency(decode=1.0, floor=5.0).draw(10, 2, chance) == 5.0
    draws = [Latency(floor=2.0, jitter=0.5).draw(0, 0, chance) for _ in range(4000)]
    assert np.median(draws) == pytest.approx(2.0, rel=0.05)
    assert np.std(np.log(draws)) == pytest.approx(0.5, rel=0.05)


def test_samples_take_the_time_drawn_and_wait_for_a_free_place(backends: list[ScriptedBackend]) -> None:
    backend = make(backends, latency=Latency(floor=0.1), max_concurrent=2)
    start = time.monotonic()
    for future in [backend.sample(None, SampleRequest(PROMPT)) for _ in range(6)]:
        future.result(DEADLINE)
    assert time.monotonic() - start >= 0.3
    assert [request.seconds for request in backend.served] == [0.1] * 6


def test_a_cancelled_sample_frees_its_place(backends: list[ScriptedBackend]) -> None:
    first = True

    def reply(prompt: list[int], chance: random.Random) -> list[int]:
        nonlocal first
        started.set()
        return [1]

    started = threading.Event()
    backend = make(backends, reply, latency=Latency(prefill=1.0), max_concurrent=1)
    slow = backend.sample(None, SampleRequest(np.zeros(3600, np.int32)))
    waiting = backend.sample(None, SampleRequest(np.zeros(3600, np.int32)))
    quick = backend.sample(None, SampleRequest(np.zeros(1, np.int32)))
    assert started.wait(DEADLINE)
    assert waiting.cancel()
    assert slow.cancel()
    assert len(quick.result(DEADLINE).sequences) == 1


def test_thousands_of_timers_are_cheap(backends: list[ScriptedBackend]) -> None:
    backend = make(backends, latency=Latency(floor=0.5))
    threads = threading.active_count()
    futures = [backend.sample(None, SampleRequest(PROMPT)) for _ in range(3000)]
    assert threading.active_count() == threads
    for future in futures:
        future.result(DEADLINE)


@pytest.mark.parametrize("reply_error", [ValueError("script"), UserFault("no")])
def test_a_script_error_fails_its_sample(backends: list[ScriptedBackend], reply_error: Exception) -> None:
    def reply(prompt: list[int], chance: random.Random) -> list[int]:
        raise reply_error

    backend = make(backends, reply)
    with pytest.raises(type(reply_error)):
        backend.sample(None, SampleRequest(PROMPT)).result(DEADLINE)
    with pytest.raises(UserFault, match="exceed"):
        backend.sample(None, SampleRequest(np.zeros(40000, np.int32))).result(DEADLINE)


def test_text_needs_a_tokenizer(backends: list[ScriptedBackend]) -> None:
    backend = make(backends, lambda prompt, chance: "text")
    with pytest.raises(UserFault, match="tokenizer"):
        backend.sample(None, SampleRequest(PROMPT)).result(DEADLINE)


def test_sampler_and_trainer_agree_at_every_version(backends: list[ScriptedBackend]) -> None:
    backend = make(backends)
    adapter = backend.create_adapter(LoraConfig()).result(DEADLINE)
    seen = set()
    for _ in range(3):
        snapshot = backend.snapshot(adapter).result(DEADLINE)
        sampled = backend.sample(snapshot, SampleRequest(PROMPT)).result(DEADLINE).sequences[0]
        data = [example(weights=[1, 1, 1])]
        trained = backend.forward_backward(adapter, data, "cross_entropy", {}, False).result(DEADLINE)
        np.testing.assert_array_equal(trained.logprobs[0], sampled.logprobs[:3])
        assert trained.metrics["loss:sum"] == pytest.approx(-float(trained.logprobs[0].sum()), rel=1e-6)
        seen.add(trained.metrics["loss:sum"])
        backend.optim_step(adapter, AdamParams(learning_rate=0.1)).result(DEADLINE)
    assert sorted(seen, reverse=True) == list(dict.fromkeys(sorted(seen, reverse=True)))
    assert len(seen) == 3


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "stable_reinforce"])
def test_gradients_are_those_of_the_loss(backends: list[ScriptedBackend], loss_fn: str) -> None:
    """The accumulated gradient, from Adam's metrics, against a finite difference of the loss."""
    backend = make(backends)
    columns = {"weights": [1.0, 0.5, 2.0], "advantages": [1.0, -0.5, 2.0], "logprobs": [-0.9, -1.2, -0.3]}
    names = ("weights",) if loss_fn == "cross_entropy" else ("advantages", "logprobs")
    data = [example(**{name: columns[name] for name in names})]

    def loss_at(bias: float) -> float:
        state = {"bias": np.array([bias]), "version": np.array([0])}
        adapter = backend.import_adapter(LoraConfig(), state, optimizer=False).result(DEADLINE)
        return backend.forward_backward(adapter, data, loss_fn, {}, True).result(DEADLINE).metrics["loss:sum"]

    adapter = backend.create_adapter(LoraConfig()).result(DEADLINE)
    backend.forward_backward(adapter, data, loss_fn, {}, False)
    reported = backend.optim_step(adapter, AdamParams()).result(DEADLINE)["unclipped_grad_l2"]
    if loss_fn in ("cispo", "stable_reinforce"):
        # Their weight is constant in the gradient.
        lp = logprobs_of(data[0].loss_inputs["target_tokens"], Weights()).astype(float)
        advantages = np.array(columns["advantages"])
        weight = np.clip(np.exp(lp - np.array(columns["logprobs"])), 0, 4)
        if loss_fn == "stable_reinforce":
            weight = np.where(advantages > 0, 1.0, np.minimum(weight, 1.0))
        expected = abs(float(np.sum(weight * advantages * lp)))
    else:
        expected = abs(loss_at(1e-2) - loss_at(-1e-2)) / 2e-2
    assert reported == pytest.approx(expected, rel=2e-3)


def test_training_makes_rewarded_tokens_likelier(backends: list[ScriptedBackend]) -> None:
    backend = make(backends)
    adapter = backend.create_adapter(LoraConfig()).result(DEADLINE)
    losses = []
    for _ in range(20):
        result = backend.forward_backward(adapter, [example(weights=[1, 1, 1])], "cross_entropy", {}, False)
        losses.append(result.result(DEADLINE).metrics["loss:sum"])
        backend.optim_step(adapter, AdamParams(learning_rate=0.05))
    assert losses[-1] < 0.6 * losses[0]


def test_state_round_trips(backends: list[ScriptedBackend]) -> None:
    backend = make(backends)
    adapter = backend.create_adapter(LoraConfig()).result(DEADLINE)
    data = [example(weights=[1, 1, 1])]

    def step(adapter: Any) -> float:
        loss = backend.forward_backward(adapter, data, "cross_entropy", {}, False).result(DEADLINE).metrics["loss:sum"]
        backend.optim_step(adapter, AdamParams(learning_rate=0.1)).result(DEADLINE)
        return loss

    for _ in range(3):
        step(adapter)
    state = backend.export_adapter(adapter, optimizer=True).result(DEADLINE)
    twin = backend.import_adapter(LoraConfig(), state, optimizer=True).result(DEADLINE)
    fresh = backend.import_adapter(LoraConfig(), state, optimizer=False).result(DEADLINE)
    losses = [[step(each) for _ in range(3)] for each in (adapter, twin, fresh)]
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[2][0]
    assert losses[0][2] != losses[2][2], "without moments the optimizer diverges from it"


def test_training_runs_in_order_and_takes_its_time(backends: list[ScriptedBackend]) -> None:
    backend = make(backends, training=TrainingTimes(per_token=0.01, optim_step=0.05))
    adapter = backend.create_adapter(LoraConfig()).result(DEADLINE)
    start = time.monotonic()
    order: list[str] = []
    step = backend.optim_step(adapter, AdamParams())
    forward = backend.forward_backward(adapter, [example(weights=[1, 1, 1])] * 4, "cross_entropy", {}, False)
    step.add_done_callback(lambda _: order.append("step"))
    forward.add_done_callback(lambda _: order.append("forward"))
    forward.result(DEADLINE)
    assert time.monotonic() - start >= 0.17
    assert order == ["step", "forward"]


def test_wrong_losses_are_the_users_fault(backends: list[ScriptedBackend]) -> None:
    backend = make(backends)
    adapter = backend.create_adapter(LoraConfig()).result(DEADLINE)
    for loss_fn, message in (("reinforce", "Unknown loss_fn"), ("ppo", "'logprobs'")):
        with pytest.raises(UserFault, match=message):
            backend.forward_backward(adapter, [example(weights=[1, 1, 1])], loss_fn, {}, False).result(DEADLINE)


def test_closing_fails_what_is_open_and_writes_the_log(tmp_path: Path) -> None:
    backend = ScriptedBackend(successors, latency=Latency(prefill=100.0), latency_log=tmp_path / "latencies")
    opened = backend.sample(None, SampleRequest(PROMPT))
    backend.snapshot(backend.create_adapter(LoraConfig()).result(DEADLINE)).result(DEADLINE)
    backend.close()
    assert opened.cancelled()
    assert backend.sample(None, SampleRequest(PROMPT)).cancelled()
    assert read_log(tmp_path / "latencies") == backend.served
    assert [request.seconds for request in backend.served if request.kind == "sample"] == [300.0]


def test_a_timed_reply_has_its_own_latency_and_label(backends: list[ScriptedBackend]) -> None:
    chains = itertools.count()

    def reply(prompt: list[int], chance: random.Random) -> TimedReply:
        number = next(chains)
        return TimedReply([7] * (number + 1), seconds=0.01 * (number + 1), label=f"chain {number}")

    backend = make(backends, reply, latency=Latency(floor=100.0))
    began = time.monotonic()
    result = backend.sample(None, SampleRequest(PROMPT, num_samples=3)).result(DEADLINE)
    assert [len(sequence.tokens) for sequence in result.sequences] == [1, 2, 3]
    (request,) = backend.served
    assert began <= request.began <= time.monotonic() - 0.03
    assert (request.kind, request.tokens, request.seconds) == ("sample", 3, pytest.approx(0.03))
    assert [sequence.label for sequence in request.sequences] == ["chain 0", "chain 1", "chain 2"]
    assert [sequence.seconds for sequence in request.sequences] == pytest.approx([0.01, 0.02, 0.03])
    assert [sequence.tokens for sequence in request.sequences] == [1, 2, 3]


def test_the_log_has_all_training_calls(backends: list[ScriptedBackend]) -> None:
    """Calls submitted together run one after another and are logged with the version they see."""
    backend = make(backends, training=TrainingTimes(per_token=0.001, optim_step=0.02, save=0.03))
    adapter = backend.create_adapter(LoraConfig()).result(DEADLINE)
    data = [example(weights=[1, 1, 1])] * 2
    backend.forward_backward(adapter, data, "cross_entropy", {}, True)
    backend.forward_backward(adapter, data, "cross_entropy", {}, False)
    backend.optim_step(adapter, AdamParams())
    state = backend.export_adapter(adapter, optimizer=True)
    snapshot = backend.snapshot(adapter).result(DEADLINE)
    assert backend.sample(snapshot, SampleRequest(PROMPT)).result(DEADLINE)
    twin = backend.import_adapter(LoraConfig(), state.result(DEADLINE), optimizer=True).result(DEADLINE)
    backend.optim_step(twin, AdamParams()).result(DEADLINE)
    told = [(request.kind, request.version, request.tokens, request.examples) for request in backend.served]
    assert told == [
        ("create", 0, 0, 0),
        ("forward", 0, 6, 2),
        ("forward_backward", 0, 6, 2),
        ("optim_step", 0, 0, 0),
        ("export", 1, 0, 0),
        ("snapshot", 1, 0, 0),
        ("sample", 1, 3, 0),
        ("import", 1, 0, 0),
        ("optim_step", 1, 0, 0),
    ]
    assert [request.seconds for request in backend.served[1:6]] == pytest.approx([0.002, 0.006, 0.02, 0.03, 0.03])
    for before, after in itertools.pairwise(backend.served[1:6]):
        assert after.began == pytest.approx(before.ended)


words = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda ids: np.array(ids, np.int32))


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(st.tuples(words, words), max_size=12), words)
def test_hits_are_the_longest_prefix_that_was_run(runs: list[tuple[np.ndarray, np.ndarray]], asked: np.ndarray) -> None:
    cache = PrefixCache()
    for prompt, tokens in runs:
        cache.add(prompt, [tokens])
    run = [[*prompt.tolist(), *tokens.tolist()][:-1] for prompt, tokens in runs]
    longest = max((shared(text, asked.tolist()) for text in run), default=0)
    assert cache.hits(asked) == min(longest, len(asked) - 1)


def test_the_turns_of_an_episode_are_one_entry() -> None:
    cache, prompt = PrefixCache(), np.array([1, 2, 3], np.int32)
    for turn in range(4):
        assert cache.hits(prompt) == (0 if turn == 0 else len(prompt) - 2)
        cache.add(prompt, [np.array([4, 5], np.int32)])
        prompt = np.concatenate([prompt, np.array([4, 5, 6], np.int32)])
    assert len(cache._texts) == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted_model, "MOST_TOKENS", 100)
    cache = PrefixCache()
    for number in range(200):
        cache.add(np.full(10, number, np.int32), [np.array([1], np.int32)])
        assert cache._tokens <= 110
        assert cache.hits(np.full(10, number, np.int32)) == 9
