"""The ``eval`` command on the tiny world."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from searchr1_async.cli import main, model_commands, parser_for
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.report import open_report
from searchr1_async.search import retrievers
from searchr1_async.testing import HashingEmbedder
from tests import tiny_world
from tests.evaluation.reports import figures


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a corpus and two suites; every embedder name maps to the tiny world's."""
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(retrievers, "make_embedder", lambda embedder: HashingEmbedder())
    facts = tiny_world.make_facts().items()
    passages = [
        {"id": f"{kind}-{place}", "title": "", "text": f"{kind} {place} {thing}"} for (kind, place), thing in facts
    ]
    write(tmp_path / "corpus.jsonl", passages)
    train, held_out = tiny_world.make_questions()
    for name, questions in (("seen", train[:4]), ("new", held_out[:3])):
        rows = [{"id": q.id, "question": q.question, "golden_answers": list(q.golden_answers)} for q in questions]
        write(tmp_path / "suites" / f"{name}.jsonl", rows)
    return tmp_path


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def arguments(world: Path, *more: str) -> list[str]:
    served, config = tiny_world.served(), world / "eval.toml"
    config.write_text('format = "tags"\nmax_tokens = 4\nmax_turns = 2\nsamples = 9\n')
    return [
        *("eval", str(world / "suites"), "--out-dir", str(world / "e")),
        *("--service", served["service"], "--model", served["model"], "--search", str(world / "corpus.jsonl")),
        *("--config", str(config), "--limit", "2", "--samples", "2", *more),
    ]


def test_a_folder_of_suites_is_evaluated_reported_and_repeated(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(world, "--baselines", "direct")) == 0
    reported = capsys.readouterr().out
    assert f"report with its episodes: {world / 'e' / 'report.html'}" in reported
    report = open_report(world / "e")
    assert list(report) == ["untrained", "direct"]
    assert sorted(report.suites) == ["new", "seen"]
    assert [own.scores.height for own in report.values()] == [8, 8]
    assert report["untrained"].failed == 0
    assert (world / "e" / "report.html").stat().st_size > 5_000
    for note in report.notes():
        assert note in reported

    # The folder alone repeats it: the search is built from the manifest.
    again = ["eval", str(world / "e"), "--out-dir", str(world / "again"), "--service", tiny_world.served()["service"]]
    assert main(again) == 0
    assert figures(open_report(world / "again")) == figures(report)

    # Overriding arguments and a different search are refused.
    again[3] = str(world / "other")
    write(world / "other.jsonl", [{"id": "1", "title": "", "text": "another corpus"}])
    corpus = str(world / "corpus.jsonl")
    for more, reported in (
        (("--samples", "3", "--judge"), "repeated with its original settings: omit samples, judge, or"),
        (("--untrained", "--limit", "1"), "omit limit, systems, or"),
        (("--search", str(world / "other.jsonl")), "the search gives other answers than that of the manifest"),
    ):
        capsys.readouterr()
        assert main([*again, *more]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("ConfigurationError: "), errors
        assert reported in errors
        assert not (world / "other").exists()
    assert main([*again, "--search", corpus]) == 0, "the same corpus may be named"


@pytest.mark.parametrize(
    ("more", "reported"),
    [
        (("--system", "nameless"), "ConfigurationError: --system 'nameless': expected LABEL=WEIGHTS"),
        (("--search", "somewhere"), "CorpusError: "),
        (("--system", "x=runs/nowhere"), "RunFolderError: "),
        (("--samples", "0"), "ConfigurationError: samples is 0 (int): it should be greater than or equal to 1"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(
    world: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], reported: str
) -> None:
    assert main(arguments(world, *more)) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(reported)
    assert len(errors.splitlines()) == 1
    assert not (world / "e").exists()


def test_systems_are_named_by_their_labels() -> None:
    def systems(*more: str) -> object:
        arguments = ["eval", "nq", "--out-dir", "e", *more]
        return model_commands._systems(parser_for(arguments).parse_args(arguments))

    assert systems() is None
    assert systems("--system", "a=runs/a", "--system", "b=tinker://x=y") == {"a": "runs/a", "b": "tinker://x=y"}
    assert systems("--system", "a=runs/a", "--untrained") == {"untrained": None, "a": "runs/a"}
    with pytest.raises(ConfigurationError, match="two systems are called 'a'"):
        systems("--system", "a=runs/a", "--system", "a=runs/b")
