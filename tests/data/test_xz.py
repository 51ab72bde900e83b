"""The unpacked size of xz files, as the library that packs them would have it."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.data.hub import BrokenXzError, unpacked_size


def reader(packed: bytes) -> Callable[[int, int], bytes]:
    def read(start: int, length: int) -> bytes:
        assert 0 <= start <= start + length <= len(packed)
        return packed[start : start + length]

    return read


@given(
    st.lists(
        st.tuples(st.binary(max_size=5_000), st.integers(0, 3), st.sampled_from([0, 4, 16])), min_size=1, max_size=4
    )
)
def test_it_is_the_sum_over_all_streams(streams: list[tuple[bytes, int, int]]) -> None:
    packed = b"".join(lzma.compress(content, preset=preset) + bytes(padding) for content, preset, padding in streams)
    assert unpacked_size(reader(packed), len(packed)) == sum(len(content) for content, _, _ in streams)


@given(st.binary(min_size=1, max_size=2_000), st.data())
def test_a_file_cut_short_or_altered_at_its_end_is_refused(content: bytes, data: st.DataObject) -> None:
    packed = lzma.compress(content)
    cut = packed[: data.draw(st.integers(1, len(packed) - 1), "cut")]
    if cut != bytes(len(cut)):
        with pytest.raises(BrokenXzError):
            unpacked_size(reader(cut), len(cut))
    altered = bytearray(packed)
    altered[len(packed) - 1 - data.draw(st.integers(0, 11), "place")] ^= 0x55
    with pytest.raises(BrokenXzError):
        unpacked_size(reader(bytes(altered)), len(altered))


@given(st.binary(min_size=1, max_size=200))
def test_anything_else_is_refused(noise: bytes) -> None:
    with pytest.raises(BrokenXzError):
        unpacked_size(reader(noise + b"."), len(noise) + 1)


@pytest.mark.skipif(shutil.which("xz") is None, reason="the command xz is not installed")
def test_many_blocks_cost_only_the_end_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(bytes(range(256)) * 8_000)
    subprocess.run(["xz", "-0", "--threads=2", "--block-size=16384", tmp_path / "content"], check=True)
    packed = (tmp_path / "content.xz").read_bytes()
    asked: list[int] = []

    def read(start: int, length: int) -> bytes:
        asked.append(length)
        return reader(packed)(start, length)

    assert unpacked_size(read, len(packed)) == 256 * 8_000
    assert len(asked) == 2
    assert sum(asked) < 1_000
