"""Checksums of large files, block by block: a few blocks tell a file from another one at once, all of them a broken one."""

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
"""Blocks between two looks at whether the caller has gone."""
WHOLE_BLOCKS = 32
"""A file of at most so many blocks is compared whole when an index is opened: 128 MB in about 0.1 s."""
SPOT_BLOCKS = 8
"""Compared of a larger file, where all of them take half a minute a billion numbers."""

Check = Callable[[], None]
"""Called every now and then; raises where the caller has gone."""


ADVICE = "Copy the whole folder again from where it was made, or make it again"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of an index."""

    bytes: int
    blocks: str
    """BLAKE2b of 8 bytes for each :data:`BLOCK_BYTES`, in hexadecimal, one after another."""


def _nothing() -> None:
    pass


def record_of(path: Path, check: Check = _nothing) -> FileRecord:
    """The size and the checksums of a file, two blocks at a time.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    return FileRecord(size, "".join(_digests(path, range(-(-size // BLOCK_BYTES)), check)))


def refuse_other(
    path: Path, record: FileRecord, *, whole: bool = False, check: Check = _nothing, advice: str = ADVICE
) -> None:
    """Refuses a file that is not the one recorded: by its size, and some of its blocks, or all of them.

    Args:
        whole: compares all blocks of a file of any size.
        check: called every now and then.
        advice: how to get a whole index again.

    Raises:
        DamagedIndexError: it is missing, cut short, another one, or broken.
        StoreError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:
            state = "cut short" if size < record.bytes else "too long"
            raise DamagedIndexError(f"{path} is {state}: {size:,} bytes in place of {record.bytes:,}", advice)
        blocks = -(-size // BLOCK_BYTES)
        if len(record.blocks) != 2 * DIGEST_BYTES * blocks:
            raise DamagedIndexError(f"the manifest beside {path} is of another file", advice)
        chosen = range(blocks) if whole or blocks <= WHOLE_BLOCKS else _spread(blocks)
        for block, digest in zip(chosen, _digests(path, chosen, check), strict=True):
            if digest != record.blocks[2 * DIGEST_BYTES * block : 2 * DIGEST_BYTES * (block + 1)]:
                raise DamagedIndexError(
                    f"{path} is not the file that was made with this index, or it is broken (block {block:,} of "
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
    """Of some blocks, two at a time: hashlib lets go of the interpreter's lock."""
    with ThreadPoolExecutor(2) as pool:
        for first in range(0, len(blocks), _TOGETHER):
            check()
            yield from pool.map(lambda block: _digest(path, block * BLOCK_BYTES), blocks[first : first + _TOGETHER])


def _digest(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.blake2b(file.read(BLOCK_BYTES), digest_size=DIGEST_BYTES).hexdigest()
