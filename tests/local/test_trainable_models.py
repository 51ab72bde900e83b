"""Results of training requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from tinker import PromptProvenanceSpan, SampledProvenanceSpan, types

from searchr1_async.local.backend import Backend
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.local.torch_backend import TorchBackend
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
