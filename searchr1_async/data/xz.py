"""Reads the unpacked size of an ``.xz`` file from its end, without reading the rest."""

from __future__ import annotations

import zlib
from collections.abc import Callable

Read = Callable[[int, int], bytes]
"""``read(start, length)`` returns that part of the file."""

_FOOTER_MAGIC, _HEADER_SIZE, _FOOTER_SIZE = b"YZ", 12, 12
_MOST_INDEX_BYTES = 64 << 20
"""xz writes about 8 bytes per block, and by default a block per 24 MiB."""


class BrokenXzError(ValueError):
    """Not an xz file, or truncated."""


def unpacked_size(read: Read, size: int) -> int:
    """The unpacked size of an xz file, over all its streams.

    Every stream ends with an index of its blocks and a footer with the index's length: section 2.1.2 and chapter 4 of "The .xz File
    Format", version 1.2.1. Only these are read, backwards.

    Args:
        read: reads a part of the file.
        size: size of the file in bytes.

    Raises:
        BrokenXzError: not an xz file, or truncated.
        Exception: any error of ``read``.
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
    """Of the stream that ends at ``end``: size of its blocks, their unpacked size, and size of its index."""
    if len(footer) != _FOOTER_SIZE or footer[10:] != _FOOTER_MAGIC or zlib.crc32(footer[4:10]) != _number(footer[:4]):
        raise BrokenXzError("no xz footer at the end")
    index_size = (_number(footer[4:8]) + 1) * 4
    start = end - _FOOTER_SIZE - index_size
    if start < _HEADER_SIZE or index_size > _MOST_INDEX_BYTES:
        raise BrokenXzError("an invalid xz index")
    index = read(start, index_size)
    if len(index) != index_size or index[0] != 0 or zlib.crc32(index[:-4]) != _number(index[-4:]):
        raise BrokenXzError("a corrupt xz index")
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
    """The number at ``position`` and the position after it: 7 bits per byte, the high bit marks continuation."""
    value = shift = 0
    while shift < 63 and position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise BrokenXzError("a corrupt number in an xz index")
