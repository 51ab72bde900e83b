"""By which name an index says what embedder made its vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from searchr1_async.search.stores.vector_store import lasting_name


def test_a_folder_is_named_from_everywhere_and_a_model_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lasting_name("model") == lasting_name(Path("model")) == str(tmp_path / "model")
    assert lasting_name("intfloat/e5-base-v2") == "intfloat/e5-base-v2"
    assert lasting_name("gemini-embedding-001") == "gemini-embedding-001"
    assert lasting_name(None) is None
