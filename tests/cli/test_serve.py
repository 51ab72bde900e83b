from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.cli import parser_for
from searchr1_async.episodes.types import Passage
from tests.search.conftest import HashingEmbedder

pytestmark = pytest.mark.anyio

TOKEN = "a-word-between-friends"


def options(*arguments: str, **others: Any) -> argparse.Namespace:
    parsed = parser_for(["serve"]).parse_args(["serve", *arguments])
    vars(parsed).update(others)
    return parsed


async def run(*arguments: str, **others: Any) -> str:
    given = options(*arguments, **others)
    return await given.run(given)


async def test_it_serves_an_index_until_it_is_terminated(
    tmp_path: Path, free_tcp_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVING_TOKEN", TOKEN)
    corpus = [Passage("c", "Chile", "Santiago is its capital."), Passage("b", "Bhutan", "Thimphu is its capital.")]
    index = tmp_path / "index"
    await sr.Search.local(corpus, path=index, embedder=HashingEmbedder()).build()
    reported: list[str] = []

    async def serve() -> None:
        arguments = (str(index), "--port", str(free_tcp_port), "--token-from", "SERVING_TOKEN", "--results", "1")
        reported.append(await run(*arguments, embedder=HashingEmbedder()))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            async with await sr.Search.open(f"http://127.0.0.1:{free_tcp_port}", token=TOKEN, n_results=1) as search:
                ((found,),) = await search.search(["capital of Chile"])
                assert found.id == "c"
            os.kill(os.getpid(), signal.SIGTERM)
    assert reported == [(given := options("x")).stopped(given)]
    shown = capsys.readouterr().err
    assert f"serving at http://127.0.0.1:{free_tcp_port}" in shown
    assert TOKEN not in shown


async def test_an_unset_token_and_a_folder_without_an_index_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SERVING_TOKEN", raising=False)
    with pytest.raises(sr.errors.ConfigurationError, match="SERVING_TOKEN, which is not set"):
        await run(str(tmp_path), "--token-from", "SERVING_TOKEN")
    with pytest.raises(sr.errors.StoreError, match="holds no index"):
        await run(str(tmp_path))
