"""Runs and checkpoints in the SDK's REST client and command line."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
import tinker
from click.testing import CliRunner, Result
from tinker import types
from tinker.cli.__main__ import main_cli

from tests.local.serving import KEY, Served, datum, raw, rest, sdk, service_thread

pytestmark = pytest.mark.anyio

RENDERER = {"renderer_name": "qwen3_instruct"}


async def trained(service: tinker.ServiceClient, **metadata: str) -> tinker.TrainingClient:
    return await service.create_lora_training_client(base_model="scripted", rank=4, user_metadata=metadata or None)


# -- persistence across sessions and restarts -------------------------------------------------------------------------


async def test_a_runs_metadata_outlives_its_session_and_the_service(tmp_path: Path) -> None:
    with service_thread(tmp_path) as served:
        async with sdk(served.url) as service:
            trainer = await trained(service, **RENDERER)
            state = (await trainer.save_state("final")).path
            again = await service.create_training_client_from_state(state, user_metadata={"created_by": "me"})
            bare = await trained(service)  # left without checkpoints
        ids = {trainer.model_id, again.model_id, bare.model_id}
        client = await rest(served)
        assert (await client.get_training_run_by_tinker_path(state)).user_metadata == RENDERER
        assert (await client.get_training_run(again.model_id)).user_metadata == {"created_by": "me"}
        runs = (await client.list_training_runs()).training_runs
        assert {run.training_run_id for run in runs} == ids
        assert {run.lora_rank for run in runs} == {4}
    with service_thread(tmp_path) as served:
        client = await rest(served)
        assert (await client.get_training_run_by_tinker_path(state)).user_metadata == RENDERER
        found = await client.get_training_run(bare.model_id)
        assert (found.base_model, found.lora_rank, found.user_metadata) == ("scripted", 4, None)
        assert {run.training_run_id for run in (await client.list_training_runs()).training_runs} == ids


async def test_a_run_is_as_recent_as_its_last_request(tmp_path: Path) -> None:
    with service_thread(tmp_path) as served:
        client = await rest(served)
        async with sdk(served.url) as service:
            first, second = await trained(service), await trained(service)
            await first.save_state("early")
            await second.forward_backward([datum([1, 2], weights=[1.0])], "cross_entropy")
            await first.optim_step(types.AdamParams())
            used = time.time()
        ended = await client.get_training_run(first.model_id)
    assert abs(ended.last_request_time.timestamp() - used) < 1.0
    with service_thread(tmp_path) as served:
        client = await rest(served)
        runs = (await client.list_training_runs()).training_runs
        assert [run.training_run_id for run in runs] == [first.model_id, second.model_id]
        assert runs[0].last_request_time == ended.last_request_time


async def test_runs_without_records_are_listed_by_their_checkpoints(tmp_path: Path) -> None:
    with service_thread(tmp_path) as served:
        async with sdk(served.url) as service:
            trainer = await trained(service)
            for name in ("one", "two"):
                await trainer.save_state(name)
    shutil.rmtree(tmp_path / "_records")
    with service_thread(tmp_path) as served:
        (run,) = (await (await rest(served)).list_training_runs()).training_runs
    assert (run.training_run_id, run.user_metadata) == (trainer.model_id, None)
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.checkpoint_id == "weights/two"
    assert run.last_request_time == run.last_checkpoint.time


# -- orders, pages, ranges --------------------------------------------------------------------------------------------


async def test_checkpoints_are_paginated_newest_first(tmp_path: Path) -> None:
    with service_thread(tmp_path) as served:
        async with sdk(served.url) as service:
            paths = []
            for _ in range(2):
                trainer = await trained(service)
                paths += [(await trainer.save_state(name)).path for name in ("a", "b")]
            client = await rest(served)
            newest_first = list(reversed(paths))
            whole = await client.list_user_checkpoints()
            assert [item.tinker_path for item in whole.checkpoints] == newest_first
            assert whole.cursor == types.Cursor(offset=0, limit=100, total_count=4)
            page = await client.list_user_checkpoints(limit=2, offset=1)
            assert [item.tinker_path for item in page.checkpoints] == newest_first[1:3]
            assert page.cursor == types.Cursor(offset=1, limit=2, total_count=4)
            own = (await client.list_checkpoints(trainer.model_id)).checkpoints
            assert [item.tinker_path for item in own] == newest_first[:2]
            async with raw(served.url) as plain:
                everything = await plain.ok("checkpoints", method="GET")
                assert everything["cursor"]["limit"] == 100, "as the SDK documents"
                for wrong in ("limit=-1", "offset=-1", "limit=many", "access_scope=mine"):
                    for listing in ("checkpoints", "training_runs", "sessions"):
                        status, answer = await plain.ask(f"{listing}?{wrong}", method="GET")
                        assert (status, bool(answer["detail"])) == (422, True), (listing, wrong)


async def test_all_checkpoints_of_a_run_are_listed_at_once(served: Served, service: tinker.ServiceClient) -> None:
    """The SDK does not paginate here, so all must be listed."""
    trainer = await trained(service)
    await trainer.save_state("0")
    (place,) = served.folder.glob(f"{trainer.model_id.replace(':', '.')}/weights")

    def multiply() -> None:
        for name in range(1, 1002):
            (place / str(name)).mkdir()
            (place / str(name) / "checkpoint.json").hardlink_to(place / "0" / "checkpoint.json")

    await anyio.to_thread.run_sync(multiply)
    client = await rest(served)
    assert len((await client.list_checkpoints(trainer.model_id)).checkpoints) == 1002
    await anyio.to_thread.run_sync(shutil.rmtree, place)


async def test_ttl_must_be_between_an_hour_and_ten_years(served: Served, service: tinker.ServiceClient) -> None:
    trainer, client = await trained(service), await rest(served)
    path = (await trainer.save_state("kept")).path
    for wrong in (0, 3599, 11 * 365 * 86400):
        with pytest.raises(
            tinker.BadRequestError, match=r"ttl_seconds: must be between 3600 \(an hour\) and ten years"
        ):
            await client.set_checkpoint_ttl_from_tinker_path(path, wrong)
    await client.set_checkpoint_ttl_from_tinker_path(path, 3600)
    (found,) = (await client.list_checkpoints(trainer.model_id)).checkpoints
    assert found.expires_at is not None
    assert 3500 < found.expires_at.timestamp() - time.time() <= 3600


# -- publishing and copying -------------------------------------------------------------------------------------------


async def test_publishing_shows_in_listings(tmp_path: Path) -> None:
    async def published(client: tinker.RestClient) -> bool:
        (found,) = (await client.list_user_checkpoints()).checkpoints
        return found.public

    with service_thread(tmp_path) as served:
        async with sdk(served.url) as service:
            client = await rest(served)
            path = (await (await trained(service)).save_state("final")).path
            assert not await published(client)
            start = time.monotonic()
            for _ in range(2):  # idempotent: the SDK would retry a refusal for five minutes
                await client.publish_checkpoint_from_tinker_path(path)
            assert await published(client)
            assert time.monotonic() - start < 30
    with service_thread(tmp_path) as served:
        client = await rest(served)
        assert await published(client), "after a restart too"
        for _ in range(2):
            await client.unpublish_checkpoint_from_tinker_path(path)
        assert not await published(client)
        with pytest.raises(tinker.NotFoundError, match="does not exist"):
            await client.publish_checkpoint_from_tinker_path(path.replace("final", "other"))


async def test_a_copy_is_in_its_project_and_outlives_its_source(served: Served, service: tinker.ServiceClient) -> None:
    trainer, client = await trained(service), await rest(served)
    gradient = trainer.forward_backward([datum([1, 2], weights=[1.0])], "cross_entropy")
    await trainer.optim_step(types.AdamParams(learning_rate=0.1))
    await gradient
    source = (await trainer.save_state("final", user_metadata={"step": "1"})).path
    example = [datum([1, 2, 3], weights=[1.0, 1.0])]
    expected = (await trainer.forward(example, "cross_entropy")).metrics
    copy = await client.copy_weights(source, "archive", ttl_seconds=7200)
    assert copy.split("/")[3:] == ["weights", "final"]
    assert copy != source
    await client.delete_checkpoint_from_tinker_path(source)
    (run,) = (await client.list_training_runs(project_id="archive")).training_runs
    assert (run.training_run_id, run.lora_rank) == (copy.split("/")[2], 4)
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.user_metadata == {"step": "1"}
    assert run.last_checkpoint.expires_at is not None
    assert (await client.list_training_runs(project_id="none")).training_runs == []
    again = await service.create_training_client_from_state_with_optimizer(copy)
    assert (await again.forward(example, "cross_entropy")).metrics == pytest.approx(expected)
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
        await client.copy_weights(copy, "archive", ttl_seconds=60)
    with pytest.raises(tinker.NotFoundError, match="does not exist"):
        await client.copy_weights(source, "archive")


# -- unsupported routes -----------------------------------------------------------------------------------------------


async def test_unsupported_routes_give_a_reason(served: Served, service: tinker.ServiceClient) -> None:
    client = await rest(served)
    admin = await anyio.to_thread.run_sync(lambda: tinker.AdminClient(base_url=served.url, api_key=KEY))
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: client.export_session_trace(service.holder.get_session_id()), "records no request traces"),
        (lambda: admin.get_billing_usage("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"), "bills nothing"),
        (lambda: admin.get_current_checkpoint_storage_usage(), "checkpoint sizes are in the listing"),
        (lambda: admin.get_audit_log(), "no audit log"),
    ]
    for call, reason in refused:
        with pytest.raises(tinker.NotFoundError, match=reason):
            await call()
    async with raw(served.url) as plain:
        for method in ("GET", "DELETE"):
            status, answer = await plain.ask("auth/apikey/me", method=method)
            assert (status, "TINKER_API_KEY" in answer["detail"]) == (404, True)


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ``tinker`` commands that call the service, except those that need a hub or a login."""
    monkeypatch.setenv("TINKER_BASE_URL", served.url)
    monkeypatch.setenv("TINKER_API_KEY", KEY)

    def run(*words: str) -> Result:
        return CliRunner().invoke(main_cli, ["--format", "json", *words])

    def said(*words: str) -> Any:
        done = run(*words)
        assert done.exit_code == 0, (words, done.output, done.exception)
        return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout

    service = tinker.ServiceClient()
    trainer = service.create_lora_training_client(base_model="scripted", user_metadata=RENDERER).result()
    path, other = (trainer.save_state(name).result().path for name in ("one", "two"))
    service.close("success").result()
    id = trainer.model_id
    assert id in [run["training_run_id"] for run in said("run", "list", "--limit=0")["runs"]]
    assert said("run", "info", id)["user_metadata"] == RENDERER
    assert said("checkpoint", "list", "--limit=1")["checkpoints"][0]["tinker_path"] == other, "the newest"
    assert [item["tinker_path"] for item in said("checkpoint", "list", "--run-id", id)["checkpoints"]] == [other, path]
    said("checkpoint", "publish", path)
    assert said("checkpoint", "info", path)["public"] is True
    said("checkpoint", "unpublish", path)
    said("checkpoint", "set-ttl", path, "--ttl", "3600")
    found = said("checkpoint", "info", path)
    assert (found["public"], found["expires_at"] is not None) == (False, True)
    said("checkpoint", "set-ttl", path, "--remove")
    assert said("checkpoint", "delete", "--run-id", id, "--type", "weights", "--yes")["deleted_count"] == 2
    assert [model["model_name"] for model in said("model", "list")["models"]] == ["scripted"]
    assert "Tinker accessible: yes" in said("auth", "status")
    for words, reason in (
        (("session", "export-trace", id.partition(":")[0]), "records no request traces"),
        (("checkpoint", "info", path), "Checkpoint not found"),
        (("run", "info", "none"), "no training run 'none'"),
    ):
        done = run(*words)
        assert done.exit_code != 0
        error: Any = done.exception
        assert reason in f"{error.message} {error.details}"
