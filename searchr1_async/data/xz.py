"""How much an ``.xz`` file unpacks to, read from its end: a few kilobytes tell it of a file of a hundred gigabytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable

Read = Callable[[int, int], bytes]
"""``read(start, length)``: that part of the file."""

_FOOTER_MAGIC, _HEADER_SIZE, _FOOTER_SIZE = b"YZ", 12, 12
_MOST_INDEX_BYTES = 64 << 20
"""xz writes about 8 bytes a block and, at its default level, a block every 24 MiB."""


class BrokenXzError(ValueError):
    """No xz file, or one that was cut short."""


def unpacked_size(read: Read, size: int) -> int:
    """The bytes that an xz file unpacks to, all its streams together.

    Every stream ends with an index of its blocks and a footer that says how long the index is: section 2.1.2 and
    chapter 4 of "The .xz File Format", version 1.2.1. Only these are read, from the end of the file backwards.

    Args:
        read: gives a part of the file.
        size: bytes of the whole file.

    Raises:
        BrokenXzError: no xz file, or one that was cut short.
        Exception: whatever ``read`` raises.
    """
    total, end = 0, size
    while end:
        if end < _HEADER_SIZE + _FOOTER_SIZE:
            raise BrokenXzError("too short for an xz stream")
        footer = read(end - _FOOTER_SIZE, _FOOTER_SIZE)
        if footer == bytes(_FOOTER_SIZE) or footer[-4:] == bytes(4):  # padding between streams, in steps of 4 bytes
            end -= 4
            continue
        blocks, unpacked, index_size = _read_stream_end(read, end, footer)
        end -= _HEADER_SIZE + blocks + index_size + _FOOTER_SIZE
        if end < 0:
            raise BrokenXzError("an xz stream is longer than its file")
        total += unpacked
    return total


def _read_stream_end(read: Read, end: int, footer: bytes) -> tuple[int, int, int]:
    """Of the stream that ends at ``end``: the bytes of its blocks, what they unpack to, and the bytes of its index."""
    if len(footer) != _FOOTER_SIZE or footer[10:] != _FOOTER_MAGIC or zlib.crc32(footer[4:10]) != _number(footer[:4]):
        raise BrokenXzError("no xz footer at the end")
    index_size = (_number(footer[4:8]) + 1) * 4
    start = end - _FOOTER_SIZE - index_size
    if start < _HEADER_SIZE or index_size > _MOST_INDEX_BYTES:
        raise BrokenXzError("an xz index that cannot be")
    index = read(start, index_size)
    if len(index) != index_size or index[0] != 0 or zlib.crc32(index[:-4]) != _number(index[-4:]):
        raise BrokenXzError("a broken xz index")
    count, position = _variable_length(index, 1)
    blocks = unpacked = 0
    for _ in range(count):
        block, position = _variable_length(index, position)
        content, position = _variable_length(index, position)
        blocks += (block + 3) // 4 * 4
        unpacked += content
    return blocks, unpacked, index_size


def _number(little_endian: bytes) -> int:
    return int.from_bytes(little_endian, "little")


def _variable_length(data: bytes, position: int) -> tuple[int, int]:
    """The number at ``position`` and the position behind it: 7 bits a byte, the highest bit says that more follow."""
    value = shift = 0
    while shift < 63 and position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise BrokenXzError("a broken number in an xz index")
