"""Checksums of large files, block by block: a few blocks tell a file from another one at once, all of them a broken one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from searchr1_async.errors import StoreError
from searchr1_async.search.stores.compact.layout import FileRecord

BLOCK_BYTES = 4 << 20
DIGEST_BYTES = 8
SPOT_BLOCKS = 8
"""Looked at when an index is opened: 0.1 s for its four files, where all of them take half a minute a billion numbers."""

Check = Callable[[], None]
"""Called every now and then; raises where the caller has gone."""


def _nothing() -> None:
    pass


def record_of(path: Path, check: Check = _nothing) -> FileRecord:
    """The size and the checksums of a file, two blocks at a time.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    starts = range(0, size, BLOCK_BYTES)
    digests: list[str] = []
    with ThreadPoolExecutor(2) as pool:  # hashlib lets go of the interpreter's lock
        for first in range(0, len(starts), 64):
            check()
            digests += pool.map(lambda start: _digest(path, start), starts[first : first + 64])
    return FileRecord(size, "".join(digests))


def refuse_other(path: Path, record: FileRecord, *, whole: bool = False, check: Check = _nothing) -> None:
    """Refuses a file that is not the one recorded: by its size, and some of its blocks, or all of them.

    Raises:
        StoreError: it is missing, cut short, another one, or broken.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:
            state = "cut short" if size < record.bytes else "too long"
            raise StoreError(
                f"{path} is {state}: {size:,} bytes in place of {record.bytes:,}. {_ADVICE}", is_fatal=True
            )
        blocks = -(-size // BLOCK_BYTES)
        if len(record.blocks) != 2 * DIGEST_BYTES * blocks:
            raise StoreError(f"the manifest beside {path} is of another file. {_ADVICE}", is_fatal=True)
        chosen = range(blocks) if whole or blocks <= SPOT_BLOCKS else _spread(blocks)
        for block in chosen:
            check()
            own = record.blocks[2 * DIGEST_BYTES * block : 2 * DIGEST_BYTES * (block + 1)]
            if _digest(path, block * BLOCK_BYTES) != own:
                raise StoreError(
                    f"{path} is not the file that was made with this index, or it is broken (block {block:,} of "
                    f"{blocks:,} differs). {_ADVICE}",
                    is_fatal=True,
                )
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. {_ADVICE}", is_fatal=True) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", is_fatal=True) from error


_ADVICE = "Copy the whole folder again from where it was made, or make it again"


def _spread(blocks: int) -> list[int]:
    """The first, the last, and some between."""
    return sorted({round(place * (blocks - 1) / (SPOT_BLOCKS - 1)) for place in range(SPOT_BLOCKS)})


def _digest(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.blake2b(file.read(BLOCK_BYTES), digest_size=DIGEST_BYTES).hexdigest()
