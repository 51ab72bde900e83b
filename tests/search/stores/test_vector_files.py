"""Vectors of files beside a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores import sources as files
from searchr1_async.search.stores.sources import VectorFiles

pytestmark = pytest.mark.anyio

TOTAL, DIMENSION = 50, 6
MANY = [Passage(f"p{number}", "Title", f"text {number}") for number in range(TOTAL)]
VECTORS = np.random.default_rng(1).standard_normal((TOTAL, DIMENSION)).astype(np.float16).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROWS", 7)


def npy(path: Path, vectors: Any) -> Path:
    np.save(path, vectors)
    return path


async def read(source: VectorFiles, start: int = 0) -> tuple[list[Passage], Vectors]:
    await source.open()
    try:
        blocks = [block async for block in source.blocks(start)]
        assert all(0 < len(own) == len(vectors) <= 7 for own, vectors in blocks)
        return [passage for own, _ in blocks for passage in own], np.concatenate([vectors for _, vectors in blocks])
    finally:
        await source.aclose()


@pytest.mark.parametrize("start", [0, 1, 20, 21, 49])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "several"])
async def test_every_row_comes_in_order(tmp_path: Path, kind: str, start: int) -> None:
    paths: Any = npy(tmp_path / "v.npy", VECTORS.astype(kind)) if kind != "several" else []
    for name, part in (("z", slice(20)), ("a", slice(20, 45)), ("b", slice(45, None))) if kind == "several" else ():
        paths.append(str(npy(tmp_path / f"{name}.npy", VECTORS[part])))
    source = VectorFiles(paths, MANY, metric="ip")
    facts = await source.open()
    assert (facts.count, facts.dimension, facts.metric) == (TOTAL, DIMENSION, "ip")
    passages, vectors = await read(source, start)
    assert passages == MANY[start:]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, VECTORS[start:])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (VECTORS[:-1], "49 vectors for the 50 passages"),
        (VECTORS.reshape(-1), r"shape \(300,\)"),
        (VECTORS.astype(np.int32), "int32"),
        (VECTORS.astype(object), "cannot be read"),
    ],
)
async def test_arrays_that_cannot_be_used(tmp_path: Path, vectors: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        await read(VectorFiles(npy(tmp_path / "v.npy", vectors), MANY))


async def test_files_that_are_none_or_do_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"vectors must be \.npy files, got .*numpy\.save"):
        VectorFiles(tmp_path / "vectors.bin", MANY)
    with pytest.raises(StoreError, match="none"):
        VectorFiles([], MANY)
    with pytest.raises(StoreError, match="cannot be read"):
        await read(VectorFiles(tmp_path / "missing.npy", MANY))
    (tmp_path / "empty.npy").touch()
    with pytest.raises(StoreError, match=r"empty\.npy cannot be read"):
        await read(VectorFiles(tmp_path / "empty.npy", MANY))
    np.savez(tmp_path / "several.npz", VECTORS)
    with pytest.raises(StoreError, match=r"several\.npy cannot be read"):
        await read(VectorFiles((tmp_path / "several.npz").rename(tmp_path / "several.npy"), MANY))
    two = [npy(tmp_path / "a.npy", VECTORS[:20]), npy(tmp_path / "b.npy", VECTORS[20:, :5])]
    with pytest.raises(StoreError, match=r"dimensions \{5, 6\}"):
        await read(VectorFiles(two, MANY))


async def test_other_content_has_another_fingerprint(tmp_path: Path) -> None:
    async def fingerprint(vectors: Any, passages: list[Passage] = MANY, **options: Any) -> str:
        source = VectorFiles(npy(tmp_path / "v.npy", vectors), passages, **options)
        return (await source.open()).fingerprint

    first = await fingerprint(VECTORS)
    assert await fingerprint(VECTORS) == first
    assert (
        len(
            {
                first,
                await fingerprint(-VECTORS),
                await fingerprint(VECTORS, metric="l2"),
                await fingerprint(VECTORS, MANY[::-1]),
            }
        )
        == 4
    )
