"""A Chroma folder read without Chroma, held against what Chroma itself answers of it.

Where a new version of Chroma fails here, its layout has changed: see `searchr1_async/search/stores/compat.py`.
"""

from __future__ import annotations

import pickle
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from anyio import to_thread
from chromadb.config import Settings

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores import compat
from searchr1_async.search.stores.compat import FolderSource, collections_in, last_change, read_labels

pytestmark = pytest.mark.anyio

DIMENSION = 6
Rows = dict[str, tuple[str, str, Vectors]]
"""By id: title, document and vector."""


def random_vectors(count: int) -> Vectors:
    return np.random.default_rng(count).standard_normal((count, DIMENSION), dtype=np.float32)


def fill(collection: chromadb.Collection, count: int = 700) -> None:
    """In several batches, with changes in the files and others in the log only."""

    def put(how: Callable[..., Any], ids: list[str], word: str) -> None:
        documents = [f'"Quoted {own_id}"\n{word} {own_id}' for own_id in ids]
        titles = [{"title": f"{word} {own_id}"} for own_id in ids]
        how(ids=ids, embeddings=random_vectors(len(ids)), documents=documents, metadatas=titles)

    ids = [f"p{number}" for number in range(count)]
    for start in range(0, count, 130):
        put(collection.add, ids[start : start + 130], "first")
    collection.delete(ids=ids[5::13])
    put(collection.update, ids[1::17], "updated")
    put(collection.upsert, ids[2::19], "upserted")
    put(collection.add, [f"r{number}" for number in range(130)], "after all changes")
    # Fewer changes than are needed for the files to be written again.
    put(collection.add, [f"q{number}" for number in range(12)], "late")
    put(collection.upsert, ["q5", "p9"], "upserted late")
    put(collection.add, ["p10", "q1"], "ignored")
    collection.add(ids=["untitled"], embeddings=random_vectors(1), documents=['"A title"\nand a text'])


def make(folder: Path, name: str = "passages", count: int = 700, **settings: Any) -> Rows:
    """A filled collection, and what Chroma says of it."""
    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    try:
        collection = client.create_collection(name, embedding_function=None, **settings)
        fill(collection, count)
        found: Mapping[str, Any] = collection.get(include=["embeddings", "documents", "metadatas"])
        vectors = np.asarray(found["embeddings"], np.float32)
        titles = [(metadata or {}).get("title", "") for metadata in found["metadatas"]]
        return dict(zip(found["ids"], zip(titles, found["documents"], vectors, strict=True), strict=True))
    finally:
        client.close()  # pyright: ignore[reportAttributeAccessIssue]


def written(folder: Path) -> bool:
    return any(folder.glob("*/index_metadata.pickle"))


def by_configuration(space: str) -> dict[str, Any]:
    return {"configuration": {"hnsw": {"space": space, "batch_size": 50, "sync_threshold": 100}}}


def by_metadata(space: str) -> dict[str, Any]:
    return {"metadata": {"hnsw:space": space, "hnsw:batch_size": 50, "hnsw:sync_threshold": 100}}


async def read(source: FolderSource, start: int = 0) -> tuple[list[Passage], Vectors]:
    await source.open()
    try:
        blocks = [block async for block in source.blocks(start)]
        return [passage for own, _ in blocks for passage in own], np.concatenate([vectors for _, vectors in blocks])
    finally:
        await source.aclose()


def unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("settings", "space"),
    [(by_configuration("l2"), "l2"), (by_metadata("cosine"), "cosine"), (by_configuration("ip"), "ip")],
    ids=["l2", "cosine", "ip"],
)
async def test_it_reads_what_chroma_answers(
    tmp_path: Path, settings: dict[str, Any], space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "ROWS", 64)
    rows = make(tmp_path, **settings)
    assert written(tmp_path)
    source = FolderSource(tmp_path)
    facts = await source.open()
    assert (facts.count, facts.dimension, facts.metric) == (len(rows), DIMENSION, space)
    passages, vectors = await read(source)
    assert vectors.dtype == np.float32
    assert sorted(passage.id for passage in passages) == sorted(rows)
    expected = np.stack([rows[passage.id][2] for passage in passages])
    if space == "cosine":
        np.testing.assert_allclose(unit(vectors), unit(expected), atol=1e-6)
    else:
        np.testing.assert_array_equal(vectors, expected)
    for passage in passages:
        title, document, _ = rows[passage.id]
        if passage.id == "untitled":
            assert (passage.title, passage.text) == ("A title", "and a text")
        else:
            assert (passage.title, passage.text) == (title, document)
    for start in (1, 63, 64, 65, 640, len(rows) - 1):
        later, later_vectors = await read(source, start)
        assert later == passages[start:]
        np.testing.assert_array_equal(later_vectors, vectors[start:])


async def test_the_pickles_of_the_python_versions_are_read_and_never_run(tmp_path: Path) -> None:
    """Until chromadb 1.0 an object of a class lay in there, and equal texts once."""

    class PersistentData:
        def __init__(self, ids: list[str]) -> None:
            self.dimensionality, self.total_elements_added = DIMENSION, len(ids)
            self.max_seq_id = 70_001
            self.id_to_label = {own_id: number for number, own_id in enumerate(ids, start=1)}
            self.label_to_id = dict(enumerate(ids, start=1))
            self.id_to_seq_id = {}

        def __reduce_ex__(self, protocol: Any) -> Any:
            return print, ("it was run",), self.__dict__

    ids = [
        *(f"p{number}" for number in range(70_000)),
        "x" * 300,
        "中",
        *("_".join(words) for words in (["max", "seq_id"], ["id", "to_label"])),
    ]
    path = tmp_path / "index_metadata.pickle"
    data = PersistentData(ids)
    plain = {name: getattr(data, name) for name in vars(data)}
    for protocol in (3, 4, 5):
        path.write_bytes(pickle.dumps(plain, protocol))
        found, labels, last = await to_thread.run_sync(read_labels, path)
        assert last == 70_001
        assert found.to_list() == ids
        np.testing.assert_array_equal(labels, range(1, len(ids) + 1))
    path.write_bytes(pickle.dumps(data, 5))
    await to_thread.run_sync(read_labels, path)
    whole = pickle.dumps(plain, 5)
    for end in (0, 1, 100, len(whole) // 8):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError):  # noqa: PT011
            await to_thread.run_sync(read_labels, path)


async def test_the_fingerprint_changes_with_the_collection_alone(tmp_path: Path) -> None:
    make(tmp_path / "one", **by_configuration("l2"))
    source = FolderSource(tmp_path / "one")
    first = await source.open()
    await source.aclose()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    copied = FolderSource(tmp_path / "two")
    assert (await copied.open()).fingerprint == first.fingerprint
    await copied.aclose()
    client = chromadb.PersistentClient(tmp_path / "two", settings=Settings(anonymized_telemetry=False))
    collection = client.get_collection("passages", embedding_function=None)
    collection.upsert(ids=["p0"], embeddings=random_vectors(1))
    client.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert (await copied.open()).fingerprint != first.fingerprint
    await copied.aclose()


async def test_several_collections_are_refused(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make(tmp_path, name, 150, **by_configuration("l2"))
    with pytest.raises(StoreError, match="holds 2 collections instead of one"):
        await FolderSource(tmp_path).open()
    assert collections_in(tmp_path) == ("first", "second")


def test_changes_are_numbered(tmp_path: Path) -> None:
    """A record of checksums holds as long as the number of the last change."""
    make(tmp_path, **by_configuration("l2"))
    (segment,) = (path.parent.name for path in tmp_path.glob("*/data_level0.bin"))
    before = last_change(tmp_path, segment)
    assert before is not None
    assert last_change(tmp_path, "none") is None
    client = chromadb.PersistentClient(tmp_path, settings=Settings(anonymized_telemetry=False))
    ids = [f"n{number}" for number in range(300)]
    client.get_collection("passages", embedding_function=None).add(ids=ids, embeddings=random_vectors(300))
    client.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert (last_change(tmp_path, segment) or 0) > before


def change(folder: Path, statement: str) -> None:
    database = sqlite3.connect(folder / "chroma.sqlite3")
    with database:
        database.execute(statement)
    database.close()


def cut(folder: Path, name: str) -> None:
    (path,) = folder.glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda folder: cut(folder, "data_level0.bin"), "truncated"),
        (lambda folder: cut(folder, "header.bin"), "unsupported layout"),
        (lambda folder: cut(folder, "index_metadata.pickle"), None),
        (lambda folder: change(folder, "UPDATE collections SET dimension = 7"), "not of dimension 7"),
        (
            lambda folder: change(folder, "UPDATE segments SET type = 'urn:other' WHERE scope = 'VECTOR'"),
            "unsupported layout",
        ),
        (lambda folder: change(folder, "DROP TABLE embeddings_queue"), "cannot be read"),
        (lambda folder: change(folder, "DELETE FROM embeddings"), "no passages"),
        (
            lambda folder: change(folder, "UPDATE embeddings SET embedding_id = 'stranger' WHERE id = 40"),
            "no passage for the vector",
        ),
        (lambda folder: change(folder, "DELETE FROM embeddings_queue"), "but other vectors"),
        (lambda folder: (folder / "chroma.sqlite3").write_bytes(b"no database" * 100), "cannot be read"),
        (lambda folder: (folder / "chroma.sqlite3").unlink(), "cannot be read"),
        (
            lambda folder: change(folder, "UPDATE migrations SET version = version + 99"),
            "not written by chromadb 0.5 to 1.5",
        ),
        (lambda folder: change(folder, "UPDATE embeddings_queue SET operation = 3"), "updates or deletions"),
    ],
    ids=[
        "vectors",
        "header",
        "end of the labels",
        "dimension",
        "segment",
        "table",
        "empty",
        "no vector",
        "behind",
        "no database",
        "nothing",
        "another version",
        "a deletion in the log",
    ],
)
async def test_what_is_broken_or_unknown_is_refused(
    whole: Path, tmp_path: Path, how: Callable[[Path], Any], message: str | None
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    how(folder)
    if message is None:  # what follows the ids is not needed
        await read(FolderSource(folder))
        return
    with pytest.raises(StoreError, match=message):
        await read(FolderSource(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make(folder, count=300, **by_configuration("l2"))
    return folder
