"""Whole training runs through the real SDK."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
import pytest
import tinker
from tinker import types

from searchr1_async.local import checkpoint_files as checkpoints
from searchr1_async.local.backend import Backend
from searchr1_async.local.checkpoint_files import CheckpointStore
from searchr1_async.local.process import Latency
from searchr1_async.local.scripted_backend import ScriptedBackend
from tests.local.provenance_data import SampledTurn, datum_of
from tests.local.serving import KEY, Served, datum, rest, sdk, service_thread, successors, until

pytestmark = pytest.mark.anyio

PROMPT = types.ModelInput.from_ints([5, 6, 7])
PARAMS = types.SamplingParams(max_tokens=8)
EXAMPLE = datum([1, 2, 3, 4], weights=[1.0, 1.0, 1.0])
RL_EXAMPLE = datum([1, 2, 3, 4], logprobs=[-1.0, -1.0, -1.0], advantages=[1.0, -0.5, 0.5])


async def loss_of(trainer: tinker.TrainingClient) -> float:
    return (await trainer.forward([EXAMPLE], "cross_entropy")).metrics["loss:sum"]


async def train(trainer: tinker.TrainingClient, steps: int = 1) -> None:
    for _ in range(steps):
        gradient = trainer.forward_backward([EXAMPLE], "cross_entropy")
        step = trainer.optim_step(types.AdamParams(learning_rate=0.1))
        await gradient
        await step


async def test_a_model_is_trained_and_sampled(service: tinker.ServiceClient) -> None:
    trainer = await service.create_lora_training_client(base_model="scripted", rank=4, seed=1)
    info = trainer.get_info()
    assert (info.model_data.model_name, info.lora_rank, info.is_lora) == ("scripted", 4, True)
    seen = []
    for _ in range(3):
        sampler = await trainer.save_weights_and_get_sampling_client()
        response = await sampler.sample(PROMPT, 2, PARAMS, include_prompt_logprobs=True, topk_sample_logprobs=2)
        assert [list(sequence.tokens) for sequence in response.sequences] == [[6, 7, 8, 2]] * 2
        assert len({sequence.sequence_id for sequence in response.sequences}) == 2
        assert response.prompt_logprobs is not None
        assert response.prompt_logprobs[0] is None
        first = (response.sequences[0].logprobs or [])[0]
        assert (await sampler.compute_logprobs(types.ModelInput.from_ints([5, 6])))[1] == first
        seen.append(first)
        await train(trainer)
    assert len(set(seen)) == 3, "each version has its own probabilities"


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling", "ppo", "cispo"])
async def test_every_loss(service: tinker.ServiceClient, loss_fn: Any) -> None:
    trainer = await service.create_lora_training_client(base_model="scripted")
    example = EXAMPLE if loss_fn == "cross_entropy" else RL_EXAMPLE
    result = await trainer.forward_backward([example, example], loss_fn)
    assert "loss:sum" in result.metrics
    assert [len(output["logprobs"].data) for output in result.loss_fn_outputs] == [3, 3]
    assert (await trainer.optim_step(types.AdamParams())).metrics


def scripted(folder: Path) -> Backend:
    return ScriptedBackend(successors)


def tiny_model(folder: Path) -> Backend:
    pytest.importorskip("torch")
    from searchr1_async.local.torch_backend import TorchBackend
    from searchr1_async.testing import make_tiny_model

    if not (folder / "config.json").exists():
        make_tiny_model(folder)
    return TorchBackend.load(str(folder), threads=1, dtype="float32")


async def roll_out(
    sampler: tinker.SamplingClient, prompt: list[int], appended: list[list[int]], samples: int = 1
) -> list[list[SampledTurn]]:
    """Rolls out episodes that share their first prompt, with one more turn after each appended run."""
    episodes: list[list[SampledTurn]] = []
    first = await sampler.sample(types.ModelInput.from_ints(prompt), samples, PARAMS)
    for sequence in first.sequences:
        turns = [SampledTurn(sequence.sequence_id, prompt, sequence.tokens, sequence.logprobs or [])]
        for run in appended:
            text = [*turns[-1].prompt, *turns[-1].tokens, *run]
            (more,) = (await sampler.sample(types.ModelInput.from_ints(text), 1, PARAMS)).sequences
            turns.append(SampledTurn(more.sequence_id, text, more.tokens, more.logprobs or []))
        episodes.append(turns)
    return episodes


@pytest.mark.parametrize("make_backend", [scripted, tiny_model])
async def test_stable_reinforce_learns_from_recorded_sequences(tmp_path: Path, make_backend: Any) -> None:
    """Two episodes of three turns with a shared first prompt; on-policy, the gradient equals importance sampling's."""
    backend = await anyio.to_thread.run_sync(make_backend, tmp_path / "model")
    with service_thread(tmp_path / "store", backend) as served:
        async with sdk(served.url) as service:
            trainer = await service.create_lora_training_client(base_model=backend.model_name, rank=4, seed=0)
            await train(trainer)
            sampler = await trainer.save_weights_and_get_sampling_client(record_stability_info=True)
            episodes = await roll_out(sampler, [5, 6, 7], [[9, 10], []], samples=2)
            data = [datum_of(turns, advantage) for turns, advantage in zip(episodes, (1.0, -0.5), strict=True)]
            norms = {}
            for loss_fn in ("importance_sampling", "stable_reinforce"):
                result = await trainer.forward_backward(data, loss_fn)
                assert result.metrics["ratio_min:min"] == pytest.approx(1.0, abs=1e-3)
                assert result.metrics["ratio_max:max"] == pytest.approx(1.0, abs=1e-3)
                step = await trainer.optim_step(types.AdamParams(learning_rate=0.0))
                assert step.metrics is not None
                norms[loss_fn] = step.metrics["grad_norm" if "grad_norm" in step.metrics else "unclipped_grad_l2"]
            assert norms["stable_reinforce"] == pytest.approx(norms["importance_sampling"], rel=1e-3)
            assert norms["stable_reinforce"] > 0.0
            forward = await trainer.forward(data, "stable_reinforce", {"alpha": 0.5})
            assert "loss:sum" in forward.metrics
            bare = dataclasses.replace(
                data[0], loss_fn_inputs={k: v for k, v in data[0].loss_fn_inputs.items() if k != "logprobs"}
            )
            assert (await trainer.forward([bare], "stable_reinforce")).metrics.keys() == forward.metrics.keys()


@pytest.mark.parametrize("make_backend", [scripted, tiny_model])
async def test_in_flight_samplers_share_weights_and_keep_their_own_cache(tmp_path: Path, make_backend: Any) -> None:
    backend = await anyio.to_thread.run_sync(make_backend, tmp_path / "model")
    with service_thread(tmp_path / "store", backend) as served:
        async with sdk(served.url) as service:
            trainer = await service.create_lora_training_client(base_model=backend.model_name, rank=4, seed=0)

            async def save(kind: Any) -> tinker.SamplingClient:
                return await trainer.save_weights_and_get_sampling_client(record_stability_info=True, kind=kind)

            async def hits(sampler: tinker.SamplingClient, samples: int = 1) -> int:
                # A different prefix than the prompts whose log-probabilities are computed.
                prompt = types.ModelInput.from_ints([9, 8, 7])
                return (await sampler.sample(prompt, samples, PARAMS)).prompt_cache_hit_tokens

            first, snapshot = await save("inflight"), await save("snapshot")
            before = await first.compute_logprobs(PROMPT)
            assert before == await snapshot.compute_logprobs(PROMPT)
            assert [await hits(first, 3) for _ in range(2)] == [0, 2], (
                "counted once, regardless of the number of samples"
            )
            await train(trainer, 2)
            assert await first.compute_logprobs(PROMPT) == before, "weights only change on save"
            second, third = await save("inflight"), await save("inflight")
            after = [await sampler.compute_logprobs(PROMPT) for sampler in (first, second, third)]
            assert after[0] == after[1] == after[2] != before
            assert await snapshot.compute_logprobs(PROMPT) == before
            assert await hits(first) == 2, "the cache survives new weights"
            assert [await hits(sampler) for sampler in (second, third, snapshot)] == [0, 0, 0], "each has its own"
            (turns,) = await roll_out(second, [5, 6, 7], [[9]])
            await trainer.forward_backward([datum_of(turns)], "stable_reinforce")


async def test_a_running_sample_continues_with_weights_saved_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    # A save runs after the next token, not after a second of sampling.
    monkeypatch.setattr("searchr1_async.local.torch_backend.SAMPLING_QUANTUM_SECONDS", 0.0)
    backend = await anyio.to_thread.run_sync(tiny_model, tmp_path / "model")
    with service_thread(tmp_path / "store", backend) as served:
        async with sdk(served.url) as service:
            trainer = await service.create_lora_training_client(base_model=backend.model_name, rank=4, seed=0)
            await train(trainer)
            moving = await trainer.save_weights_and_get_sampling_client(record_stability_info=True, kind="inflight")
            still = await trainer.save_weights_and_get_sampling_client()
            await train(trainer)
            long = types.SamplingParams(max_tokens=300, stop=[], seed=3)
            running = asyncio.ensure_future(moving.sample(PROMPT, 1, long))
            await still.sample(PROMPT, 1, PARAMS)  # runs after the long one has started
            await trainer.save_weights_and_get_sampling_client(kind="inflight")
            assert not running.done()
            sequence = (await running).sequences[0]
            text = [5, 6, 7, *sequence.tokens]
            old = (await still.compute_logprobs(types.ModelInput.from_ints(text)))[3:]
            difference = np.abs(np.array(old, np.float32) - np.array(sequence.logprobs, np.float32))
            assert difference[0] < 1e-3
            assert difference[-50:].max() > 0.1
            turn = SampledTurn(sequence.sequence_id, [5, 6, 7], sequence.tokens, sequence.logprobs or [])
            result = await trainer.forward([datum_of([turn])], "stable_reinforce")
            assert result.metrics["ratio_min:min"] < 0.9, "recorded log-probabilities are from both weights"


async def test_what_was_not_recorded_in_this_session_is_refused(served: Served, service: tinker.ServiceClient) -> None:
    trainer = await service.create_lora_training_client(base_model="scripted")
    (unrecorded,) = await roll_out(await trainer.save_weights_and_get_sampling_client(), [5, 6], [])
    recording = await trainer.save_weights_and_get_sampling_client(record_stability_info=True)
    (recorded,) = await roll_out(recording, [5, 6], [])
    async with sdk(served.url) as other:
        stranger = await other.create_sampling_client(base_model="scripted", record_stability_info=True)
        (foreign,) = await roll_out(stranger, [5, 6], [])
        for turns in (unrecorded, foreign):
            with pytest.raises(tinker.RequestFailedError) as refused:
                await trainer.forward_backward([datum_of(recorded), datum_of(turns)], "stable_reinforce")
            assert refused.value.category == types.RequestErrorCategory.User
            assert f"data[1].model_input_spans[0]: sequence '{turns[0].sequence_id}'" in str(refused.value)
            assert "was not recorded: sample with record_stability_info=True" in str(refused.value)
    with pytest.raises(tinker.RequestFailedError, match=r"data\[0\].model_input_spans: missing"):
        await trainer.forward_backward([RL_EXAMPLE], "stable_reinforce")
    await trainer.forward_backward([datum_of(recorded)], "stable_reinforce")


async def test_recorded_sequences_expire(tmp_path: Path) -> None:
    with service_thread(tmp_path, sequence_life=0.0) as served:
        async with sdk(served.url) as service:
            trainer = await service.create_lora_training_client(base_model="scripted")
            sampler = await trainer.save_weights_and_get_sampling_client(record_stability_info=True)
            (turns,) = await roll_out(sampler, [5, 6], [])
            with pytest.raises(tinker.RequestFailedError, match="within 0 hours of its last use"):
                await trainer.forward_backward([datum_of(turns)], "stable_reinforce")


async def test_a_custom_loss(service: tinker.ServiceClient) -> None:
    """``forward_backward_custom`` with cross entropy gives the same weights as ``cross_entropy``."""

    def cross_entropy(data: Any, logprobs: Any) -> Any:
        return -sum(row.sum() for row in logprobs), {"mine": 7.0}

    after = []
    for custom in (False, True):
        trainer = await service.create_lora_training_client(base_model="scripted")
        if custom:
            result = await trainer.forward_backward_custom([EXAMPLE], cross_entropy)
            assert result.metrics["mine"] == 7.0
        else:
            await trainer.forward_backward([EXAMPLE], "cross_entropy")
        await trainer.optim_step(types.AdamParams(learning_rate=0.1))
        after.append(await loss_of(trainer))
    assert after[0] == pytest.approx(after[1], rel=1e-6)


async def test_many_chunks_are_one_batch(service: tinker.ServiceClient) -> None:
    """The SDK splits a batch into chunks of 1024 and posts the first chunk last."""
    trainer = await service.create_lora_training_client(base_model="scripted")
    lengths = [2 + index % 5 for index in range(2500)]
    batch = [datum(list(range(1, length + 2)), weights=[1.0] * length) for length in lengths]
    result = await trainer.forward_backward(batch, "cross_entropy")
    assert [len(output["logprobs"].data) for output in result.loss_fn_outputs] == lengths
    await train(trainer)


async def test_errors_reach_the_caller(service: tinker.ServiceClient) -> None:
    trainer = await service.create_lora_training_client(base_model="scripted")
    with pytest.raises(tinker.RequestFailedError, match="needs loss_fn_inputs") as wrong:
        await trainer.forward_backward([EXAMPLE], "ppo")
    assert wrong.value.category == types.RequestErrorCategory.User
    await train(trainer)
    with pytest.raises(tinker.RequestFailedError, match="unknown base model 'other'"):
        await service.create_lora_training_client(base_model="other")
    with pytest.raises(tinker.APIStatusError, match="unknown base model 'other'"):
        await service.create_sampling_client(base_model="other")
    with pytest.raises(tinker.NotFoundError, match="does not exist"):
        await service.create_sampling_client(model_path="tinker://run/sampler_weights/none")


async def test_a_wrong_key_is_refused_at_once(served: Served) -> None:
    start = time.monotonic()
    with pytest.raises(tinker.AuthenticationError):
        async with sdk(served.url, "tml-wrong"):
            pass
    assert time.monotonic() - start < 5


async def test_cancelling_the_caller_cancels_the_sample(tmp_path: Path) -> None:
    backend = ScriptedBackend(successors, latency=Latency(prefill=1200.0), max_concurrent=1)
    with service_thread(tmp_path, backend) as served:
        async with sdk(served.url) as service:
            sampler = await service.create_sampling_client(base_model="scripted")

            async def started(count: int) -> bool:
                return len(backend.served) == count

            for count in (1, 2):
                waiting = asyncio.ensure_future(sampler.sample(PROMPT, 1, PARAMS))
                await until(lambda count=count: started(count))
                # The SDK can cancel only requests whose id it has received; after these calls it has.
                for _ in range(2):
                    await service.create_sampling_client(base_model="scripted")
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting


@pytest.mark.parametrize("shared_polls", [True, False])
async def test_many_samples_at_once(tmp_path: Path, shared_polls: bool) -> None:
    backend = ScriptedBackend(successors, latency=Latency(jitter=1.0, floor=0.01))
    with service_thread(tmp_path, backend, shared_polls=shared_polls) as served:
        async with sdk(served.url) as service:
            sampler = await service.create_sampling_client(base_model="scripted")
            responses = await asyncio.gather(*[sampler.sample(PROMPT, 1, PARAMS) for _ in range(200)])
            assert all(list(response.sequences[0].tokens) == [6, 7, 8, 2] for response in responses)
            with pytest.raises(tinker.RequestFailedError, match="at least 1"):
                await sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=0))


async def test_back_pressure_is_not_an_error(tmp_path: Path) -> None:
    backend = ScriptedBackend(successors, latency=Latency(floor=0.05), max_concurrent=4)
    with service_thread(tmp_path, backend, max_samples=8) as served:
        async with sdk(served.url) as service:
            sampler = await service.create_sampling_client(base_model="scripted")
            responses = await asyncio.gather(*[sampler.sample(PROMPT, 1, PARAMS) for _ in range(24)])
            assert len(responses) == 24


@pytest.mark.parametrize("make_backend", [scripted, tiny_model])
async def test_a_run_continues_in_a_new_service(tmp_path: Path, make_backend: Any) -> None:
    """Saved, then restored by another service in the same folder, with and without optimizer state."""
    backend = await anyio.to_thread.run_sync(make_backend, tmp_path / "model")
    store = tmp_path / "store"
    with service_thread(store, backend) as served:
        async with sdk(served.url) as service:
            trainer = await service.create_lora_training_client(base_model=backend.model_name, rank=4, seed=0)
            await train(trainer, 3)
            state = (await trainer.save_state("mid", user_metadata={"step": "3"})).path
            weights = (await trainer.save_weights_for_sampler("mid")).path
            sampler = await service.create_sampling_client(model_path=weights)
            scores = await sampler.compute_logprobs(PROMPT)
            await train(trainer, 2)
            expected = await loss_of(trainer)
    backend = await anyio.to_thread.run_sync(make_backend, tmp_path / "model")
    with service_thread(store, backend) as served:
        async with sdk(served.url) as service:
            sampler = await service.create_sampling_client(model_path=weights)
            assert sampler.get_base_model() == backend.model_name
            assert (await sampler.compute_logprobs(PROMPT))[1:] == pytest.approx(scores[1:], rel=1e-4)
            resumed = await service.create_training_client_from_state_with_optimizer(state)
            assert resumed.get_info().lora_rank == 4
            await train(resumed, 2)
            assert await loss_of(resumed) == pytest.approx(expected, rel=1e-4)
            fresh = await service.create_training_client_from_state(state, base_model=backend.model_name)
            await train(fresh, 2)
            assert await loss_of(fresh) != pytest.approx(expected, rel=1e-4)
            assert resumed.model_id != fresh.model_id
            assert not state.startswith(f"tinker://{resumed.model_id}/"), "ids of two processes never collide"
            with pytest.raises(tinker.RequestFailedError, match="no optimizer state"):
                await service.create_training_client_from_state_with_optimizer(weights)


async def test_checkpoints_are_listed_changed_and_deleted(tmp_path: Path) -> None:
    with service_thread(tmp_path) as served:
        async with sdk(served.url) as service:
            client = await rest(served)
            trainer = await service.create_lora_training_client(base_model="scripted", rank=4)
            state = (await trainer.save_state("a", user_metadata={"step": "1"})).path
            weights = (await trainer.save_weights_for_sampler("b", ttl_seconds=3600)).path
            with pytest.raises(tinker.RequestFailedError, match="overwrite=True"):
                await trainer.save_state("a")
            await trainer.save_state("a", overwrite=True, user_metadata={"step": "2"})

            listing = {item.tinker_path: item for item in (await client.list_user_checkpoints()).checkpoints}
            assert listing.keys() == {state, weights}
            assert listing[state].user_metadata == {"step": "2"}
            assert (listing[state].size_bytes or 0) > 0
            assert listing[state].expires_at is None
            assert listing[weights].expires_at is not None
            assert (listing[state].checkpoint_type, listing[weights].checkpoint_type) == ("training", "sampler")
            run = await client.get_training_run_by_tinker_path(state)
            assert (run.training_run_id, run.base_model, run.lora_rank) == (trainer.model_id, "scripted", 4)
            assert run.last_checkpoint is not None
            assert run.last_checkpoint.tinker_path == state
            assert (await client.list_training_runs()).cursor.total_count == 1
            info = await client.get_weights_info_by_tinker_path(state)
            assert (info.base_model, info.lora_rank, info.train_mlp) == ("scripted", 4, True)

            await client.set_checkpoint_ttl_from_tinker_path(weights, None)
            (kept,) = [
                item
                for item in (await client.list_checkpoints(trainer.model_id)).checkpoints
                if item.tinker_path == weights
            ]
            assert kept.expires_at is None
            await client.delete_checkpoint_from_tinker_path(weights)
            assert [item.tinker_path for item in (await client.list_user_checkpoints()).checkpoints] == [state]
            with pytest.raises(tinker.NotFoundError):
                await client.get_weights_info_by_tinker_path(weights)

            sessions = (await client.list_sessions()).sessions
            assert (await client.get_session(sessions[0])).training_run_ids == [trainer.model_id]


async def test_an_expired_checkpoint_is_refused(tmp_path: Path) -> None:
    with service_thread(tmp_path) as served:
        async with sdk(served.url) as service:
            trainer = await service.create_lora_training_client(base_model="scripted")
            state = (await trainer.save_state("brief", ttl_seconds=1)).path

            async def expired() -> bool:
                return time.time() >= saved + 1

            saved = time.time()
            await until(expired)
            with pytest.raises(tinker.RequestFailedError, match="expired"):
                await service.create_training_client_from_state(state)
    assert CheckpointStore(tmp_path).listing(now=0.0) == []


async def test_a_full_disk_is_reported_and_training_continues(
    served: Served, service: tinker.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = await service.create_lora_training_client(base_model="scripted")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(served.folder)
        patch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(tinker.RequestFailedError, match=r"disk is full: .* bytes in .* more than are free") as full:
            await trainer.save_state("big")
        assert str(served.folder) in str(full.value)
        assert full.value.category == types.RequestErrorCategory.Server
    await train(trainer)
    await trainer.save_state("big")


async def test_a_pickled_sampler_works_elsewhere(served: Served, service: tinker.ServiceClient) -> None:
    trainer = await service.create_lora_training_client(base_model="scripted")
    sampler = await trainer.save_weights_and_get_sampling_client()
    handle = sampler.get_sampler_handle()
    twin = await anyio.to_thread.run_sync(lambda: tinker.SamplingClient.from_sampler_handle(handle, api_key=KEY))
    responses = [await each.sample(PROMPT, 1, PARAMS) for each in (sampler, twin)]
    assert list(responses[0].sequences[0].tokens) == list(responses[1].sequences[0].tokens)
