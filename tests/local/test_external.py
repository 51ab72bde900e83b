"""Download and import of adapters: SDK calls, command line and signed URLs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio.to_thread
import numpy as np
import pytest
import tinker
from safetensors.numpy import load_file, save_file
from tinker import types
from yarl import URL

from searchr1_async.local import listings as external
from searchr1_async.local.torch_backend import TorchBackend
from searchr1_async.testing import make_tiny_model
from tests.local.serving import KEY, Raw, Served, datum, rest, sdk, service_thread

pytestmark = pytest.mark.anyio

RANK = 4
PROMPT = types.ModelInput.from_ints([5, 6, 7, 8, 9])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", context=128)


def backend(model: Path) -> TorchBackend:
    return TorchBackend.load(str(model), threads=1, dtype="float32", device="cpu", max_batch=4)


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with service_thread(tmp_path_factory.mktemp("service") / "checkpoints", backend(model)) as service:
        yield service


async def trained(service: tinker.ServiceClient, model: Path, **metadata: str) -> tinker.TrainingClient:
    """An adapter with non-zero B's."""
    trainer = await service.create_lora_training_client(
        base_model=str(model), rank=RANK, seed=1, user_metadata=metadata or None
    )
    await trainer.forward_backward([datum([5, 6, 7, 8], weights=[1.0, 1.0, 1.0])], "cross_entropy")
    await trainer.optim_step(types.AdamParams(learning_rate=0.05))
    return trainer


async def logprobs(trainer: tinker.TrainingClient) -> list[float]:
    sampler = await trainer.save_weights_and_get_sampling_client()
    return [value for value in await sampler.compute_logprobs(PROMPT) if value is not None]


async def fetch(url: str | URL, **headers: str) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, await response.read()


async def take(served: Served, path: str, folder: Path) -> Path:
    """Downloads every file of external weights."""
    urls = (await (await rest(served)).get_external_weights_urls(path)).urls
    await anyio.to_thread.run_sync(folder.mkdir)
    for name, url in urls.items():
        status, content = await fetch(url)
        assert status == 200
        (folder / name).write_bytes(content)
    return folder


async def test_an_adapter_is_downloaded_as_a_peft_folder(
    served: Served, service: tinker.ServiceClient, model: Path, tmp_path: Path
) -> None:
    trainer = await trained(service, model)
    path = (await trainer.save_weights_external("away", ttl_seconds=3600)).path
    assert path == f"tinker://{trainer.model_id}/external_weights/away"
    folder = await take(served, path, tmp_path / "adapter")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 32)
    assert config["base_model_name_or_path"] == "tiny-llama", "no path of this machine"
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    )
    state = load_file(folder / "adapter_model.safetensors")
    assert len(state) == 2 * (4 * 7 + 1)
    assert state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 96)
    assert np.abs(state["base_model.model.lm_head.lora_B.weight"]).max() > 0


async def test_it_is_listed_kept_for_its_time_and_deleted(
    served: Served, service: tinker.ServiceClient, model: Path
) -> None:
    trainer, client = await trained(service, model), await rest(served)
    path = (await trainer.save_weights_external("listed", ttl_seconds=3600)).path
    (found,) = (await client.list_checkpoints(trainer.model_id)).checkpoints
    assert (found.checkpoint_type, found.checkpoint_id, found.tinker_path) == (
        "external",
        "external_weights/listed",
        path,
    )
    assert found.expires_at is not None
    run = await client.get_training_run(trainer.model_id)
    assert (run.last_checkpoint, run.last_sampler_checkpoint) == (None, None)
    urls = (await client.get_external_weights_urls(path)).urls
    await client.delete_checkpoint_from_tinker_path(path)
    assert (await client.list_checkpoints(trainer.model_id)).checkpoints == []
    assert (await fetch(urls["adapter_config.json"]))[0] == 404
    with pytest.raises(tinker.NotFoundError, match="does not exist"):
        await client.get_external_weights_urls(path)


async def test_encryption_is_refused(service: tinker.ServiceClient, model: Path) -> None:
    trainer = await trained(service, model)
    with pytest.raises(tinker.TinkerError, match="does not encrypt"):
        await trainer.save_weights_external("secret", age_encryption_recipients=["age1abc"])
    assert (await trainer.save_weights_external("plain")).path.endswith("/plain"), (
        "the refused request used its sequence number"
    )


async def test_only_signed_urls_are_served(
    served: Served, service: tinker.ServiceClient, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, client = await trained(service, model), await rest(served)
    path = (await trainer.save_weights_external("signed")).path
    await trainer.save_weights_external("other")
    answer = await client.get_external_weights_urls(path)
    url = URL(answer.urls["adapter_model.safetensors"])
    status, whole = await fetch(url)
    assert status == 200, "no API key is needed"
    assert await fetch(url, Range="bytes=10-19") == (206, whole[10:20])
    later = int(url.query["expires"]) + 1
    for wrong in (
        url.update_query(signature="0" * 64),
        url.update_query(signature="é"),
        url.update_query(expires=str(later)),
        url.update_query(expires="soon"),
        url.with_query({}),
        url.with_path(url.path.replace("/signed/", "/other/")).with_query(url.query),
        url.with_name("adapter_config.json").with_query(url.query),
        url.with_name("checkpoint.json").with_query(url.query),
        URL(f"{url.parent.parent}/..%2F..%2Fweights/signed?{url.query_string}", encoded=True),
    ):
        status, content = await fetch(wrong)
        assert status in (403, 404), wrong
        assert b"lora" not in content
    assert (await fetch(url.with_name("x").parent.parent.parent / "create_session"))[0] in (401, 404)
    monkeypatch.setattr(external.time, "time", lambda: later + 0.0)
    status, content = await fetch(url)
    assert (status, b"has expired" in content) == (403, True)


@pytest.mark.parametrize("kind", ["weights", "external_weights"])
async def test_the_sdks_command_line_downloads_it(
    served: Served, service: tinker.ServiceClient, model: Path, tmp_path: Path, kind: str
) -> None:
    trainer, client = await trained(service, model), await rest(served)
    saved = await (trainer.save_state("cli") if kind == "weights" else trainer.save_weights_external("cli"))
    command = [str(Path(sys.executable).with_name("tinker")), "checkpoint", "download", saved.path]
    environment = dict(os.environ) | {"TINKER_BASE_URL": served.url, "TINKER_API_KEY": KEY}
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [*command, "--output", str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    )
    assert done.returncode == 0, done.stderr
    (weights,) = await anyio.to_thread.run_sync(lambda: list(tmp_path.rglob("adapter_model.safetensors")))
    assert weights.with_name("adapter_config.json").is_file()
    own = await take(served, (await trainer.save_weights_external("own")).path, tmp_path / "own")
    for name, matrix in load_file(own / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(load_file(weights)[name], matrix)
    everything = (await client.list_user_checkpoints()).checkpoints
    assert [one for one in everything if one.checkpoint_id == "external_weights/download"] == [], "it was temporary"


async def test_an_adapter_from_a_folder_is_trained_on(
    served: Served, service: tinker.ServiceClient, client: Raw, model: Path, tmp_path: Path
) -> None:
    trainer = await trained(service, model)
    folder = await take(served, (await trainer.save_weights_external("in")).path, tmp_path / "adapter")
    answer = await client.ok(external.IMPORT_ROUTE, {"folder": str(folder), "name": "mine"})
    assert answer == {"path": "tinker://imported/weights/mine", "lora_rank": RANK}
    again = await service.create_training_client_from_state(answer["path"])
    assert await logprobs(again) == pytest.approx(await logprobs(trainer), abs=1e-6)
    # Another alpha with rescaled matrices is the same update.
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    file = folder / "adapter_model.safetensors"
    state = {name: array * (4.0 if "lora_B" in name else 1.0) for name, array in load_file(file).items()}
    save_file(state, file)
    answer = await client.ok(external.IMPORT_ROUTE, {"folder": str(folder), "name": "mine"})
    again = await service.create_training_client_from_state(answer["path"])
    assert await logprobs(again) == pytest.approx(await logprobs(trainer), abs=1e-5)


async def test_a_checkpoint_of_another_service_is_copied_under_its_name(
    served: Served, service: tinker.ServiceClient, client: Raw, model: Path, tmp_path: Path
) -> None:
    def elsewhere() -> tuple[str, list[float]]:
        async def work(url: str) -> tuple[str, list[float]]:
            async with sdk(url) as service:
                trainer = await trained(service, model, renderer_name="qwen3")
                return (await trainer.save_state("first")).path, await logprobs(trainer)

        with service_thread(tmp_path / "elsewhere" / "checkpoints", backend(model)) as other:
            return asyncio.run(work(other.url))

    path, expected = await anyio.to_thread.run_sync(elsewhere)
    request = {"folder": str(tmp_path / "elsewhere"), "tinker_path": path}
    assert await client.ok(external.IMPORT_ROUTE, request) == {"path": path, "lora_rank": RANK}
    again = await service.create_training_client_from_state(path)
    assert await logprobs(again) == pytest.approx(expected, abs=1e-6)
    run = await (await rest(served)).get_training_run_by_tinker_path(path)
    assert (run.user_metadata, run.lora_rank) == ({"renderer_name": "qwen3"}, RANK)
    status, answer = await client.ask(external.IMPORT_ROUTE, request | {"tinker_path": path.replace("first", "second")})
    assert (status, "does not exist" in answer["detail"]) == (404, True)
    sampler = request | {"tinker_path": path.replace("/weights/", "/sampler_weights/")}
    status, answer = await client.ask(external.IMPORT_ROUTE, sampler)
    assert (status, "only training weights" in answer["detail"]) == (400, True)


@pytest.mark.parametrize(
    ("config", "matrices", "message"),
    [
        ({"r": 3}, {}, "has shape|expected"),
        ({"r": "4"}, {}, "r is '4'"),
        ({"lora_alpha": 0}, {}, "lora_alpha is 0"),
        ({"peft_type": "IA3"}, {}, "does not describe a LoRA adapter"),
        ({"use_rslora": True}, {}, "use_rslora is set"),
        ({"base_model_name_or_path": "someone/else"}, {}, "someone/else"),
        ({}, {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": (4, 96)}, "layers.9"),
        ({}, {"base_model.model.model.norm.weight": (96,)}, "is not a LoRA matrix"),
    ],
)
async def test_a_folder_that_does_not_fit_is_refused(
    served: Served,
    service: tinker.ServiceClient,
    client: Raw,
    model: Path,
    tmp_path: Path,
    config: dict[str, Any],
    matrices: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    trainer = await trained(service, model)
    folder = await take(served, (await trainer.save_weights_external("bad")).path, tmp_path / "adapter")
    whole = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(whole | config))
    state = load_file(folder / "adapter_model.safetensors")
    extra = {name: np.zeros(shape, np.float32) for name, shape in matrices.items()}
    save_file(state | extra, folder / "adapter_model.safetensors")
    status, answer = await client.ask(external.IMPORT_ROUTE, {"folder": str(folder), "name": "bad"})
    assert status == 400
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer["detail"])
    shutil.rmtree(folder)
    status, answer = await client.ask(external.IMPORT_ROUTE, {"folder": str(folder), "name": "bad"})
    assert (status, "not a readable PEFT adapter" in answer["detail"]) == (400, True)
