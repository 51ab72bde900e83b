"""The ``ask`` command on a run of the tiny world."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from searchr1_async.cli.main import main, parser_for
from tests import tiny_world
from tests.trained_run import SERVICE_KEY, TrainedRun, trained_run, with_hashed_words


@pytest.fixture(scope="module")
def trained() -> TrainedRun:
    return trained_run()


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_hashed_words(monkeypatch)
    monkeypatch.setenv(SERVICE_KEY, tiny_world.shared_service().api_key)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_prints_the_searches_the_passages_and_the_answer(
    trained: TrainedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    question = tiny_world.make_questions()[1][0]
    found, query = question.golden_answers[0], question.metadata["search_queries"][0]
    arguments = ["ask", str(trained.folder), question.question, "--service", tiny_world.served()["service"]]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    lines = [line.strip() for line in told.splitlines()]
    assert lines[0] == f"question: {question.question}"
    assert f"search: {query}" in lines
    assert any(line.endswith(f": {query} {found}") for line in lines)
    assert any(line.endswith(f"answer: {found}") for line in lines)

    # As JSON, with another corpus, and with the weights of another step.
    more = ["--json", "--step", "0", "--corpus", str(trained.corpus), "--results", "2", "--max-turns", "2"]
    assert main([*arguments, *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["question"], told["step"]) == (question.question, 0)
    assert told["checkpoint"].startswith("tinker://")
    assert [[len(found) for found in call["passages"]] for call in told["searches"]] in ([[2]], [])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--step", "best"], "RunFolderError: the run in .* has no best weights"),
        (["--max-tokens", "0"], "ConfigurationError: max_tokens is 0"),
        (["--chroma", "nowhere"], "ConfigurationError: --chroma 'nowhere': expected HOST:PORT"),
        (["--service", "http://127.0.0.1:9"], "ServiceUnavailableError: .*127.0.0.1:9"),
    ],
)
def test_what_cannot_be_asked_is_said(
    trained: TrainedRun, capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    url = tiny_world.served()["service"]
    assert main(["ask", str(trained.folder), "river of mirin?", "--service", url, *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(told, captured.err), captured.err


def test_a_folder_without_a_run_and_a_strange_step_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", str(tmp_path), "river of mirin?"]) == 1
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ask", str(tmp_path), "river of mirin?", "--step", "first"])
    assert "expected last, best, or a number of steps" in capsys.readouterr().err


def test_a_stop_says_that_nothing_is_lost() -> None:
    arguments = ["ask", "runs/a", "Who?"]
    options = parser_for(arguments).parse_args(arguments)
    assert "Nothing was written" in options.stopped(options)
