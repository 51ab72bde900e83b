"""A compact index as a store: what it finds, what it refuses, and what it does while it is closed or left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError, StoreError
from searchr1_async.search import Search
from searchr1_async.search.builders import build_compact_index
from searchr1_async.search.compact.codes import Probing
from searchr1_async.search.compact.files import CompactSettings
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.vector_store import Found, Metric, is_writable
from tests.search.compact.arrays import Arrays, clustered, passage_of, scores_of

pytestmark = pytest.mark.anyio

ROWS = 5_000
ROOT = Path(__file__).parents[3]


def queries_near(vectors: Vectors, count: int = 200, seed: int = 7) -> Vectors:
    """As questions are: not far from some of the passages, and none of them."""
    random = np.random.default_rng(seed)
    rows = random.choice(len(vectors), count)
    return vectors[rows] + random.normal(0, 0.05, (count, vectors.shape[1])).astype(np.float32)


async def make(folder: Path, vectors: Vectors, metric: Metric = "cosine", *, lists: int | None = None) -> None:
    source = Arrays(vectors, metric)
    queries = queries_near(vectors, 300, seed=3) if len(vectors) > 1_000 else None
    await build_compact_index(source, folder, queries=queries, settings=CompactSettings(lists=lists))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 5,000 passages; only read."""
    folder = tmp_path_factory.mktemp("large") / "index"
    anyio.run(partial(make, folder, clustered(ROWS)))
    return folder


@pytest.fixture
def index(large: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return shutil.copytree(large, tmp_path / "index")


async def answers_of(folder: Path, queries: Vectors, n_results: int, **options: Any) -> Found:
    store = CompactStore(folder, **options)
    await store.open()
    try:
        return await store.query(queries, n_results)
    finally:
        await store.aclose()


def recall_of(found: Found, queries: Vectors, vectors: Vectors, metric: Metric, results: int) -> float:
    exact = np.argsort(-scores_of(queries, vectors, metric), axis=1)[:, :results]
    pairs = zip(found, exact.tolist(), strict=True)
    return float(np.mean([len({int(passage.id) for passage in own} & set(best)) / len(best) for own, best in pairs]))


# What it finds.


async def test_it_finds_what_an_exact_search_finds(large: Path) -> None:
    store, vectors = CompactStore(large), clustered(ROWS)
    queries = queries_near(vectors)
    assert store.dimension == 64
    assert await store.count() == ROWS
    assert not is_writable(store)
    chosen = store.manifest.calibration
    assert chosen.origin == "queries"
    assert chosen.recall >= 0.95
    assert 1 <= chosen.probes <= chosen.most_probes <= store.manifest.lists
    assert store.probing == Probing(chosen.margin, chosen.most_probes)
    found = await answers_of(large, queries, 3)
    assert recall_of(found, queries, vectors, "cosine", 3) >= 0.95
    everything = await answers_of(large, queries[:50], 10, probes=10**6, candidates=ROWS)
    assert recall_of(everything, queries[:50], vectors, "cosine", 10) >= 0.998  # float16 may swap two of them
    for answer, query in zip(found, queries, strict=True):
        for passage in answer:
            row = int(passage.id)
            assert (passage.title, passage.text) == (passage_of(row).title, passage_of(row).text)
            assert passage.score == pytest.approx(
                scores_of(query[None], vectors[row : row + 1], "cosine")[0, 0], abs=1e-3
            )
        assert [passage.score for passage in answer] == sorted((each.score for each in answer), reverse=True)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
async def test_small_indexes_find_everything(tmp_path: Path, metric: Metric) -> None:
    for count in (1, 2, 31, 33, 300):
        vectors, folder = clustered(count, 32), tmp_path / str(count)
        await make(folder, vectors, metric)
        store = CompactStore(folder)
        assert store.manifest.calibration.recall >= 0.95, count
        found = await answers_of(folder, vectors, count + 50, probes=1_000)
        assert [len(answer) for answer in found] == [count] * count, "no more than there are, none twice, none missing"
        for answer in found:
            assert len({passage.id for passage in answer}) == count
        exact = scores_of(vectors, vectors, metric)
        scores = np.array([[passage.score for passage in answer] for answer in found])
        rows = np.array([[int(passage.id) for passage in answer] for answer in found])
        np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), atol=0.02)
        np.testing.assert_allclose(scores, np.sort(exact, axis=1)[:, ::-1], atol=0.005)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
async def test_equal_vectors_and_vectors_of_zeros(tmp_path: Path, metric: Metric) -> None:
    vectors = np.repeat(clustered(60, 32), 5, axis=0)
    vectors[100:110] = 0
    await make(tmp_path / "some", vectors, metric)
    found = await answers_of(tmp_path / "some", np.concatenate([vectors[::5][:20], np.zeros((1, 32), np.float32)]), 5)
    for number, answer in enumerate(found[:20]):
        if metric != "ip":  # where a longer vector may be nearer than the query's own
            assert {int(passage.id) // 5 for passage in answer} == {number}
        assert all(np.isfinite(passage.score) for passage in answer)
    assert len(found[20]) == 5, "a query of zeros has an answer"
    await make(tmp_path / "zeros", np.zeros((150, 32), np.float32), metric)
    assert [len(answer) for answer in await answers_of(tmp_path / "zeros", vectors[:3], 4)] == [4, 4, 4]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
async def test_similarities_are_those_of_chroma(tmp_path: Path, metric: Metric) -> None:
    import chromadb
    from chromadb.config import Settings

    client = chromadb.PersistentClient(tmp_path / "chroma", settings=Settings(anonymized_telemetry=False))
    client.create_collection("passages", embedding_function=None, configuration={"hnsw": {"space": metric}})
    client.close()  # pyright: ignore[reportAttributeAccessIssue]
    vectors = clustered(60, 24)
    queries = queries_near(vectors, 5)
    chroma = EmbeddedChroma(tmp_path / "chroma")
    await chroma.open()
    try:
        await chroma.add([passage_of(row) for row in range(60)], vectors)
        theirs = await chroma.query(queries, 60)
    finally:
        await chroma.aclose()
    await make(tmp_path / "index", vectors, metric)
    for own, other in zip(await answers_of(tmp_path / "index", queries, 60), theirs, strict=True):
        scores = {passage.id: passage.score for passage in other}
        assert len(own) == len(scores) == 60
        np.testing.assert_allclose(
            [passage.score for passage in own], [scores[passage.id] for passage in own], atol=3e-3
        )


async def test_a_search_over_it_answers_as_one_over_chroma(tmp_path: Path, make_embedder: Callable[..., Any]) -> None:
    embedder = make_embedder(dimension=256)
    words = ["river", "mountain", "capital", "island", "harbour", "desert", "forest", "castle", "railway", "volcano"]
    passages = [
        Passage(
            f"p{number}",
            f"{words[number % 10]} {number}",
            f"{words[number // 10 % 10]} of number{number}, no {number % 7}",
        )
        for number in range(120)
    ]
    vectors = embedder.embed([f"{each.title}\n{each.text}" for each in passages])
    chroma = EmbeddedChroma(tmp_path / "chroma")
    await chroma.open()
    await chroma.add(passages, vectors)
    await chroma.aclose()
    source = Arrays(vectors)
    source.blocks = lambda start: one_block(passages, vectors, start)  # type: ignore[method-assign]
    await build_compact_index(source, tmp_path / "index", embedder=embedder)
    asked = [f"{words[number % 10]} {number} number{number}" for number in range(0, 120, 5)]
    compact = Search(embedder, CompactStore(tmp_path / "index", candidates=120, probes=100), n_results=3)
    async with Search(embedder, chroma, n_results=3) as one, compact as other:
        theirs, ours = await one.search(asked), await other.search(asked)
    for own, answer in zip(ours, theirs, strict=True):
        np.testing.assert_allclose([each.score for each in own], [each.score for each in answer], atol=1e-3)
        assert own[0].text == answer[0].text


async def one_block(passages: list[Passage], vectors: Vectors, start: int) -> Any:
    yield passages[start:], vectors[start:]


# What it refuses.


async def test_queries_that_cannot_be_asked(large: Path) -> None:
    store = CompactStore(large)
    good = clustered(2)
    with pytest.raises(StoreError, match="is not open"):
        await store.query(good, 3)
    await store.open()
    try:
        with pytest.raises(StoreError, match=r"another embedder \(dimension 64, got 32\)") as refusal:
            await store.query(clustered(2, 32), 3)
        assert refusal.value.is_fatal
        for number in (np.nan, np.inf):
            broken = good.copy()
            broken[1, 5] = number
            with pytest.raises(RefusedInput, match="non-finite"):
                await store.query(broken, 3)
        assert await store.query(good[:0], 3) == ()
        assert [len(answer) for answer in await store.query(good, 3)] == [3, 3]
    finally:
        await store.aclose()


@pytest.mark.parametrize("name", ["probes", "candidates"])
async def test_numbers_below_1_are_refused(large: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is 0: give at least 1"):
        CompactStore(large, **{name: 0})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"manifest\.json is corrupt"),
        (b'{"kind": "searchr1_async compact', r"manifest\.json is corrupt"),
        (b"[]", r"manifest\.json is corrupt"),
        (
            b'{"kind": "searchr1_async compact index", "format": 2}',
            r"manifest\.json is corrupt, or .*missing required field",
        ),
        (
            b'{"name": "a web application"}',
            r"not the manifest of a compact index of format 2 \(.*missing.*\): name another folder, or rebuild it",
        ),
        (
            b'{"kind": "searchr1_async compact index", "format": 3}',
            r"of format 2 \(Invalid enum value 3 .*\): name another folder, or rebuild it",
        ),
        (
            b'{"kind": "searchr1_async compact index", "format": 2, "vectors": "int8"}',
            "was made by version 0.1 with int8 vectors: delete it and build it again",
        ),
        (b"\xff\xfe", r"manifest\.json is corrupt"),
    ],
)
async def test_a_manifest_that_is_none(index: Path, content: bytes, words: str) -> None:
    (index / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=words) as refusal:
        CompactStore(index)
    assert refusal.value.is_fatal


async def test_a_manifest_that_is_changed_anywhere_opens_or_is_refused_in_words(index: Path) -> None:
    """Whatever a manifest holds: a StoreError, and no error of Python's."""
    original = json.loads((index / "manifest.json").read_bytes())
    paths: list[tuple[str, ...]] = [(name,) for name in original if name not in ("calibration", "files")]
    paths += [("calibration", name) for name in original["calibration"]]
    paths += [("files", name) for name in original["files"]]
    paths += [("files", "codes.faiss", name) for name in ("bytes", "blocks")]
    refused = 0
    for path in paths:
        for value in (None, "x", -3, {}):
            changed = json.loads(json.dumps(original))
            place = changed
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
            (index / "manifest.json").write_text(json.dumps(changed))
            try:
                store = CompactStore(index)
                await store.open()
            except StoreError as error:
                refused += str(index) in str(error)
            else:
                await store.aclose()
    assert refused > len(paths) * 2


async def test_an_unfinished_index_and_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no compact index \(.*manifest\.json cannot be read: No such file"):
        CompactStore(tmp_path)
    with pytest.raises(StoreError, match="holds no compact index"):
        CompactStore(tmp_path / "missing")
    (tmp_path / "building").mkdir()
    with pytest.raises(StoreError, match="unfinished compact index: run the build command again"):
        CompactStore(tmp_path)


@pytest.mark.parametrize(
    "name", ["codes.faiss", "lists.bin", "lists.sizes", "vectors.bin", "passages.jsonl", "passages.offsets"]
)
async def test_files_that_are_cut_short_or_swapped_or_gone(index: Path, tmp_path: Path, name: str) -> None:
    vectors = clustered(ROWS, seed=1)
    if not (other := tmp_path.parent / "other").exists():  # one for all names
        await make(other, vectors, lists=CompactStore(index).manifest.lists)
    content = (index / name).read_bytes()
    same_size = (other / name).stat().st_size == len(content)
    assert same_size or name == "lists.bin"  # lists of other lengths
    (index / name).write_bytes((other / name).read_bytes())
    if same_size and name in (
        "codes.faiss",
        "lists.bin",
        "lists.sizes",
        "vectors.bin",
    ):  # the passages are the same ones
        with pytest.raises(StoreError, match=f"{name} is not the file built with this index"):
            await CompactStore(index).open()
    for broken, words in ((content[:-1], "truncated"), (content + b"x", "too long")):
        (index / name).write_bytes(broken)
        with pytest.raises(StoreError, match=f"{name} is {words}"):
            await CompactStore(index).open()
    (index / name).unlink()
    store = CompactStore(index)
    with pytest.raises(StoreError, match=f"{name} is missing"):
        await store.open()
    (index / name).write_bytes(content)
    await store.open()
    await store.aclose()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 16
    (index / name).write_bytes(changed)
    with pytest.raises(StoreError, match=f"{name} is not the file"):
        await store.open()


# Opening, closing, leaving.


async def test_it_may_be_opened_again_and_twice(large: Path) -> None:
    store, other, queries = CompactStore(large), CompactStore(large), clustered(5)
    await store.open()
    await store.open()
    await other.open()
    first = await store.query(queries, 3)
    assert await other.query(queries, 3) == first
    assert store.fingerprint == other.fingerprint
    await store.aclose()
    await store.aclose()
    with pytest.raises(StoreError, match="is not open"):
        await store.query(queries, 3)
    assert await other.query(queries, 3) == first
    await other.aclose()
    await store.open()
    assert await store.query(queries, 3) == first
    await store.aclose()
    assert CompactStore(large, probes=store.probing.most).fingerprint != store.fingerprint


async def test_a_query_that_is_left_leaves_it_usable(large: Path) -> None:
    store, queries = CompactStore(large), clustered(256)
    await store.open()
    expected = await store.query(queries, 3)
    for checkpoints in range(12):
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(store.query, queries, 3)
            for _ in range(checkpoints):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    assert await store.query(queries, 3) == expected
    await store.aclose()


async def test_closing_it_ends_its_queries_in_words(large: Path) -> None:
    queries = clustered(256)
    store = CompactStore(large)
    ends: list[str] = []

    async def ask() -> None:
        try:
            found = await store.query(queries, 50)
        except StoreError as error:
            ends.append("closed" if "was closed during a query" in str(error) else str(error))
        else:
            assert len(found) == 256
            ends.append("answered")

    for checkpoints in range(12):
        await store.open()
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(ask)
            for _ in range(checkpoints + 1):
                await anyio.lowlevel.checkpoint()
            await store.aclose()
    assert len(ends) == 48, "no query counts as cancelled, since nobody cancelled one"
    assert ends.count("closed") >= 12
    assert {end for end in ends if not end.endswith("is not open")} <= {"closed", "answered"}


async def test_opening_that_is_left_leaves_nothing_open(large: Path) -> None:
    for checkpoints in range(8):
        store = CompactStore(large)
        async with anyio.create_task_group() as group:
            group.start_soon(store.open)
            for _ in range(checkpoints):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        await store.aclose()
        await store.open()
        assert len((await store.query(clustered(1), 2))[0]) == 2
        await store.aclose()


READER = """
import sys, anyio
from searchr1_async.search.compact.store import CompactStore
from tests.search.compact.arrays import clustered
async def main():
    store = CompactStore(sys.argv[1], probes=10**6)
    await store.open()
    await store.query(clustered(64), 3)
    print("asked", flush=True)
    await anyio.to_thread.run_sync(sys.stdin.read)
    await store.aclose()
anyio.run(main)
"""


@pytest.mark.slow  # two processes import the package
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what is shared")
async def test_processes_share_the_codes(large: Path) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READER, str(large)]
    start = partial(
        subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with start() as one, start() as other:
        for process in (one, other):
            assert process.stdout is not None
            assert await anyio.to_thread.run_sync(process.stdout.readline) == "asked\n"
        for process in (one, other):
            resident, share = await anyio.to_thread.run_sync(mapped, process.pid, large / "lists.bin")
            assert resident > 0.5 * (large / "lists.bin").stat().st_size, "what is searched is what is mapped"
            assert share <= 0.6 * resident, "each counts half of it"
        for process in (one, other):
            assert process.stdin is not None
            process.stdin.close()


def mapped(pid: int, file: Path) -> tuple[int, int]:
    """Bytes of a file in a process's memory, and its part of them where others hold them too."""
    sizes = {"Rss": 0, "Pss": 0}
    is_inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] += 1024 * int(rest.split()[0]) * is_inside
        elif "-" in line.split(" ", 1)[0]:
            is_inside = line.endswith(str(file))
    return sizes["Rss"], sizes["Pss"]
