"""A run's weights are evaluated, rolled out and asked as trained; a caller's changes are applied and reported."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import searchr1_async as sr
from searchr1_async.cli import main
from searchr1_async.config import EpisodeLimits
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.plan import prompt_of
from searchr1_async.runs.rollouts import PlaySettings
from searchr1_async.runs.weights import RECIPE_EPISODES, EpisodeChoice, TrainedPlay, find_weights
from tests import tiny_world
from tests.trained_run import SERVICE_KEY, TrainedRun, trained_run, with_hashed_words

HELD_OUT = tiny_world.make_questions()[1]
TOKENS, TURNS = 11, 2  # of trained_run()


@pytest.fixture(scope="module")
def trained() -> TrainedRun:
    return trained_run()


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    with_hashed_words(monkeypatch)
    monkeypatch.setenv(SERVICE_KEY, tiny_world.shared_service().api_key)


def bare_search(trained: TrainedRun, **options: Any) -> sr.Search:
    """Over the run's corpus; it would show three passages, while the run was trained with one."""
    return sr.Search.local(trained.corpus, path=trained.corpus.with_name("index"), embedder="hashed words", **options)


def quiet() -> dict[str, Any]:
    return {"progress": False, "service": tiny_world.served()["service"]}


async def measure(trained: TrainedRun, search: sr.Search | None = None, **options: Any) -> sr.Report:
    systems = options.pop("systems", {"trained": trained.folder})
    return await sr.evaluate(HELD_OUT, search, systems=systems, **tiny_world.given(sr.EvalConfig, quiet(), options))


def is_as_trained(episode: sr.Episode, prompt: str) -> bool:
    shown = [len(passages) for call in episode.calls for passages in call.results]
    return (
        "search then answer" in prompt
        and len(episode.turns) <= TURNS
        and all(len(turn.sampled_tokens) <= TOKENS for turn in episode.turns)
        and set(shown) <= {1}
    )


def prompts(trained: TrainedRun, episodes: Any) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.folder / "tokenizer")
    return [tokenizer.decode(episode.prompt_tokens) for episode in episodes]


@pytest.mark.anyio
async def test_evaluate_rollout_and_ask_use_the_trained_settings(trained: TrainedRun, tmp_path: Path) -> None:
    search = bare_search(trained)
    systems = {"untrained": None, "trained": trained.folder}
    report = await measure(trained, search, systems=systems, out_dir=tmp_path / "e", temperature=0)
    assert report["trained"].exact_match > 0.7, "it has learned to"
    for label in systems:
        episodes = report[label].episodes
        assert all(map(is_as_trained, episodes, prompts(trained, episodes))), label
    for label in ("untrained", "trained"):
        assert f"{label} is evaluated with the training settings of the run in {trained.folder}." in report.notes()
    assert not any("is evaluated with other settings than in training" in note for note in report.notes())

    # Exactly the prompts and limits of training, and of an asked question.
    asked = await sr.ask(
        HELD_OUT[0].question, search, checkpoint=trained.folder, **tiny_world.given(sr.config.AskConfig, quiet())
    )
    groups = await sr.rollout(
        HELD_OUT, search, checkpoint=trained.folder, **tiny_world.given(sr.RolloutConfig, quiet(), group_size=1)
    )
    rolled = [group.episodes[0] for group in groups]
    assert asked.episode.prompt_tokens == report["trained"].episodes[0].prompt_tokens
    assert [each.prompt_tokens for each in rolled] == [each.prompt_tokens for each in report["trained"].episodes]
    assert all(map(is_as_trained, [asked.episode, *rolled], prompts(trained, [asked.episode, *rolled])))

    # Without a search the run's own is used, and its manifest gives the same again.
    for again in (
        await measure(trained, temperature=0, systems=systems),
        await sr.evaluate(tmp_path / "e", search, **tiny_world.given(sr.EvalConfig, quiet())),
    ):
        assert again.frame().equals(report.frame())
    assert (again.record("trained"), again.notes()) == (report.record("trained"), report.notes())


@pytest.mark.anyio
async def test_given_settings_override_and_are_reported(trained: TrainedRun) -> None:
    changed = {"max_tokens": 7, "max_turns": 1, "instructions": "answer the question"}
    report = await measure(trained, bare_search(trained, n_results=2), **changed)
    episodes = report["trained"].episodes
    assert max(len(turn.sampled_tokens) for episode in episodes for turn in episode.turns) <= 7
    assert {len(episode.turns) for episode in episodes} == {1}
    assert all("answer the question" in prompt for prompt in prompts(trained, episodes))
    (said,) = (note for note in report.notes() if "is evaluated with other settings than in training" in note)
    for difference in (
        "instructions 'answer the question' (trained with 'search then answer')",
        "max_turns 1 (trained with 2)",
        "max_tokens 7 (trained with 11)",
        "n_results 2 (trained with 1)",
    ):
        assert difference in said
    for same in ("max_trajectory_tokens", "format", "search"):
        assert f"{same} " not in said.replace("search then", "")

    events: list[Any] = []
    await sr.rollout(HELD_OUT[:1], bare_search(trained), checkpoint=trained.folder, on_event=events.append, **tiny_world.given(sr.RolloutConfig, quiet(), max_tokens=7, group_size=1))  # fmt: skip
    told = [event.text for event in events if type(event).__name__ == "Notice"]
    assert f"the weights of {trained.folder} are rolled out with max_tokens 7 (trained with 11)" in told


@pytest.mark.anyio
async def test_one_system_may_differ_and_another_corpus_is_reported(trained: TrainedRun, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(trained.corpus.read_text() + json.dumps({"id": "x", "title": "", "text": "one more"}) + "\n")
    search = sr.Search.local(other, path=tmp_path / "index", embedder="hashed words")
    systems = {"same": trained.folder, "wide": sr.System(trained.folder, n_results=3, limits=EpisodeLimits(2, 11, 200))}
    report = await measure(trained, search, systems=systems)
    shown = {
        label: {len(p) for episode in report[label].episodes for call in episode.calls for p in call.results}
        for label in systems
    }
    assert shown == {"same": {1}, "wide": {3}}
    for label, told in (
        ("same", ""),
        ("wide", "max_trajectory_tokens 200 (trained with 128), n_results 3 (trained with 1), "),
    ):
        (said,) = (note for note in report.notes() if note.startswith(f"{label} is evaluated with other settings"))
        assert f"training: {told}search '{str(other)[:40]}" in said


@pytest.mark.anyio
async def test_an_evaluation_that_did_not_follow_its_run_is_repeated_but_not_resumed(
    trained: TrainedRun, tmp_path: Path
) -> None:
    settings = {"max_tokens": 12, "max_turns": 2, "max_trajectory_tokens": 200, "format": "tags"}
    given = await measure(trained, bare_search(trained, n_results=3), out_dir=tmp_path / "e", **settings)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert given.record("trained").instructions == "search then answer"  # type: ignore[union-attr]
    play = PlaySettings(
        sr.rewards.RecipeReward(),
        sr.config.SamplingSettings(),
        EpisodeChoice(format="tags").completed_by(RECIPE_EPISODES),
    )
    # As an earlier version wrote it: its systems had the evaluation's prompt, not their run's.
    for system in manifest["systems"]:
        for name in ("n_results", "max_passage_words", "like", "differences", "unrecorded"):
            del system[name]
        system["instructions"] = None
        system["prompt"], system["prompt_sha256"] = prompt_of(play.episodes, "search")
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest))
    loaded = Manifest.load(tmp_path / "e")
    assert loaded is not None
    assert loaded.systems[0].like is None
    with pytest.raises(sr.errors.RunFolderError, match=r"a different evaluation \(systems differ\)"):
        await measure(trained, bare_search(trained, n_results=3), out_dir=tmp_path / "e", resume=True, **settings)
    again = await sr.evaluate(
        tmp_path / "e",
        bare_search(trained, n_results=3),
        out_dir=tmp_path / "again",
        **tiny_world.given(sr.EvalConfig, quiet()),
    )
    assert not any("search then answer" in prompt for prompt in prompts(trained, again["trained"].episodes))


def test_the_command_evaluates_a_run_as_trained(
    trained: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": q.id, "question": q.question, "golden_answers": list(q.golden_answers)} for q in HELD_OUT]
    suite = tmp_path / "world.jsonl"
    suite.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ["eval", suite, "--out-dir", tmp_path / "e", "--system", f"trained={trained.folder}", "--untrained"]
    (tmp_path / "eval.toml").write_text("temperature = 0.0")
    arguments += ["--config", tmp_path / "eval.toml", "--service", quiet()["service"]]
    assert main([*map(str, arguments)]) == 0, capsys.readouterr()
    assert f"trained is evaluated with the training settings of the run in {trained.folder}" in capsys.readouterr().out
    report = sr.open_report(tmp_path / "e")
    assert report["trained"].exact_match > 0.7
    assert all(map(is_as_trained, report["trained"].episodes, prompts(trained, report["trained"].episodes)))


@pytest.mark.anyio
async def test_conflicting_settings_are_refused_at_the_call(trained: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(
        sr.errors.ConfigurationError, match=r"max_trajectory_tokens \(128\) must be over max_tokens \(500\)"
    ):
        await measure(trained, bare_search(trained), max_tokens=500, out_dir=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_weights_without_a_run_use_the_recipes_defaults() -> None:
    weights = find_weights("tinker://run/sampler_weights/step-000001")
    assert weights.episodes(EpisodeChoice(max_turns=3), None).completed_by(RECIPE_EPISODES).limits == EpisodeLimits(
        max_turns=3
    )


def test_missing_settings_of_an_old_folder_default_and_are_named() -> None:
    old = TrainedPlay.of({"format": "tags", "limits": {"max_turns": 3, "max_tokens": 28}, "thinking": None}, None)
    assert asdict(old.episodes.limits) == asdict(EpisodeLimits(max_turns=3, max_tokens=28))
    assert set(old.unrecorded) == {
        *("renderer", "instructions", "max_trajectory_tokens", "max_queries_per_call", "malformed_calls"),
        *("n_results", "max_passage_words"),
    }
    measured = RECIPE_EPISODES.completed_by(EpisodeChoice(n_results=3))
    assert old.differences(measured) == {
        "format": ["tags", "hermes"],
        "max_turns": [3, 5],
        "max_tokens": [28, 1024],
    }
