"""Bad input and bad services: a clear typed error, soon, before anything starts."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import searchr1_async as sr
from searchr1_async.config import LocalOptions
from searchr1_async.service.opening import check_service
from searchr1_async.testing import HashingEmbedder
from tests import tiny_world

pytestmark = pytest.mark.anyio


@pytest.fixture
def search(tmp_path: Path) -> sr.Search:
    return tiny_world.make_search(tmp_path / "index")


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A socket that accepts every connection and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    ended = threading.Event()
    accepted: list[socket.socket] = []

    def accept() -> None:
        while not ended.is_set():
            try:
                accepted.append(listener.accept()[0])
            except TimeoutError:
                continue

    thread = threading.Thread(target=accept)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    ended.set()
    thread.join()
    for connection in (listener, *accepted):
        connection.close()


@pytest.fixture
def refused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def start(search: sr.Search, out_dir: Path, questions: Any = None, **changes: Any) -> sr.Run:
    settings = tiny_world.SETTINGS | {"model": str(tiny_world.model_folder())} | changes
    return sr.train(
        questions or tiny_world.make_questions()[0],
        search,
        out_dir=out_dir,
        **tiny_world.given(sr.TrainConfig, settings, steps=1),
    )


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"format": "xml"}, sr.errors.ModelError, "unknown tool-call format 'xml'"),
    ({"group_size": 1}, sr.errors.ConfigurationError, "group_size"),
    ({"groups_per_batch": 0}, sr.errors.ConfigurationError, "groups_per_batch"),
    ({"minibatches": 13}, sr.errors.ConfigurationError, "minibatches"),
    ({"learning_rate": 0.0}, sr.errors.ConfigurationError, "learning_rate"),
    ({"learning_rate": float("nan")}, sr.errors.ConfigurationError, "learning_rate"),
    ({"gradient_clip": -1.0}, sr.errors.ConfigurationError, "gradient_clip"),
    ({"loss": "reinforce"}, sr.errors.ConfigurationError, "reinforce"),
    ({"epochs": 0}, sr.errors.ConfigurationError, "epochs"),
    ({"time_limit": 0.0}, sr.errors.ConfigurationError, "time_limit"),
    ({"evaluate_every": 0}, sr.errors.ConfigurationError, "evaluate_every"),
    ({"evaluate_every": 2}, sr.errors.ConfigurationError, "held_out"),
    ({"min_members": 9}, sr.errors.ConfigurationError, "no group would be trained on"),
    ({"refill_groups": 1, "drop_constant_groups": False}, sr.errors.ConfigurationError, "drop_constant_groups"),
    ({"max_staleness": 1, "synchronous": True}, sr.errors.ConfigurationError, "on-policy"),
    ({"workers": 0}, sr.errors.ConfigurationError, "workers"),
    ({"held_out_samples": 0}, sr.errors.ConfigurationError, "held_out_samples"),
    ({"max_turns": 0}, sr.errors.ConfigurationError, "max_turns"),
    ({"max_trajectory_tokens": 12}, sr.errors.ConfigurationError, "max_trajectory_tokens"),
    ({"temperature": -0.1}, sr.errors.ConfigurationError, "temperature"),
    ({"max_failed_fraction": 1.5}, sr.errors.ConfigurationError, "max_failed_fraction"),
    ({"checkpoint_every": 0}, sr.errors.ConfigurationError, "checkpoint_every"),
]


@pytest.mark.parametrize(("changes", "error", "named"), BAD_SETTINGS, ids=lambda value: str(value)[:30])
async def test_bad_settings_are_refused_by_the_call_itself(
    search: sr.Search, tmp_path: Path, changes: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        start(search, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LocalOptions(port=70000), "port"),
        (lambda: LocalOptions(threads=0), "threads"),
        (lambda: LocalOptions(start_timeout=0), "start_timeout"),
        (lambda: sr.WarmUp(steps=0), "steps"),
        (lambda: sr.WarmUp(learning_rate=-1), "learning_rate"),
    ],
)
async def test_bad_options_are_refused_on_creation(make: Callable[[], object], named: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=named):
        make()


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"golden_answers": ["a"]}, "no column 'question'"),
        ({"question": "Who?"}, "golden_answers"),
        ({"question": "Who?", "golden_answers": []}, "no golden answer"),
        ({"question": " ", "golden_answers": ["a"]}, "no text"),
    ],
)
async def test_bad_question_files_are_refused_naming_the_row(
    search: sr.Search, tmp_path: Path, row: dict[str, Any], named: str
) -> None:
    good = {"question": "What?", "golden_answers": ["that"]}
    file = write_rows(tmp_path / "questions.jsonl", good, row)
    for settings in ({"questions": file}, {"held_out": file}):
        with pytest.raises(sr.errors.QuestionsError, match=named) as caught:
            start(search, tmp_path / "run", **settings)
        assert "questions.jsonl" in str(caught.value)
    assert not (tmp_path / "run").exists()


async def test_invalid_questions_are_refused(search: sr.Search, tmp_path: Path) -> None:
    one = tiny_world.make_questions()[0][0]
    for questions, named in (
        ([{"question": "What?"}], "row 1 has no golden answer in"),
        ([one, one], "duplicate question id"),
    ):
        with pytest.raises(sr.errors.QuestionsError, match=named):
            start(search, tmp_path / "run", questions)
    with pytest.raises(sr.errors.QuestionsError, match="no questions"):
        sr.train((), search, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


async def test_bad_corpora_are_refused(tmp_path: Path) -> None:
    embedder = HashingEmbedder()
    with pytest.raises(sr.errors.CorpusError, match="no passages"):
        sr.Search.local([], embedder=embedder)
    with pytest.raises(sr.errors.CorpusError, match="no column 'text'"):
        sr.Search.local(write_rows(tmp_path / "corpus.jsonl", {"id": "1", "title": "One"}), embedder=embedder)


async def test_a_corpus_with_a_bad_later_row_is_refused_first(tmp_path: Path) -> None:
    rows = [{"id": "1", "title": "", "text": "good"}, {"id": "1", "title": "", "text": "the same id"}]
    corpus = write_rows(tmp_path / "corpus.jsonl", *rows)
    search = sr.Search.local(corpus, embedder=HashingEmbedder(), path=tmp_path / "index")
    with pytest.raises(sr.errors.CorpusError, match="the same id '1'"):
        await start(search, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "index").exists()


async def test_an_unknown_model_is_refused_first(search: sr.Search, tmp_path: Path) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match="no-such-model"):
        await start(search, tmp_path / "run", model=str(tmp_path / "no-such-model"))
    with pytest.raises(sr.errors.ModelError, match="no-such-model"):
        await sr.evaluate(
            tiny_world.make_questions()[1],
            search,
            **tiny_world.given(sr.EvalConfig, tiny_world.PLAYING, model="no-such-model"),
        )
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "index").exists()
    assert tiny_world.service_processes() == []


async def test_a_port_in_use_is_refused_first(search: sr.Search, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(sr.errors.PortInUseError, match=str(port)):
            await start(search, tmp_path / "run", local=LocalOptions(port=port))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "index").exists()


async def test_an_unknown_renderer_leaves_no_folder(search: sr.Search, tmp_path: Path) -> None:
    with pytest.raises(sr.errors.ModelError, match="no-such-renderer"):
        await start(search, tmp_path / "run", renderer="no-such-renderer")
    assert not (tmp_path / "run").exists()
    assert tiny_world.service_processes() == []


@pytest.mark.parametrize("kind", ["refused_url", "silent_url"])
@pytest.mark.parametrize("way", ["argument", "environment"])
async def test_a_silent_service_is_named_within_ten_seconds(
    search: sr.Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    kind: str,
    way: str,
) -> None:
    url = request.getfixturevalue(kind)
    monkeypatch.setenv("TINKER_API_KEY", "tml-secret-key")
    monkeypatch.setattr("searchr1_async.service.opening.CONNECT_DEADLINE", 1.0)
    changes: dict[str, Any] = {"service": url}
    if way == "environment":
        monkeypatch.setenv("TINKER_BASE_URL", url)
        changes = {}
    began = time.monotonic()
    with pytest.raises(sr.errors.ServiceUnavailableError) as caught:
        await start(search, tmp_path / "run", **changes)
    assert time.monotonic() - began < 5
    assert url in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "index").exists()


async def test_the_deadline_is_ten_seconds() -> None:
    from searchr1_async.service.opening import CONNECT_DEADLINE

    assert CONNECT_DEADLINE <= 10


async def test_a_server_that_is_not_tinker_is_named() -> None:
    import threading as threads
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"<html>not here</html>")

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threads.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            with pytest.raises(sr.errors.ServiceUnavailableError, match="not as a Tinker service"):
                await check_service(url, None, LocalOptions())
        finally:
            server.shutdown()
            thread.join()


async def test_an_impossible_folder_is_refused(search: sr.Search, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(sr.errors.RunFolderError, match="file"):
        await start(search, tmp_path / "file" / "run")


async def test_an_invalid_tokenizer_is_refused(
    search: sr.Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    settings = tiny_world.served_settings(tokenizer=str(tmp_path / "none"))
    with pytest.raises(sr.errors.ConfigurationError, match="tokenizer"):
        start(search, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
