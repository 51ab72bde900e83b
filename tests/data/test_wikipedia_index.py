"""Fetching a prebuilt index from a hub of our own: a real Chroma folder in a real archive, and everything that breaks."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import chromadb
import numpy as np
import pytest
from chromadb.config import Settings

from searchr1_async.boundary import waits
from searchr1_async.boundary.waits import in_thread
from searchr1_async.cli import main, search_commands
from searchr1_async.data import hub as large_files
from searchr1_async.data import wikipedia_index
from searchr1_async.data.hub import report
from searchr1_async.data.wikipedia_index import fetch_index
from searchr1_async.errors import StoreError
from searchr1_async.events import Event, PhaseEnded, PhaseStarted
from searchr1_async.search.stores.compat import collections_in
from tests.data.hub import Hub, serving
from tests.tiny_world import child_environment

pytestmark = pytest.mark.anyio

ARCHIVE = "chroma_db.tar.xz"
PASSAGES, DIMENSION = 1_000, 768
VECTORS = np.random.default_rng(2).standard_normal((PASSAGES, DIMENSION), dtype=np.float32)


def pack(members: dict[str, bytes], folder: Path | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=0) as archive:
        if folder is not None:
            archive.add(folder, "chroma_db")
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """About 4 MB: vectors of the real dimension hardly shrink."""
    folder = tmp_path_factory.mktemp("prebuilt")
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    collection = client.create_collection("wiki_embeddings", embedding_function=None)
    ids = [f"p{number}" for number in range(PASSAGES)]
    collection.add(ids=ids, embeddings=VECTORS, documents=[f"passage {name}" for name in ids])
    client.close()  # pyright: ignore[reportAttributeAccessIssue]
    return pack({}, folder)


@pytest.fixture
async def hub(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(large_files, "BLOCK", 64 << 10)
    monkeypatch.setattr(large_files, "PART", 1 << 20)
    monkeypatch.setattr(large_files, "PAUSES", (0.0, 0.0, 0.0))
    # Small enough for the disk of a test.
    monkeypatch.setattr(search_commands, "PASSAGES", PASSAGES)
    async with serving(Hub({ARCHIVE: archive}, wikipedia_index.REPOSITORY)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Callable[..., Any]:
    async def fetch(**changes: Any) -> Path:
        folder = changes.pop("folder", tmp_path / "wiki")
        return await fetch_index(folder, **changes)

    return fetch


def nearest(folder: Path, row: int) -> str:
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    try:
        found = client.get_collection("wiki_embeddings", embedding_function=None).query(VECTORS[row], n_results=1)
        return found["ids"][0][0]
    finally:
        client.close()  # pyright: ignore[reportAttributeAccessIssue]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


async def test_an_index_is_fetched_verified_and_unpacked_once(
    hub: Hub, fetch: Callable[..., Any], archive: bytes, tmp_path: Path
) -> None:
    events: list[Event] = []
    found = await fetch(emit=events.append)
    assert found == tmp_path / "wiki" / "chroma"
    assert collections_in(found) == ("wiki_embeddings",)
    assert await anyio.to_thread.run_sync(nearest, found, 371) == "p371"
    assert names_in(tmp_path / "wiki") == {"chroma", "source.json"}
    megabytes = -(-len(archive) // 1_000_000)
    started = [(event.phase, event.total) for event in events if isinstance(event, PhaseStarted)]
    assert started == [("download", megabytes), ("verify", megabytes), ("unpack", megabytes)]
    assert [event.phase for event in events if isinstance(event, PhaseEnded)] == ["download", "verify", "unpack"]
    assert sum(count for _, count in hub.answers[ARCHIVE]) == len(archive)
    asked = hub.requests
    assert (await fetch(), hub.requests) == (found, asked)


async def test_a_broken_connection_costs_at_most_its_buffers(
    hub: Hub, fetch: Callable[..., Any], archive: bytes
) -> None:
    hub.cuts = [300_000, 1, 0, 123_456]
    hub.failures = [503, 429]
    await fetch()
    position = 0
    for start, count in hub.answers[ARCHIVE]:
        assert position - (256 << 10) <= start <= position
        position = start + count
    assert position == len(archive)


CHILD = """
import sys
from pathlib import Path
import anyio
from searchr1_async.data import hub, wikipedia_index

hub.BLOCK = 64 << 10
tell = lambda event: print(type(event).__name__, getattr(event, "done", ""), flush=True)
anyio.run(lambda: wikipedia_index.fetch_index(Path(sys.argv[1]), emit=tell))
"""


async def test_a_killed_download_resumes(hub: Hub, fetch: Callable[..., Any], archive: bytes, tmp_path: Path) -> None:
    hub.hold_after = 3_000_000
    command = [sys.executable, "-c", CHILD, str(tmp_path / "wiki")]
    environment = child_environment() | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
    async with await anyio.open_process(command, env=environment, stderr=None) as process:
        assert process.stdout is not None
        reported = ""
        while "PhaseAdvanced 3" not in reported:
            reported += (await process.stdout.receive()).decode()
        process.send_signal(signal.SIGKILL)
        await process.wait()
    (partial,) = (tmp_path / "wiki").glob("*.partial")
    kept = partial.stat().st_size
    assert 2_000_000 < kept <= 3_000_000
    found = await fetch()
    assert hub.answers[ARCHIVE][1][0] == kept
    assert sum(count for _, count in hub.answers[ARCHIVE][1:]) == len(archive) - kept
    assert await anyio.to_thread.run_sync(nearest, found, 5) == "p5"


async def test_the_command_says_how_to_serve_it(
    hub: Hub, fetch: Callable[..., Any], archive: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a folder"
    arguments = ["wiki18", "--folder", str(folder), "--keep"]
    assert await anyio.to_thread.run_sync(main, arguments) == 0
    reported = capfd.readouterr()
    assert reported.out.startswith(f"{folder / 'chroma'} holds the collection wiki_embeddings")
    assert f"chroma run --path '{folder / 'chroma'}'" in reported.out
    assert "download: 6 MB" in reported.err
    assert sum(path.read_bytes() == archive for path in folder.glob(f"{ARCHIVE}.*")) == 1
    assert await anyio.to_thread.run_sync(main, arguments) == 0
    assert capfd.readouterr().out == reported.out


async def test_a_damaged_download_is_never_unpacked_and_is_fetched_again(
    hub: Hub, fetch: Callable[..., Any], archive: bytes, tmp_path: Path
) -> None:
    hub.checksum = "ab" * 32
    with pytest.raises(StoreError, match=r"damaged in transit: its SHA-256 is .* the hub's abababababab"):
        await fetch()
    assert names_in(tmp_path / "wiki") == set()
    hub.checksum = None
    await fetch()


async def test_too_little_space_is_reported_before_anything_is_fetched(
    hub: Hub, fetch: Callable[..., Any], archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2 * len(archive) + 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))  # type: ignore[attr-defined]
    with pytest.raises(StoreError) as failure:
        await fetch(spare=31_000_000)
    for size in (len(archive), free, 30_000_000):
        assert wikipedia_index.gigabytes(size) in str(failure.value)
    assert hub.answers == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder, mount = tmp_path / "small", shutil.which("mount")
    folder.mkdir()
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=False).returncode:
        pytest.skip("no small file system can be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_disk_that_fills_up_loses_nothing(
    hub: Hub, fetch: Callable[..., Any], archive: bytes, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process took the room after it was checked."""
    monkeypatch.setattr(wikipedia_index, "free_bytes", lambda folder: 10**12)
    with pytest.raises(StoreError, match=r"cannot be written: No space left on device .*is kept"):
        await fetch(folder=small_disk)
    assert not (small_disk / "chroma").exists()
    assert not (small_disk / "unpacking").exists()
    await anyio.run_process(["mount", "-o", "remount,size=64m", str(small_disk)])
    found = await fetch(folder=small_disk)
    assert await anyio.to_thread.run_sync(nearest, found, 7) == "p7"
    assert sum(count for _, count in hub.answers[ARCHIVE]) == len(archive)


@pytest.mark.parametrize(
    ("name", "content"),
    [("../escaped", b"x"), ("chroma_db/../../escaped", b"x"), ("/tmp/../../escaped", b"x")],
)
async def test_an_archive_with_members_outside_the_folder_is_refused(
    hub: Hub, fetch: Callable[..., Any], tmp_path: Path, name: str, content: bytes
) -> None:
    hub.files[ARCHIVE] = pack({"chroma_db/chroma.sqlite3": b"", name: content})
    with pytest.raises(StoreError, match="cannot be unpacked"):
        await fetch()
    assert await anyio.to_thread.run_sync(lambda: list(tmp_path.rglob("escaped*"))) == []
    assert not (tmp_path / "wiki" / "chroma").exists()


async def test_a_file_that_is_no_archive_or_has_no_index(hub: Hub, fetch: Callable[..., Any], tmp_path: Path) -> None:
    hub.files[ARCHIVE] = b"no archive at all" * 1_000
    with pytest.raises(StoreError, match="cannot be unpacked"):
        await fetch()
    hub.files[ARCHIVE] = pack({"readme": b"words"})
    with pytest.raises(StoreError, match="contains no Chroma folder"):
        await fetch()
    assert not (tmp_path / "wiki" / "chroma").exists()


async def test_a_half_unpacked_folder_is_unpacked_again(hub: Hub, fetch: Callable[..., Any], tmp_path: Path) -> None:
    unpacking = tmp_path / "wiki" / "unpacking" / "chroma_db"
    unpacking.mkdir(parents=True)
    (unpacking / "chroma.sqlite3").write_bytes(b"half")
    found = await fetch()
    assert await anyio.to_thread.run_sync(nearest, found, 9) == "p9"
    assert not unpacking.exists()


async def test_another_index_in_the_folder_is_left_alone(hub: Hub, fetch: Callable[..., Any], tmp_path: Path) -> None:
    await fetch()
    (tmp_path / "wiki" / "source.json").write_text('{"repository": "someone/else", "filename": "chroma_db.tar.xz"}')
    with pytest.raises(StoreError, match="choose another folder"):
        await fetch()
    (tmp_path / "mine" / "chroma").mkdir(parents=True)
    with pytest.raises(StoreError, match="choose another folder"):
        await fetch(folder=tmp_path / "mine")


async def test_a_refusal_of_the_hub_is_explained(
    hub: Hub, fetch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = hub.files.pop(ARCHIVE)
    with pytest.raises(StoreError, match=r"is not available .*EntryNotFoundError"):
        await fetch()
    hub.files[ARCHIVE] = content
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(StoreError, match="check the network, HF_ENDPOINT and HF_HUB_OFFLINE"):
            await fetch()
    hub.failures = [503] * 20
    with pytest.raises(StoreError, match="HTTP 503"):
        await fetch()
    hub.failures = [403] * 20
    with pytest.raises(StoreError, match="HF_TOKEN"):
        await fetch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE"):
        await fetch()


@pytest.mark.parametrize("status", [429, 503])
async def test_a_hub_that_asks_for_a_day_ends_the_download(hub: Hub, fetch: Callable[..., Any], status: int) -> None:
    hub.failures, hub.retry_after = [status] * 20, "86399"
    with (
        anyio.fail_after(20),
        pytest.raises(StoreError, match=r"run the same command again, after the 86,399 s that the hub asks for"),
    ):
        await fetch()


async def test_a_wait_that_the_hub_asks_for_is_obeyed_and_reported(
    hub: Hub, fetch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "REPORT_AFTER", 0.05)
    hub.failures, hub.retry_after = [503, 429], "0.2"
    reported: list[str] = []
    began = time.monotonic()
    await fetch(emit=lambda event: reported.append(getattr(event, "text", "")))
    assert time.monotonic() - began >= 0.4
    assert len([text for text in reported if "failed (HTTP" in text and "waiting for at most" in text]) == 2


async def test_only_the_hub_gets_the_token(
    hub: Hub, fetch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    caplog.set_level("DEBUG", "searchr1_async")
    hub.cuts, hub.failures = [1_000], [503]
    await fetch()
    assert set(hub.tokens) == {("hub", "Bearer hf_verysecret"), ("cdn", None)}
    assert caplog.text
    assert "hf_verysecret" not in caplog.text


async def test_a_cancelled_thread_is_waited_for() -> None:
    """By a plain Task.cancel, as Ctrl-C does it."""
    import asyncio

    began, ended, rounds = anyio.Event(), threading.Event(), 0

    def count() -> None:
        nonlocal rounds
        try:
            while True:
                rounds += 1
                report(lambda done: began.set(), rounds)
        finally:
            ended.set()

    task = asyncio.ensure_future(in_thread(count))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()  # before the caller went on


async def test_a_compact_index_is_built_and_the_rest_deleted(
    hub: Hub, fetch: Callable[..., Any], archive: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a folder"
    arguments = ["wiki18", "--compact", "--folder", str(folder)]
    assert await anyio.to_thread.run_sync(main, [*arguments, "--keep"]) == 0
    reported = capfd.readouterr()
    (kept,) = folder.glob(f"{ARCHIVE}.*")
    assert names_in(folder) == {"chroma", "compact", "source.json", kept.name}
    assert reported.err.index(" are free") < reported.err.index("download: ")
    assert f"{PASSAGES:,} passages, {DIMENSION} dimensions" in reported.out
    assert f"python -m searchr1_async serve '{folder / 'compact'}'" in reported.out
    asked = hub.requests
    assert await anyio.to_thread.run_sync(main, arguments) == 0
    assert hub.requests == asked
    assert names_in(folder) == {"compact", "source.json"}
    assert capfd.readouterr().out == reported.out
    assert await anyio.to_thread.run_sync(main, [*arguments, "--recall", "0.5"]) == 1
    assert "was built for a recall of 0.95: use it as it is" in capfd.readouterr().err


async def test_a_compact_index_that_does_not_fit_is_reported_before_anything_is_fetched(
    hub: Hub,
    fetch: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    free = 1_000_000_000
    monkeypatch.setattr(search_commands, "PASSAGES", 21_015_324)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))  # type: ignore[attr-defined]
    assert await anyio.to_thread.run_sync(main, ["wiki18", "--compact", "--folder", str(tmp_path)]) == 1
    assert "where 1.0 GB are free: free " in capfd.readouterr().err
    assert hub.answers == {}
    assert names_in(tmp_path) == set()


async def test_a_missing_embedder_is_reported_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"id": "1", "question": "Who wrote it?", "golden_answers": ["She"], "data_source": "own"}\n')
    arguments = ["wiki18", "--compact", "--folder", str(tmp_path / "wiki")]
    asked = ["--questions", str(questions), "--embedder", str(tmp_path / "none")]
    assert await anyio.to_thread.run_sync(main, [*arguments, *asked]) == 1
    assert f"the embedder folder {tmp_path / 'none'} does not exist" in capfd.readouterr().err
    assert hub.answers == {}
    assert not (tmp_path / "wiki").exists()


async def test_a_half_deleted_index_does_not_count_as_complete(
    hub: Hub, fetch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fetch()

    def killed(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: None if options else killed(path))
        with pytest.raises(KeyboardInterrupt):
            wikipedia_index.delete_index(tmp_path / "wiki")
    asked = hub.requests
    await fetch()
    assert hub.requests > asked
