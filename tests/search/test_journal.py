"""The journal of vectors: after any kill it returns exactly what was written."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.search.embedders import Vectors
from searchr1_async.search.passage_embedding import Journal, key_of

DIMENSION = 3
RECORD = 16 + 4 * DIMENSION + 4


def keys(count: int, start: int = 0) -> list[bytes]:
    return [key_of(f"p{number}", "text") for number in range(start, start + count)]


def vectors(count: int, start: int = 0) -> Vectors:
    numbers = np.arange(start * DIMENSION, (start + count) * DIMENSION).reshape(count, DIMENSION) / 7
    return numbers.astype(np.float32)


def as_lists(found: dict[bytes, Vectors]) -> dict[bytes, list[float]]:
    return {key: vector.tolist() for key, vector in found.items()}


def expected(count: int) -> dict[bytes, list[float]]:
    return dict(zip(keys(count), vectors(count).tolist(), strict=True))


@given(parts=st.lists(st.integers(1, 5), min_size=1, max_size=5), data=st.data())
def test_a_torn_end_is_cut_off_and_appended_to(parts: list[int], data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        folder, total = Path(name) / "journal", 0
        for part in parts:
            Journal(folder, "embedder", DIMENSION).append(7, keys(part, total), vectors(part, total))
            total += part
        (file,) = folder.iterdir()
        header = file.stat().st_size - total * RECORD
        left = data.draw(st.integers(0, file.stat().st_size), "bytes that were written")
        file.write_bytes(file.read_bytes()[:left])
        whole = max(0, left - header) // RECORD
        journal = Journal(folder, "embedder", DIMENSION)
        assert as_lists(journal.recall()) == expected(whole)
        journal.append(7, keys(total - whole, whole), vectors(total - whole, whole))
        assert as_lists(Journal(folder, "embedder", DIMENSION).recall()) == expected(total)


@given(st.integers(0, 6 * RECORD + 32 - 1), st.integers(1, 255))
def test_an_altered_byte_never_comes_back_as_a_vector(place: int, change: int) -> None:
    with TemporaryDirectory() as name:
        journal = Journal(Path(name), "embedder", DIMENSION)
        journal.append(0, keys(6), vectors(6))
        (file,) = Path(name).iterdir()
        content = bytearray(file.read_bytes())
        content[place] ^= change
        file.write_bytes(content)
        found = as_lists(journal.recall())
        assert found.items() <= expected(6).items()
        assert len(found) == max(0, place - 32) // RECORD * (place >= 32)


def test_each_window_is_forgotten_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "embedder", DIMENSION)
    assert journal.recall() == {}
    journal.append(0, keys(2), vectors(2))
    journal.append(1, keys(2, 2), vectors(2, 2))
    assert as_lists(journal.recall()) == expected(4)
    journal.forget(1)
    journal.forget(5)
    assert as_lists(journal.recall()) == expected(2)
    journal.clear()
    assert not (tmp_path / "journal").exists()
    assert journal.recall() == {}


@pytest.mark.parametrize(("embedder", "dimension"), [("other", DIMENSION), ("embedder", DIMENSION + 1)])
def test_vectors_of_another_embedder_are_thrown_away(tmp_path: Path, embedder: str, dimension: int) -> None:
    Journal(tmp_path, "embedder", DIMENSION).append(0, keys(2), vectors(2))
    assert Journal(tmp_path, embedder, dimension).recall() == {}
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_of_the_passage_and_its_text() -> None:
    assert len({key_of("a", "b"), key_of("a", "c"), key_of("c", "b"), key_of("a", "\ud800")}) == 4
