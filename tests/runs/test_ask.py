"""One question to a model: asked as trained, with the run's search; errors name what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import searchr1_async as sr
from searchr1_async.events import Notice, PhaseStarted
from tests import tiny_world
from tests.trained_run import SERVICE_KEY, TrainedRun, trained_run, with_hashed_words

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def trained() -> TrainedRun:
    return trained_run()


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    with_hashed_words(monkeypatch)
    monkeypatch.setenv(SERVICE_KEY, tiny_world.shared_service().api_key)


def url() -> str:
    return tiny_world.served()["service"]


def held_out() -> sr.Question:
    return tiny_world.make_questions()[1][0]


def untrained(**changes: Any) -> dict[str, Any]:
    """How the base model is asked."""
    return tiny_world.PLAYING | tiny_world.served() | {"max_tokens": 4} | changes


async def test_a_run_is_asked_as_it_was_trained(trained: TrainedRun) -> None:
    question = held_out()
    answer = await sr.ask(question.question, checkpoint=trained.folder, service=url())
    assert answer.question == question.question
    assert answer.answer == question.golden_answers[0]
    (call,) = answer.searches
    assert call.queries == (question.metadata["search_queries"][0],)
    assert [passage.id for passage in answer.passages] == [question.id]
    point = sr.open_run(trained.folder)
    assert (answer.step, answer.checkpoint) == (1, point.result.checkpoint)
    assert [turn.policy_version for turn in answer.episode.turns] == [1, 1]

    # No golden answer, so nothing is scored.
    assert answer.episode.question.golden_answers == ()
    assert (answer.episode.reward, dict(answer.episode.reward_parts)) == (0.0, {})

    # Exactly the training prompt, built from the run's settings, renderer and tokenizer.
    played = point.episode(1)
    again = await point.ask(played.question.question, service=url())
    assert again.episode.prompt_tokens == played.prompt_tokens


async def test_an_answer_has_rich_display(trained: TrainedRun) -> None:
    question = held_out()
    answer = await sr.open_run(trained.folder).ask(question.question, service=url())
    found, query = question.golden_answers[0], question.metadata["search_queries"][0]
    assert repr(answer) == f"Answer({question.question!r}: {found!r}, searches=1)"
    shown = answer._repr_mimebundle_()
    assert shown["text/plain"] == str(answer)
    assert "<iframe" in shown["text/html"]
    for expected in (question.question, query, f"{query} {found}", "not scored", "it gave its answer"):
        assert expected in shown["text/plain"]
        assert expected in shown["text/html"], "as text, for viewers that show no frame"
    for foreign in ("golden answer:", "✗", "✓", "reward"):
        assert foreign not in shown["text/plain"]
    assert f"answer: {found}" in str(answer)


async def test_greedy_answers_are_deterministic_and_options_apply(trained: TrainedRun) -> None:
    question, run = held_out().question, sr.open_run(trained.folder)
    first, second = await run.ask(question, service=url()), await run.ask(question, service=url(), step=1)
    assert first.episode.tokens == second.episode.tokens

    one_turn = await run.ask(question, service=url(), config=sr.config.AskConfig(max_turns=1))
    assert (one_turn.answer, one_turn.episode.stop_reason) == (None, sr.StopReason.MAX_TURNS)
    assert one_turn.searches[0].results == ()
    assert one_turn.passages == ()
    assert "no answer" in str(one_turn)

    with pytest.raises(sr.errors.ConfigurationError, match="max_turns is 0"):
        await run.ask(question, service=url(), config=sr.config.AskConfig(max_turns=0))
    with pytest.raises(sr.errors.RunFolderError, match="no weights of step 7; kept: 0, 1"):
        await run.ask(question, service=url(), step=7)


async def test_asking_does_not_change_the_folder(trained: TrainedRun) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = (path for path in trained.folder.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    before = state()
    await sr.open_run(trained.folder).ask(held_out().question, service=url())
    assert state() == before


async def test_the_base_model_is_asked_with_given_settings(tmp_path: Path) -> None:
    search = tiny_world.make_search(tmp_path / "index")
    answer = await sr.ask("river of mirin?", search, **tiny_world.given(sr.config.AskConfig, untrained()))
    assert (answer.step, answer.checkpoint) == (0, None)
    assert len(answer.episode.turns[0].sampled_tokens) <= 4
    assert not search.is_open

    # Without a run there is no search.
    with pytest.raises(sr.errors.ConfigurationError, match=r"no search given: pass one, such as ask\(question, Search"):
        await sr.ask("river of mirin?", **tiny_world.given(sr.config.AskConfig, untrained()))


@pytest.mark.parametrize(
    ("question", "problem"), [("", "is no question"), (" \n", "is no question"), (None, "question is None")]
)
async def test_an_empty_question_is_refused(trained: TrainedRun, question: Any, problem: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=problem):
        await sr.ask(question, checkpoint=trained.folder, service=url())


async def test_a_run_without_a_described_search_says_what_to_pass(trained: TrainedRun, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained.folder, copy)
    text = (copy / "search.json").read_text()
    for content, error, told in (
        (None, sr.errors.ConfigurationError, "has no record of its search .* pass search="),
        (
            text.replace('"kind": "local"', '"kind": "other"'),
            sr.errors.ConfigurationError,
            "cannot be made .* pass search=",
        ),
        (
            text.replace('"n_results": 1', '"n_results": 2'),
            sr.errors.ConfigurationError,
            "gives other answers .* pass search=",
        ),
        (text.replace(str(trained.corpus), "/gone.jsonl"), sr.errors.CorpusError, "pass search="),
        ("{", sr.errors.RunFolderError, "cannot read .* Pass search="),
    ):
        (copy / "search.json").unlink(missing_ok=True)
        if content is not None:
            (copy / "search.json").write_text(content)
        with pytest.raises(error, match=told):
            await sr.ask("river of mirin?", checkpoint=copy, service=url())
    # A given search is used, whatever the folder holds.
    answer = await sr.ask("river of mirin?", trained.search(), checkpoint=copy, service=url())
    assert answer.answer is not None


async def test_weights_on_another_kind_of_service_are_refused_first(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained.folder, copy)
    monkeypatch.delenv(SERVICE_KEY)
    with pytest.raises(sr.errors.ConfigurationError, match="pass service=…, or set TINKER_API_KEY"):
        await sr.ask("river of mirin?", checkpoint=copy)
    (copy / "service").mkdir()
    monkeypatch.setenv(SERVICE_KEY, "tml-some-key")
    with pytest.raises(sr.errors.ConfigurationError, match="pass service=…, or unset TINKER_API_KEY") as caught:
        await sr.ask("river of mirin?", checkpoint=copy)
    assert "some-key" not in str(caught.value)


class BrokenSearch(sr.Search):
    """Opens, and fails every search."""

    is_fatal = False

    async def search(self, queries: Sequence[str], n_results: int | None = None, **options: Any) -> Any:
        raise sr.errors.StoreError("the store is gone", is_fatal=self.is_fatal)


class HopelessSearch(BrokenSearch):
    is_fatal = True


@pytest.mark.parametrize("kind", [BrokenSearch, HopelessSearch])
async def test_a_failed_search_raises(trained: TrainedRun, tmp_path: Path, kind: type[sr.Search]) -> None:
    search = tiny_world.make_search(tmp_path / "index", search_class=kind)
    told = "not answered: the store is gone. Fix that service and ask again"
    with pytest.raises(sr.errors.StoreError, match=told):
        await sr.ask(held_out().question, search, checkpoint=trained.folder, service=url())
    assert not search.is_open


async def test_an_unavailable_service_raises(trained: TrainedRun) -> None:
    with pytest.raises(sr.errors.ServiceUnavailableError, match=r"127\.0\.0\.1:9"):
        await sr.ask("river of mirin?", checkpoint=trained.folder, service="http://127.0.0.1:9")
    with pytest.raises(sr.errors.ServiceError, match="not answered: the Tinker service returned no sample within"):
        await sr.ask(
            "river of mirin?",
            checkpoint=trained.folder,
            service=url(),
            config=sr.config.AskConfig(sampling_deadline=1e-6),
        )


def embedded_run(folder: Path) -> tuple[sr.Run, sr.Search]:
    """A run with its own service and search."""
    search = tiny_world.make_search(folder / "index")
    settings = tiny_world.SETTINGS | {"model": str(tiny_world.model_folder()), "group_size": 2, "groups_per_batch": 2}
    settings |= {"minibatches": 1, "steps": 1, "reward": uneven}
    return sr.train(
        tiny_world.make_questions()[0], search, out_dir=folder / "run", **tiny_world.given(sr.TrainConfig, settings)
    ), search


async def test_the_embedded_service_opens_the_weights_in_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SERVICE_KEY)
    run, search = embedded_run(tmp_path)
    result = await run
    told: list[object] = []
    recorded = sr.open_run(tmp_path / "run")
    assert type(recorded) is sr.runs.RecordedRun
    local = sr.config.LocalOptions(threads=1, dtype="float32", device="cpu", memory_gb=2.0)
    answer = await recorded.ask(
        "river of mirin?", search, on_event=told.append, config=sr.config.AskConfig(local=local)
    )
    assert (answer.step, answer.checkpoint) == (1, result.checkpoint)
    assert any(isinstance(event, Notice) and "starting the embedded service" in event.text for event in told)
    assert not any(isinstance(event, PhaseStarted) for event in told)
    assert tiny_world.service_processes() == []
    assert "Memory: 1,907 MB" in (tmp_path / "run" / "service" / "service.log").read_text(), "2.0 GB, as asked"
    with pytest.raises(sr.errors.ConfigurationError, match=r"cannot describe its search .* pass search="):
        await recorded.ask("river of mirin?")  # its passages were only in memory


@pytest.mark.slow
async def test_asking_a_finished_run_restarts_its_embedded_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handle still has its passages and service choice; from its folder the answer is the same."""
    monkeypatch.delenv(SERVICE_KEY)
    run, search = embedded_run(tmp_path)
    await run
    answer = await run.ask("river of mirin?")
    local = sr.config.LocalOptions(threads=1, dtype="float32", device="cpu")
    again = await sr.open_run(tmp_path / "run").ask("river of mirin?", search, config=sr.config.AskConfig(local=local))
    assert again.episode.tokens == answer.episode.tokens
    assert tiny_world.service_processes() == []


async def uneven(episode: sr.Episode) -> float:
    return sum(episode.turns[0].logprobs)


async def test_questions_without_golden_answers_are_only_for_asking(tmp_path: Path) -> None:
    question = sr.Question("q", "river of mirin?")
    search = tiny_world.make_search(tmp_path / "index")
    good = tiny_world.make_questions()[0]
    for start in (
        lambda: sr.train([question], search, out_dir=tmp_path / "run"),
        lambda: sr.train(good, search, out_dir=tmp_path / "run", held_out=[question]),
        lambda: sr.Demonstration(question, ("river mirin",)),
        lambda: sr.evaluation.load_suite([question], name="unknown"),
    ):
        with pytest.raises(sr.errors.QuestionsError, match="no golden answer"):
            start()
    with pytest.raises(sr.errors.QuestionsError, match="no golden answer"):
        await sr.rollout([question], search, **tiny_world.given(sr.RolloutConfig, untrained()))
    assert not (tmp_path / "run").exists()
