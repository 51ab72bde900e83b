"""Paths are made absolute where they come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from searchr1_async import ConfigurationError
from searchr1_async.boundary.paths import absolute_path, cache_folder


def test_a_later_chdir_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = absolute_path("runs/lr[1]")
    monkeypatch.chdir("/")
    assert path == tmp_path / "runs" / "lr[1]"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_path("~/run") == absolute_path(Path("~/run")) == tmp_path / "run"


def test_links_and_parents_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "runs")
    monkeypatch.chdir(tmp_path)
    assert absolute_path("link/../x").resolve() == tmp_path / "disk" / "x"


@pytest.mark.parametrize("given", [None, 3, b"runs", "", "  ", "a\0b", "~nobody-of-that-name/run"])
def test_what_is_no_path_is_refused_by_the_name_of_its_argument(given: object) -> None:
    with pytest.raises(ConfigurationError, match="out_dir"):
        absolute_path(given, "out_dir")  # pyright: ignore[reportArgumentType]


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigurationError, match="full path"):
        absolute_path("run")
    assert absolute_path("/run") == Path("/run")


def test_the_cache_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert cache_folder() == tmp_path / "caches" / "searchr1_async"
