"""Vectors of files beside a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
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


def parquet(path: Path, vectors: Any, column: str = "vector", **options: Any) -> Path:
    pl.DataFrame({"other": range(len(vectors)), column: vectors}, **options).write_parquet(path, row_group_size=20)
    return path


def lists(vectors: Vectors) -> pl.Series:
    return pl.Series(vectors).cast(pl.List(pl.Float64))


async def read(source: VectorFiles, start: int = 0) -> tuple[list[Passage], Vectors]:
    await source.open()
    try:
        blocks = [block async for block in source.blocks(start)]
        assert all(0 < len(own) == len(vectors) <= 7 for own, vectors in blocks)
        return [passage for own, _ in blocks for passage in own], np.concatenate([vectors for _, vectors in blocks])
    finally:
        await source.aclose()


@pytest.mark.parametrize("start", [0, 1, 20, 21, 49])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "arrays", "lists", "several"])
async def test_every_row_comes_in_order(tmp_path: Path, kind: str, start: int) -> None:
    match kind:
        case "arrays":
            paths: Any = parquet(tmp_path / "v.parquet", pl.Series(VECTORS))
        case "lists":
            paths = str(parquet(tmp_path / "v.parquet", lists(VECTORS), "embedding"))
        case "several":
            paths = [
                npy(tmp_path / "z.npy", VECTORS[:20]),
                parquet(tmp_path / "a.parquet", pl.Series(VECTORS[20:45])),
                npy(tmp_path / "b.npy", VECTORS[45:]),
            ]
        case _:
            paths = npy(tmp_path / "v.npy", VECTORS.astype(kind))
    source = VectorFiles(paths, MANY, metric="ip", embedder="gemini-embedding-001")
    facts = await source.open()
    assert (facts.count, facts.dimension, facts.metric) == (TOTAL, DIMENSION, "ip")
    assert facts.embedder == "gemini-embedding-001"
    passages, vectors = await read(source, start)
    assert passages == MANY[start:]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, VECTORS[start:])


def spoilt(row: int, value: float, kind: str = "float32") -> Any:
    vectors = VECTORS.astype(kind)
    vectors[row, 2] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (spoilt(37, np.nan), "row 37 .*not finite"),
        (spoilt(8, 1e300, "float64"), "row 8 .*not finite"),
        (VECTORS[:-1], "49 vectors for the 50 passages"),
        (VECTORS.reshape(-1), r"shape \(300,\)"),
        (VECTORS.astype(np.int32), "int32"),
        (VECTORS.astype(object), "cannot be read"),
    ],
)
async def test_arrays_that_cannot_be_used(tmp_path: Path, vectors: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        await read(VectorFiles(npy(tmp_path / "v.npy", vectors), MANY))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pl.Series([*VECTORS[:30].tolist(), [1.0, 2.0], *VECTORS[31:].tolist()]), "row 30 .*not a vector of 6"),
        (pl.Series([*VECTORS[:41].tolist(), None, *VECTORS[42:].tolist()]), "row 41 .*not a vector of 6"),
        (pl.Series([*VECTORS[:9].tolist(), [None] * 6, *VECTORS[10:].tolist()]), "row 9 .*not a vector of 6"),
        (pl.Series(spoilt(44, np.inf)), "row 44 .*not finite"),
        (pl.Series(["words"] * TOTAL), "lists or arrays of floats"),
        (pl.Series([[1, 2]] * TOTAL), "lists or arrays of floats"),
    ],
)
async def test_parquet_that_cannot_be_used(tmp_path: Path, column: pl.Series, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        await read(VectorFiles(parquet(tmp_path / "v.parquet", column), MANY))


async def test_files_that_are_none_or_do_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"\.npy or \.parquet"):
        VectorFiles(tmp_path / "vectors.bin", MANY)
    with pytest.raises(StoreError, match="none"):
        VectorFiles([], MANY)
    with pytest.raises(StoreError, match="cannot be read"):
        await read(VectorFiles(tmp_path / "missing.npy", MANY))
    with pytest.raises(StoreError, match="neither a column 'vector'"):
        await read(VectorFiles(parquet(tmp_path / "v.parquet", pl.Series(VECTORS), "numbers"), MANY))
    two = [npy(tmp_path / "a.npy", VECTORS[:20]), npy(tmp_path / "b.npy", VECTORS[20:, :5])]
    with pytest.raises(StoreError, match="different embedders"):
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


async def test_no_character_of_a_file_s_name_is_a_wildcard(tmp_path: Path) -> None:
    for name, vectors in (("v1", -VECTORS), ("v[1]", VECTORS)):
        with (tmp_path / f"{name}.parquet").open("wb") as file:
            pl.DataFrame({"vector": lists(vectors)}).write_parquet(file)
    _, found = await read(VectorFiles(tmp_path / "v[1].parquet", MANY))
    assert np.array_equal(found, VECTORS)
