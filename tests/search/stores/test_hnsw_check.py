"""Vector files of Chroma with any damage: refused in words, or read; never another error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import chromadb
import numpy as np
import pytest
from chromadb.config import Settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1_async.boundary.waits import in_thread
from searchr1_async.search.stores import chroma_files as hnsw_check
from searchr1_async.search.stores.chroma_files import FILE_NAMES, BrokenSegmentError, check_segment

DIMENSION = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segment of 500 rows, some of them in upper layers."""
    path = tmp_path_factory.mktemp("chroma")
    client = chromadb.PersistentClient(path, settings=Settings(anonymized_telemetry=False))
    configuration: Any = {"hnsw": {"space": "cosine", "batch_size": 50, "sync_threshold": 100}}
    try:
        collection = client.create_collection("some", embedding_function=None, configuration=configuration)
        vectors = np.random.default_rng(1).standard_normal((500, DIMENSION)).astype(np.float32)
        collection.add(ids=[f"p{number}" for number in range(500)], embeddings=vectors)
    finally:
        client.close()  # pyright: ignore[reportAttributeAccessIssue]
    return next(path.glob("*-*"))


def check(folder: Path) -> int:
    segment = anyio.run(lambda: in_thread(lambda: check_segment(folder, DIMENSION, is_cosine=True)))
    return len(segment.labels.labels)


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def test_a_whole_segment_passes_in_whole_and_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(folder) == 500
    monkeypatch.setattr(hnsw_check, "WHOLE_BYTES", 0)
    monkeypatch.setattr(hnsw_check, "SPOT_ROWS", 20)
    assert check(folder) == 500
    rows = folder / "data_level0.bin"
    with changed(rows, bytes(rows.stat().st_size)), pytest.raises(BrokenSegmentError, match="that are zero"):
        check(folder)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILE_NAMES),
    begin=st.floats(0, 1),
    share=st.floats(0, 1),
    how=st.sampled_from(["zero", "ones", "cut", "noise"]),
    seed=st.integers(0, 1_000),
)
def test_any_damage_is_refused_or_read(
    folder: Path, name: str, begin: float, share: float, how: str, seed: int
) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    first = int(begin * len(content))
    last = first + int(share * (len(content) - first))
    if how == "cut":
        del content[first:]
    else:
        noise = np.random.default_rng(seed).bytes(last - first)
        content[first:last] = {"zero": bytes(last - first), "ones": b"\xff" * (last - first), "noise": noise}[how]
    with changed(path, bytes(content)), contextlib.suppress(BrokenSegmentError):
        assert 0 <= check(folder) <= 500


@pytest.mark.parametrize("target", [500, 2**32 - 1])
@pytest.mark.parametrize("name", ["data_level0.bin", "link_lists.bin"])
def test_a_link_that_leads_nowhere_is_found(folder: Path, name: str, target: int) -> None:
    """Chroma would follow it out of its memory."""
    path = folder / name
    words = np.frombuffer(path.read_bytes(), "<u4").copy()
    if name == "data_level0.bin":
        words[1] = target  # the first link of the first row
    else:
        words[int(np.flatnonzero(words)[0]) + 2] = target  # the first link of the first row that has any
    with changed(path, words.tobytes()), pytest.raises(BrokenSegmentError, match="links to missing rows"):
        check(folder)
