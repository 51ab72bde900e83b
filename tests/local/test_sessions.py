"""Sessions while open, after they end, and after a restart; and the record files of sessions and runs."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types
from tinker.lib.experimental import ExperimentalWarning
from tinker.types import SessionSearchRequest

from searchr1_async.local.sessions import FOLDER, RecordStore, RunRecord, SessionRecord
from tests.local.serving import KEY, Served, raw, rest, service_thread
from tests.local.test_process import command, environment

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings(f"ignore::{ExperimentalWarning.__module__}.ExperimentalWarning"),
]


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


RUN = RunRecord("0123abcd:train:0", "some/model", 8, 100.5, {"renderer_name": "qwen3"})
SESSION = SessionRecord("0123abcd", 100.0, None, "nightly", run_ids=(RUN.id,), samplers={"0123abcd:sample:0": None})


async def written(folder: Path, *records: RunRecord | SessionRecord) -> RecordStore:
    store = RecordStore(folder)
    for record in records:
        store.note(record)
    await store.flush()
    return store


def read(folder: Path) -> RecordStore:
    store = RecordStore(folder)
    store.read()
    return store


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20)
@given(metadata=st.none() | st.dictionaries(st.text(), json_values, max_size=3), name=st.none() | st.text())
def test_records_round_trip(metadata: dict[str, object] | None, name: str | None) -> None:
    run = RunRecord("0123abcd:train:7", "some/model", 8, 1.25, metadata)
    session = SessionRecord("0123abcd", 1.5, metadata, name, run_ids=(run.id,), status={"type": "client_finished"})
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(written, Path(folder), run, session)
        store = read(Path(folder))
        assert (dict(store.runs), dict(store.sessions)) == ({run.id: run}, {session.id: session})


async def test_a_corrupt_record_is_logged_and_the_others_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await written(tmp_path, RUN, SESSION)
    damaged = tmp_path / FOLDER / "ffff.json"
    damaged.write_text("{")
    store = read(tmp_path)
    assert (list(store.runs), list(store.sessions)) == ([RUN.id], [SESSION.id])
    assert str(damaged) in caplog.text


async def test_failed_writes_are_retried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    with caplog.at_level(logging.WARNING):
        store = await written(tmp_path, RUN)
    assert f"cannot write the record of {RUN.id}" in caplog.text
    assert store.runs[RUN.id] == RUN, "it stays in memory"
    (tmp_path / FOLDER).unlink()
    await store.flush()
    assert read(tmp_path).runs == {RUN.id: RUN}


async def test_a_killed_service_loses_nothing(tmp_path: Path) -> None:
    metadata = {"renderer_name": "qwen3"}
    process = await anyio.open_process(
        command(tmp_path, "--model", "scripted"), env=environment(TINKER_API_KEY=KEY), stderr=subprocess.DEVNULL
    )
    async with process:
        assert process.stdout is not None
        shown = ""
        with anyio.fail_after(60):
            while "Ctrl-C" not in shown:
                shown += (await process.stdout.receive()).decode()
        url = re.search(r"TINKER_BASE_URL=(\S+)", shown)
        assert url is not None
        async with raw(url[1]) as client:
            session = (await client.ok("create_session", {"tags": [], "display_name": "nightly"}))["session_id"]
            model = await client.model(session, user_metadata=metadata)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    with service_thread(tmp_path / "checkpoints") as served:
        async with raw(served.url) as client:
            assert (await client.ok(f"training_runs/{model}", method="GET"))["user_metadata"] == metadata
            known = await client.ok(f"sessions/{session}", method="GET")
    assert (known["display_name"], known["training_run_ids"]) == ("nightly", [model])
