"""Files of an index that are not the ones it was made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from searchr1_async.errors import StoreError
from searchr1_async.search.stores import vector_store as checksums
from searchr1_async.search.stores.vector_store import SPOT_BLOCKS, WHOLE_BLOCKS, FileRecord, record_of, refuse_other

BLOCK = 64


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vectors.bin"


def write(path: Path, size: int, seed: int = 0) -> FileRecord:
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return record_of(path)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 300 * BLOCK + 7])
def test_a_file_is_its_own(path: Path, size: int) -> None:
    record = write(path, size)
    assert record.bytes == size
    assert len(record.blocks) == 16 * -(-size // BLOCK)
    refuse_other(path, record)


@pytest.mark.parametrize(("change", "words"), [(-1, "truncated: 999 bytes instead of 1,000"), (1, "too long: 1,001")])
def test_another_size_is_refused_with_both_sizes(path: Path, change: int, words: str) -> None:
    record = write(path, 1_000)
    path.write_bytes((path.read_bytes() + b"x")[: 1_000 + change])
    with pytest.raises(StoreError, match=words) as refusal:
        refuse_other(path, record)
    assert str(path) in str(refusal.value)
    assert "Copy the whole folder again" in str(refusal.value)
    assert refusal.value.is_fatal


def test_any_changed_byte_of_a_file_of_moderate_size_is_found(path: Path) -> None:
    size = WHOLE_BLOCKS * BLOCK
    record = write(path, size)
    for place in range(0, size, 29):
        flip(path, place)
        with pytest.raises(StoreError, match="or is corrupt"):
            refuse_other(path, record)
        flip(path, place)
    refuse_other(path, record)


def test_of_a_large_file_some_blocks_are_looked_at(path: Path) -> None:
    blocks = 50
    record = write(path, blocks * BLOCK)
    found = set()
    for block in range(blocks):
        flip(path, block * BLOCK + block % BLOCK)
        try:
            refuse_other(path, record)
        except StoreError:
            found.add(block)
        flip(path, block * BLOCK + block % BLOCK)
    assert len(found) == SPOT_BLOCKS
    assert {0, blocks - 1} <= found


def test_another_file_of_equal_size_is_refused_at_once(path: Path, tmp_path: Path) -> None:
    record = write(path, 100 * BLOCK)
    write(path, 100 * BLOCK, seed=1)
    with pytest.raises(StoreError, match="not the file built with this index"):
        refuse_other(path, record)


def test_a_missing_file_a_folder_and_a_manifest_of_another_file(path: Path) -> None:
    record = write(path, 3 * BLOCK)
    with pytest.raises(StoreError, match="not the file built with this index"):
        refuse_other(path, FileRecord(record.bytes, record.blocks[16:]))
    path.unlink()
    with pytest.raises(StoreError, match=r"vectors\.bin is missing\. Copy the whole folder"):
        refuse_other(path, record)
    path.mkdir()
    with pytest.raises(StoreError, match=str(path)):
        refuse_other(path, record)


def test_whoever_has_gone_is_not_kept_waiting(path: Path) -> None:
    write(path, 300 * BLOCK)

    class GoneError(Exception):
        pass

    def gone() -> None:
        raise GoneError

    with pytest.raises(GoneError):
        record_of(path, gone)
