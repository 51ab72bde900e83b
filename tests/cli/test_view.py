from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from searchr1_async.cli import parser_for
from searchr1_async.episodes.types import GroupOutcome
from searchr1_async.errors import RunFolderError
from searchr1_async.records.run_records import RunRecords
from tests.watch.builders import group
from tests.watch.pages import data_of

pytestmark = pytest.mark.anyio


def options(*arguments: str) -> argparse.Namespace:
    return parser_for(["view"]).parse_args(["view", *arguments])


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    for step in (1, 2):
        RunRecords(tmp_path / "run").write_step(step, [GroupOutcome(0, group())], {})
    return tmp_path / "run"


async def test_it_writes_the_page_and_says_where(run_folder: Path) -> None:
    given = options(str(run_folder))
    assert str(run_folder / "view.html") in await given.run(given)
    assert (run_folder / "view.html").stat().st_size > 10_000
    assert "same command" in given.stopped(given)


async def test_the_page_may_be_elsewhere(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    given = options(str(run_folder), "--out", str(out))
    await given.run(given)
    index = data_of(out.read_text(encoding="utf-8"))["index"]
    assert {row["source"] for row in index["rows"]} == {"step 1", "step 2"}


async def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    given = options(str(tmp_path / "nothing"))
    with pytest.raises(RunFolderError, match="holds no run"):
        await given.run(given)
