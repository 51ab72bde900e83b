"""A path names one file: no character in it is a wildcard, and a folder is no table."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from searchr1_async.boundary.tables import read_parquet, scan_parquet, scan_rows


@pytest.mark.parametrize(("name", "other"), [("nq[1]", "nq1"), ("nq?", "nqx"), ("nq*", "nq-all"), ("nq[!a]", "nqb")])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_path_is_never_expanded(tmp_path: Path, name: str, other: str, is_folder: bool) -> None:
    def path(of: str) -> Path:
        return tmp_path / of / "rows.parquet" if is_folder else tmp_path / f"{of}.parquet"

    for number, each in enumerate((path(name), path(other))):
        each.parent.mkdir(exist_ok=True)
        pl.DataFrame({"x": [number], "y": [0]}).write_parquet(each)
    assert read_parquet(path(name), columns=["x"]).rows() == [(0,)]
    assert scan_parquet(path(name)).collect().rows() == [(0, 0)]
    rows = scan_rows([path(name), path(other)], pl.Schema({"x": pl.Int64, "y": pl.Int64, "z": pl.String}))
    assert rows.collect().rows() == [(0, 0, None), (1, 0, None)]


def test_what_is_not_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "nq1.parquet")
    with pytest.raises(FileNotFoundError):
        read_parquet(tmp_path / "nq[1].parquet")
    with pytest.raises(FileNotFoundError):
        scan_parquet(tmp_path / "nq[1].parquet").collect()


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "nq1.parquet")
    for read in (read_parquet, scan_parquet):
        with pytest.raises(IsADirectoryError, match="is a folder"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["~", "file:", "lr=3", "a%20b", "a#b"])
def test_a_relative_folder_is_what_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """polars takes the first for the user's home, the second for a URL, and may make a column of the third."""
    monkeypatch.chdir(tmp_path)
    path = Path(name) / "rows.parquet"
    (tmp_path / name).mkdir()
    content = pl.DataFrame({"x": [1]})
    with (tmp_path / path).open("wb") as file:
        content.write_parquet(file)
    assert read_parquet(path).equals(content)
    assert scan_parquet(path).collect().equals(content)
    assert scan_rows([path], content.schema).collect().equals(content)
