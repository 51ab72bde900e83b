"""Sessions while open, after they end, and after a restart; and the record files of sessions and runs."""

from __future__ import annotations

import json
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
from tinker.lib.experimental import ExperimentalWarning

from searchr1_async.local.checkpoint_files import FOLDER, RecordStore, RunRecord, SessionRecord
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
        (run,) = (await client.list_training_runs(project_id="p")).training_runs
        assert (run.training_run_id, run.model_owner) == (trainer.model_id, "local")
        with pytest.raises(tinker.NotFoundError):
            await client.get_session("none")


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
    session = SessionRecord("0123abcd", 1.5, metadata, name, run_ids=(run.id,))
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


async def test_records_of_older_versions_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await written(tmp_path, SESSION)
    path = tmp_path / FOLDER / f"{SESSION.id}.json"
    ended = {"type": "client_finished", "reason": {"type": "success"}, "detail": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": ended}))
    assert read(tmp_path).sessions == {SESSION.id: SESSION}
    assert not caplog.records


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
