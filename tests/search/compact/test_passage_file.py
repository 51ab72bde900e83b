"""Passages on disk: any text comes back, a kill leaves what was kept, a broken line is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.compact.files import OFFSETS_NAME, PASSAGES_NAME, PassageFile, RowWriter

# Hypothesis calls the function again and again in one folder: each call writes from row 0, which cuts off what was there.
in_one_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(), max_size=30)
passages = st.builds(Passage, texts, texts, texts)


def write(folder: Path, *parts: list[Passage], rows: int = 0) -> None:
    writer = RowWriter(folder, 2, rows)
    for part in parts:
        writer.append(part, np.ones((len(part), 2), np.float32))
    writer.close()


def read(folder: Path, rows: int) -> list[Passage]:
    file = PassageFile(folder, rows)
    try:
        return [file.read(row) for row in range(rows)]
    finally:
        file.close()


def as_kept(passage: Passage) -> Passage:
    """Half of a pair of surrogates, which is no character, becomes a question mark."""
    id_, title, text = (each.encode("utf-8", "replace").decode() for each in (passage.id, passage.title, passage.text))
    return Passage(id_, title, text)


@in_one_folder
@given(parts=st.lists(st.lists(passages, max_size=4), min_size=1, max_size=4))
def test_any_text_comes_back(tmp_path: Path, parts: list[list[Passage]]) -> None:
    written = [passage for part in parts for passage in part]
    write(tmp_path, *parts)
    assert read(tmp_path, len(written)) == [as_kept(passage) for passage in written]
    lines = (tmp_path / PASSAGES_NAME).read_bytes()
    assert lines.count(b"\n") == len(written), "one line a passage, whatever is in it"


@in_one_folder
@given(before=st.lists(passages, max_size=5), lost=st.lists(passages, max_size=5), after=st.lists(passages, max_size=5))
def test_what_was_not_kept_is_cut_off(
    tmp_path: Path, before: list[Passage], lost: list[Passage], after: list[Passage]
) -> None:
    write(tmp_path, before, lost)
    # Half a line and half an offset, as a kill leaves them.
    for name in (PASSAGES_NAME, OFFSETS_NAME):
        with (tmp_path / name).open("ab") as file:
            file.write(b'["x')
    write(tmp_path, after, rows=len(before))
    assert read(tmp_path, len(before) + len(after)) == [as_kept(passage) for passage in before + after]
    resumed = [(tmp_path / name).read_bytes() for name in (PASSAGES_NAME, OFFSETS_NAME)]
    write(tmp_path, before + after)
    assert resumed == [(tmp_path / name).read_bytes() for name in (PASSAGES_NAME, OFFSETS_NAME)]


def test_a_megabyte_of_text_and_control_characters(tmp_path: Path) -> None:
    long = 'é\n\0\u2028"\\\ud800' + "x" * (1 << 20)
    write(tmp_path, [Passage("", "", ""), Passage("1", "\r\n", long), Passage("2", "t", "after")])
    found = read(tmp_path, 3)
    assert found[1].text == long.replace("\ud800", "?")
    assert found[2] == Passage("2", "t", "after")


def test_a_passage_is_given_its_similarity(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path, 1, 0)
    writer.append([Passage("1", "t", "x", 0.5)], np.ones((1, 1), np.float32))
    writer.sync()
    file = PassageFile(tmp_path, 1)
    assert file.read(0, 0.25) == Passage("1", "t", "x", 0.25)
    file.close()
    writer.close()


@pytest.mark.parametrize("name", [PASSAGES_NAME, OFFSETS_NAME])
def test_files_shorter_than_what_was_kept_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, [Passage(str(row), "", "text") for row in range(5)])
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(StoreError, match=f"{name} is shorter than the recorded progress"):
        RowWriter(tmp_path, 2, 5)
    assert (tmp_path / name).read_bytes() == content[:-1], "nothing was changed"


@pytest.mark.parametrize("line", [b'["3","","text]\n', b'["3","","te"] \x80', b'{"3":7,"text":1}\n'])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    write(tmp_path, [Passage(str(row), "", "text") for row in range(5)])
    content = (tmp_path / PASSAGES_NAME).read_bytes()
    size = len(content) // 5
    line = line.ljust(size)[:size]
    (tmp_path / PASSAGES_NAME).write_bytes(content[: 3 * size] + line + content[4 * size :])
    file = PassageFile(tmp_path, 5)
    assert file.read(2).id == "2"
    with pytest.raises(StoreError, match=r"passages\.jsonl is corrupt at row 3: copy the index again"):
        file.read(3)
    assert file.read(4).id == "4"
    file.close()
