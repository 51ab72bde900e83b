"""The order of a model's requests, and the results of training requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tinker import PromptProvenanceSpan, SampledProvenanceSpan, types

from searchr1_async.local.backend import Backend
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.local.torch_backend import TorchBackend
from searchr1_async.local.trainable_models import AlreadyTaken, NumberedQueue
from searchr1_async.testing import make_tiny_model
from tests.local.serving import datum, sdk, service_thread, successors

pytestmark = pytest.mark.anyio

COLUMNS = """
step epoch batch progress learning_rate num_sequences num_tokens num_loss_tokens train_mean_nll train_mean_bpb time_total
progress/batch progress/done_frac optim/lr optim/entropy time/total reward/total total_loss
"""
"""Row keys set by the loops of tinker-cookbook 0.5.8 and 0.6.1, which then merge in our metrics."""
RESERVED = "_step _runtime _timestamp _wandb project run timestamp time metrics"
"""Keys reserved by Weights & Biases and Trackio."""


def scripted(folder: Path) -> Backend:
    return ScriptedBackend(successors)


def tiny_model(folder: Path) -> Backend:
    return TorchBackend.load(str(make_tiny_model(folder)), threads=1, dtype="float32", device="cpu", max_batch=4)


@pytest.mark.parametrize("make_backend", [scripted, tiny_model])
async def test_no_metric_has_a_name_used_by_clients(tmp_path: Path, make_backend: Any) -> None:
    """A client writes one row per step: its own columns, then all service metrics over them."""
    backend = await anyio.to_thread.run_sync(make_backend, tmp_path / "model")
    example = datum([1, 2, 3, 4], logprobs=[-1.0, -1.0, -1.0], advantages=[1.0, -0.5, 0.5])
    with service_thread(tmp_path / "store", backend) as served:
        async with sdk(served.url) as service:
            trainer = await service.create_lora_training_client(base_model=backend.model_name, rank=4)
            for loss_fn in ("importance_sampling", "ppo"):
                gradient = await trainer.forward_backward([example], loss_fn)
                step = await trainer.optim_step(types.AdamParams(learning_rate=0.1))
                names = {*gradient.metrics, *(step.metrics or {})}
                assert names
                assert names & {*COLUMNS.split(), *RESERVED.split()} == set()
                # The SDK can reduce this name over the chunks of a batch.
                assert all(":" in name for name in gradient.metrics)


@pytest.mark.parametrize("make_backend", [scripted, tiny_model])
async def test_prompts_padded_with_zeros_learn_the_same(tmp_path: Path, make_backend: Any) -> None:
    """tinker-cookbook's RL loop pads unsampled targets with zeros, with provenance."""
    backend = await anyio.to_thread.run_sync(make_backend, tmp_path / "model")
    prompt, losses = [5, 6, 7, 8], []
    with service_thread(tmp_path / "store", backend) as served:
        async with sdk(served.url) as service:
            trainer = await service.create_lora_training_client(base_model=backend.model_name, rank=4, seed=0)
            sampler = await trainer.save_weights_and_get_sampling_client(record_stability_info=True)
            params = types.SamplingParams(max_tokens=6, seed=1)
            (sequence,) = (await sampler.sample(types.ModelInput.from_ints(prompt), 1, params)).sequences
            sampled, name = list(sequence.tokens), sequence.sequence_id
            for padded in (False, True):
                before = [0] * (len(prompt) - 1) if padded else prompt[1:]
                columns = {
                    "target_tokens": types.TensorData(data=[*before, *sampled], dtype="int64"),
                    "logprobs": types.TensorData(
                        data=[0.0] * len(before) + list(sequence.logprobs or []), dtype="float32"
                    ),
                    "advantages": types.TensorData(data=[0.0] * len(before) + [0.5] * len(sampled), dtype="float32"),
                }
                example = types.Datum(
                    model_input=types.ModelInput.from_ints([*prompt, *sampled[:-1]]), loss_fn_inputs=columns
                ).with_provenance(
                    model_input=[
                        PromptProvenanceSpan(sequence_id=name, length=len(prompt)),
                        SampledProvenanceSpan(sequence_id=name, length=len(sampled) - 1),
                    ],
                    loss_fn_inputs=[
                        PromptProvenanceSpan(sequence_id=name, offset=1, length=len(prompt) - 1),
                        SampledProvenanceSpan(sequence_id=name, length=len(sampled)),
                    ],
                )
                losses.append((await trainer.forward([example], "stable_reinforce")).metrics["loss:sum"])
    assert losses[0] != 0.0
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@given(st.permutations(range(1, 30)))
def test_any_order_of_arrival_gives_the_order_of_the_numbers(arrivals: list[int]) -> None:
    queue: NumberedQueue[int] = NumberedQueue()
    released = [item for number in arrivals for item in queue.offer(number, number, now=0.0)]
    assert released == sorted(arrivals)
    assert queue.deadline() is None


def test_chunks_posted_with_the_first_one_last() -> None:
    queue: NumberedQueue[str] = NumberedQueue()
    assert queue.offer(2, "second", 0.0) == []
    assert queue.offer(3, "third", 0.0) == []
    assert queue.missing() == range(1, 2)
    assert queue.offer(1, "first", 0.0) == ["first", "second", "third"]


def test_a_number_is_taken_once() -> None:
    queue: NumberedQueue[str] = NumberedQueue()
    queue.offer(1, "ran", 0.0)
    queue.offer(3, "waits", 0.0)
    for number in (1, 3):
        with pytest.raises(AlreadyTaken):
            queue.offer(number, "again", 0.0)
    assert queue.offer(2, "late", 0.0) == ["late", "waits"]


def test_items_without_a_number_come_in_order_of_arrival() -> None:
    queue: NumberedQueue[str] = NumberedQueue()
    assert queue.offer(None, "a", 0.0) == ["a"]
    assert queue.offer(3, "c", 0.0) == []
    assert queue.offer(None, "d", 0.0) == []
    assert queue.offer(2, "b", 0.0) == ["b", "c", "d"]


def test_waiting_for_a_missing_number_ends() -> None:
    queue: NumberedQueue[str] = NumberedQueue(patience=10.0)
    queue.offer(1, "ran", 0.0)
    queue.offer(4, "d", 5.0)
    queue.offer(3, "c", 6.0)
    assert queue.deadline() == 15.0
    assert queue.give_up(14.9) == (range(0), [])
    assert queue.give_up(15.0) == (range(2, 3), ["c", "d"])
    with pytest.raises(AlreadyTaken):
        queue.offer(2, "too late", 16.0)
    assert queue.offer(5, "e", 16.0) == ["e"]


def test_progress_restarts_the_patience() -> None:
    queue: NumberedQueue[str] = NumberedQueue(patience=10.0)
    queue.offer(2, "b", 0.0)
    queue.offer(4, "d", 1.0)
    assert queue.offer(1, "a", 8.0) == ["a", "b"]
    assert queue.deadline() == 18.0


def test_draining_returns_waiting_items() -> None:
    queue: NumberedQueue[str] = NumberedQueue()
    queue.offer(3, "c", 0.0)
    queue.offer(2, "b", 0.0)
    assert queue.drain() == ["b", "c"]
    assert queue.deadline() is None


class QueueMachine(RuleBasedStateMachine):
    """Every item is either released once, in increasing order, or dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: NumberedQueue[int] = NumberedQueue(patience=5.0)
        self.now = 0.0
        self.taken: set[int] = set()
        self.released: list[int] = []
        self.dropped: set[int] = set()

    @rule(number=st.integers(1, 20), wait=st.floats(0, 4))
    def offer(self, number: int, wait: float) -> None:
        self.now += wait
        over = number in self.taken or number < self.queue.next_number
        try:
            self.released += self.queue.offer(number, number, self.now)
        except AlreadyTaken:
            assert over
        else:
            assert not over
            self.taken.add(number)

    @rule(wait=st.floats(0, 8))
    def give_up(self, wait: float) -> None:
        self.now += wait
        _, dropped = self.queue.give_up(self.now)
        self.dropped.update(dropped)

    @invariant()
    def nothing_is_lost_or_out_of_order(self) -> None:
        assert self.released == sorted(set(self.released))
        waiting = self.taken - set(self.released) - self.dropped
        assert (self.queue.deadline() is not None) == bool(waiting)
        assert all(number >= self.queue.next_number for number in waiting)


TestQueueMachine = QueueMachine.TestCase
