"""The ``ask`` command on a run of the tiny world."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from searchr1_async.cli import main, parser_for
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
    reported = capsys.readouterr().out
    lines = [line.strip() for line in reported.splitlines()]
    assert lines[0] == f"question: {question.question}"
    assert any(line.startswith(f"search: {query} (1 passage") for line in lines)
    assert any(line.endswith(f": {query} {found}") for line in lines)
    assert any(line.endswith(f"answer: {found}") for line in lines)

    assert main([*arguments, "--step", "0"]) == 0
    assert f"question: {question.question}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reported"),
    [
        (["--step", "best"], "RunFolderError: the run in .* has no best weights"),
        (["--threads", "0"], "ConfigurationError: threads is 0"),
        (["--service", "http://127.0.0.1:9"], "ServiceUnavailableError: .*127.0.0.1:9"),
    ],
)
def test_a_question_that_cannot_be_asked_is_an_error(
    trained: TrainedRun, capsys: pytest.CaptureFixture[str], more: list[str], reported: str
) -> None:
    url = tiny_world.served()["service"]
    assert main(["ask", str(trained.folder), "river of mirin?", "--service", url, *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(reported, captured.err), captured.err


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
