"""Per-block checksums of large files: a few blocks identify a file quickly, all of them detect corruption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from searchr1_async.errors import StoreError
from searchr1_async.search.stores.proof import DamagedIndexError

BLOCK_BYTES = 4 << 20
DIGEST_BYTES = 8
_TOGETHER = 16
"""Blocks between two cancellation checks."""
WHOLE_BLOCKS = 32
"""Files of up to this many blocks (128 MB) are fully checked when an index is opened."""
SPOT_BLOCKS = 8
"""Blocks checked of a larger file."""

Check = Callable[[], None]
"""Called regularly; raises if the caller was cancelled."""

ADVICE = "Copy the whole folder again from where it was built, or rebuild it"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and checksums of an index file."""

    bytes: int
    blocks: str
    """Concatenated 8-byte BLAKE2b digests of each :data:`BLOCK_BYTES`, in hexadecimal."""


def _nothing() -> None:
    pass


def record_of(path: Path, check: Check = _nothing) -> FileRecord:
    """Size and checksums of a file.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    return FileRecord(size, "".join(_digests(path, range(-(-size // BLOCK_BYTES)), check)))


def refuse_other(
    path: Path, record: FileRecord, *, whole: bool = False, check: Check = _nothing, advice: str = ADVICE
) -> None:
    """Raises unless the file matches its record in size and in some or all blocks.

    Args:
        whole: check all blocks, whatever the size.
        check: called regularly; see :data:`Check`.
        advice: how to restore the index.

    Raises:
        DamagedIndexError: the file is missing, truncated, replaced or corrupt.
        StoreError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:
            state = "truncated" if size < record.bytes else "too long"
            raise DamagedIndexError(f"{path} is {state}: {size:,} bytes instead of {record.bytes:,}", advice)
        blocks = -(-size // BLOCK_BYTES)
        if len(record.blocks) != 2 * DIGEST_BYTES * blocks:
            raise DamagedIndexError(f"the manifest does not describe {path}", advice)
        chosen = range(blocks) if whole or blocks <= WHOLE_BLOCKS else _spread(blocks)
        for block, digest in zip(chosen, _digests(path, chosen, check), strict=True):
            if digest != record.blocks[2 * DIGEST_BYTES * block : 2 * DIGEST_BYTES * (block + 1)]:
                raise DamagedIndexError(
                    f"{path} is not the file built with this index, or is corrupt (block {block:,} of "
                    f"{blocks:,} differs)",
                    advice,
                )
    except FileNotFoundError as error:
        raise DamagedIndexError(f"{path} is missing", advice) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", is_fatal=True) from error


def _spread(blocks: int) -> list[int]:
    """The first, the last, and some between."""
    return sorted({round(place * (blocks - 1) / (SPOT_BLOCKS - 1)) for place in range(SPOT_BLOCKS)})


def _digests(path: Path, blocks: Sequence[int], check: Check) -> Iterator[str]:
    """Digests of some blocks, two at a time (hashlib releases the GIL)."""
    with ThreadPoolExecutor(2) as pool:
        for first in range(0, len(blocks), _TOGETHER):
            check()
            yield from pool.map(lambda block: _digest(path, block * BLOCK_BYTES), blocks[first : first + _TOGETHER])


def _digest(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.blake2b(file.read(BLOCK_BYTES), digest_size=DIGEST_BYTES).hexdigest()
