"""Sessions while open, after they end, and after a restart."""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread
import pytest
import tinker
from tinker import types
from tinker.lib.experimental import ExperimentalWarning
from tinker.types import SessionSearchRequest

from tests.local.serving import KEY, Served, raw, service_thread

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings(f"ignore::{ExperimentalWarning.__module__}.ExperimentalWarning"),
]


async def rest(served: Served) -> tinker.RestClient:
    return await anyio.to_thread.run_sync(lambda: tinker.RestClient(base_url=served.url, api_key=KEY))


async def session(served: Served, status: str = "success", **more: object) -> str:
    """The id of a new session, ended with ``status`` unless that is empty."""
    async with raw(served.url) as client:
        id = (await client.ok("create_session", {"tags": [], **more}))["session_id"]
        if status:
            await client.ok(f"sessions/{id}/finish", {"reason": {"type": status}, "detail": "it is enough"})
        return id


async def found(served: Served, **query: object) -> list[str]:
    client = await rest(served)
    page = await client.search_sessions(SessionSearchRequest.model_validate(query))
    return [item.session_id for item in page.sessions]


async def test_an_ended_session_is_listed_after_a_restart(tmp_path: Path) -> None:
    with service_thread(tmp_path) as served:
        service = await anyio.to_thread.run_sync(
            lambda: tinker.ServiceClient(
                base_url=served.url, api_key=KEY, user_metadata={"recipe": "sl"}, display_name="nightly", project_id="p"
            )
        )
        trainer = await service.create_lora_training_client(base_model="scripted")
        path = (await trainer.save_weights_for_sampler("last")).path
        await service.create_sampling_client(model_path=path)
        id = service.holder.get_session_id()
        before = await (await rest(served)).get_session(id)
        await service.close("errored", "out of patience")
        later = await session(served)
    with service_thread(tmp_path) as served:
        client = await rest(served)
        assert (await client.list_sessions()).sessions == [later, id]
        assert (await client.list_sessions(limit=1, offset=1)).sessions == [id]
        known = await client.get_session(id)
        assert known == before
        assert known.training_run_ids == [trainer.model_id]
        assert (known.user_metadata, known.display_name) == ({"recipe": "sl"}, "nightly")
        (sampler,) = known.sampler_ids
        assert (await client.get_sampler(sampler)).model_path == path
        (summary,) = (await client.search_sessions(SessionSearchRequest(session_id=id))).sessions
        assert (summary.project_id, summary.owner, summary.checkpoints_count) == ("p", "local", 1)
        assert isinstance(summary.status, types.ClientSessionFinished)
        assert summary.status.reason.type == "errored"
        assert summary.status.detail == "out of patience"
        with pytest.raises(tinker.NotFoundError):
            await client.get_session("none")


async def test_searching(tmp_path: Path) -> None:
    with service_thread(tmp_path) as served:
        plain = await session(served)
        named = await session(served, display_name="Nightly run of SL", user_metadata={"recipe": "sl", "try": "1"})
        failed = await session(served, "errored", project_id="p", user_metadata={"recipe": "sl"})
        alive = await session(served, "")
        assert await found(served) == [alive, failed, named, plain]
        assert await found(served, display_name="sl NIGHTLY") == [named]
        assert await found(served, display_name="nightly rl") == []
        assert await found(served, display_name="nightly", session_id=plain) == [named, plain]
        assert await found(served, user_metadata={"recipe": "sl"}) == [failed, named]
        assert await found(served, user_metadata={"recipe": "sl", "try": "1"}) == [named]
        assert await found(served, project_ids=["p"]) == [failed]
        assert await found(served, statuses=[{"type": "active"}]) == [alive]
        finished = {"type": "client_finished", "reasons": ["errored"]}
        assert await found(served, statuses=[finished, {"type": "active"}]) == [alive, failed]
        assert await found(served, owner={"type": "user", "owner_urns": ["somebody"]}) == []
        client = await rest(served)
        await client.assign_session_project(plain, "p")
        assert await found(served, project_ids=["p"]) == [failed, plain]
        seen, query = [], SessionSearchRequest(limit=3)
        while True:
            page = await client.search_sessions(query)
            seen.append([item.session_id for item in page.sessions])
            if page.next_cursor is None:
                break
            query = query.model_copy(update={"cursor": page.next_cursor})
        assert seen == [[alive, failed, named], [plain]]
        async with raw(served.url) as other:
            for wrong in ({"limit": 201}, {"statuses": 3}, {"owner": "me"}, {"cursor": {"last_session_id": "x"}}):
                status, answer = await other.ask("sessions/search", wrong)
                assert (status in (400, 422), bool(answer["detail"])) == (True, True), wrong
            assert (await other.ask(f"sessions/{plain}/project", {}, method="PUT"))[0] == 400
