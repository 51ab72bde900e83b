"""Verdicts on disk: judges are never mixed, even after kills, and missing verdicts are requested again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from searchr1_async.episodes.types import Turn
from searchr1_async.errors import ServiceError
from searchr1_async.evaluation import judge as judging
from searchr1_async.evaluation.episode_store import OLD_VERDICTS_NAME, EpisodeStore
from searchr1_async.evaluation.judge import (
    FoundJudge,
    Judge,
    judge_samples,
    rename_old_verdicts,
    verdicts_name,
)
from searchr1_async.events import Event, PhaseAdvanced
from searchr1_async.runs.weights import Weights
from searchr1_async.service.connection import Service
from searchr1_async.testing import ScriptedPolicy, make_tiny_tokenizer
from tests.evaluation.reports import rows_of_episodes
from tests.watch.builders import episode, question

ONE, OTHER = Judge("one").describe(), Judge("other").describe()


def test_another_judge_begins_anew_and_the_first_finds_its_own_again(tmp_path: Path) -> None:
    def session(judge: dict[str, Any] | None) -> EpisodeStore:
        store = EpisodeStore(tmp_path, verdicts_name(judge))
        store.load()
        return store

    EpisodeStore(tmp_path).write(rows_of_episodes("a", [episode()]))
    session(ONE).write_judgements([("a", 0, 0, 1.0)])
    assert session(OTHER).unjudged().height == 1
    session(OTHER).write_judgements([("a", 0, 0, 0.0)])
    found = [session(judge).scores()["judged"].to_list() for judge in (ONE, OTHER, None)]
    assert found == [[1.0], [0.0], [None]]


def test_verdicts_of_an_older_version_are_those_of_the_judge_that_gave_them(tmp_path: Path) -> None:
    EpisodeStore(tmp_path).write(rows_of_episodes("a", [episode()]))
    EpisodeStore(tmp_path, OLD_VERDICTS_NAME).write_judgements([("a", 0, 0, 1.0)])
    for rename in (False, True):
        if rename:
            rename_old_verdicts(tmp_path, ONE)
            assert not (tmp_path / OLD_VERDICTS_NAME).exists()
        store = EpisodeStore(tmp_path, verdicts_name(ONE))
        store.load()
        assert store.scores()["judged"].to_list() == [1.0]
    store = EpisodeStore(tmp_path, verdicts_name(OTHER))
    store.load()
    assert store.unjudged().height == 1


def test_a_judge_is_the_same_whatever_its_patience() -> None:
    patient = Judge("one", deadline=7, at_once=3).describe()
    assert verdicts_name(patient) == verdicts_name(ONE)
    assert len({verdicts_name(each) for each in (ONE, OTHER, Judge("one", max_tokens=9).describe())}) == 3


ANSWERS = tuple(f"answer {number}" for number in range(10))


@dataclass
class Judging:
    """A new session that judges missing samples in a folder."""

    folder: Path
    tokenizer: Any
    asked: list[str] = field(default_factory=list)
    """Judged answers of all sessions."""
    before: Callable[[str], None] | None = None
    """Called with an answer before its verdict; raises service faults."""
    most: int | None = None
    """Number of verdicts before the service stops answering."""
    given: int = 0
    judged: int = 0
    on_judged: Callable[[int], None] | None = None

    async def open(self, found: FoundJudge, service: Service) -> tuple[Any, Any]:
        judging_, tokens = self, self.tokenizer.encode("no<|im_end|>", add_special_tokens=False)

        class Policy(ScriptedPolicy):
            async def sample_many(self, prompt_tokens: Sequence[int], count: int, **asked: Any) -> list[Turn]:
                text = judging_.tokenizer.decode(prompt_tokens)
                answer = text.rpartition('Candidate answer: "')[2].partition('"')[0]
                judging_.asked.append(answer)
                if judging_.before is not None:
                    judging_.before(answer)
                if judging_.given == judging_.most:
                    await anyio.sleep_forever()
                judging_.given += 1
                return await super().sample_many(prompt_tokens, count, **asked)

        return Policy(lambda prompt: tokens), self.tokenizer

    async def __call__(self) -> EpisodeStore:
        store = EpisodeStore(self.folder, "judgements.parquet")
        store.load()

        def emit(event: Event) -> None:
            if isinstance(event, PhaseAdvanced):
                self.judged = int(event.done)
                if self.on_judged is not None:
                    self.on_judged(self.judged)

        systems = ["a"]
        found = FoundJudge(Judge(at_once=2), "m", Weights())
        await judge_samples(found, store, systems, cast(Service, None), emit)
        return store


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judging:
    """Ten distinct finished answers and a judge that rejects all."""
    played = [replace(episode(question(f"q{place}")), answer=answer) for place, answer in enumerate(ANSWERS)]
    EpisodeStore(tmp_path / "e").write(rows_of_episodes("a", played))
    session = Judging(tmp_path / "e", make_tiny_tokenizer(tmp_path / "tokenizer"))
    monkeypatch.setattr(judging, "open_judge", session.open)
    return session


def verdicts(folder: Path) -> dict[str, float]:
    """Verdicts on disk, by answer."""
    store = EpisodeStore(folder, "judgements.parquet")
    store.load()
    return {
        answer: verdict for answer, verdict in store.scores().select("answer", "judged").rows() if verdict is not None
    }


@pytest.mark.anyio
async def test_a_verdict_that_the_service_failed_is_asked_for_again_at_the_next_session(judged: Judging) -> None:
    def fail(answer: str) -> None:
        if answer in ANSWERS[3:5]:
            raise ServiceError("it is gone")

    judged.before = fail
    await judged()
    assert verdicts(judged.folder) == dict.fromkeys((*ANSWERS[:3], *ANSWERS[5:]), 0.0)
    assert sorted(judged.asked) == sorted(ANSWERS)
    judged.before = None
    judged.asked.clear()
    store = await judged()
    assert sorted(judged.asked) == list(ANSWERS[3:5]), "those that have their verdict are not asked about again"
    assert verdicts(judged.folder) == dict.fromkeys(ANSWERS, 0.0)
    assert store.unjudged().is_empty()
    judged.asked.clear()
    await judged()
    assert judged.asked == []


@pytest.mark.anyio
async def test_verdicts_outlive_a_cancellation_in_the_middle(judged: Judging) -> None:
    """Writes are coalesced for a second: pending verdicts must still be written."""
    judged.most = 6
    with anyio.fail_after(20), anyio.CancelScope() as scope:
        judged.on_judged = lambda done: scope.cancel() if done == judged.most else None
        await judged()
    assert scope.cancelled_caught
    kept = verdicts(judged.folder)
    assert kept == dict.fromkeys(ANSWERS[:6], 0.0)
    judged.most = judged.on_judged = None
    judged.asked.clear()
    await judged()
    assert sorted(judged.asked) == sorted(set(ANSWERS) - set(kept))
    assert verdicts(judged.folder) == dict.fromkeys(ANSWERS, 0.0)
