from __future__ import annotations

from pathlib import Path

import pytest

from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.formats import Dialect, HermesDialect, TagsDialect
from searchr1_async.episodes.rendering import ChatMLRenderer
from searchr1_async.episodes.types import Question
from searchr1_async.errors import TooManyFailuresError, ungrouped
from searchr1_async.testing import BrokenSearch, DictSearch, make_tiny_tokenizer
from searchr1_async.training.initial_weights import Demonstration, demonstration_batches, play_demonstrations

pytestmark = pytest.mark.anyio

LIMITS = EpisodeLimits(max_turns=4, max_tokens=200, max_trajectory_tokens=4000)


@pytest.fixture(scope="module", params=[TagsDialect, HermesDialect])
def dialect(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dialect:
    tokenizer = make_tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))
    return request.param(ChatMLRenderer(tokenizer), tokenizer)


async def test_demonstrates_the_searches_and_the_answer_that_was_seen(dialect: Dialect) -> None:
    question = Question("1", "Where?", ("Cairo city", "Cairo"), metadata={"search_queries": ["one", "two"]})
    search = DictSearch(lambda query: f"{query}: it is Cairo.")
    (episode,) = await play_demonstrations([Demonstration.of(question)], dialect=dialect, search=search, limits=LIMITS)
    assert [call.queries for call in episode.calls] == [("one",), ("two",)]
    assert episode.answer == "Cairo"


async def test_never_teaches_an_answer_that_was_not_shown(dialect: Dialect) -> None:
    question = Question("1", "Where is it?", ("Cairo",))
    search = DictSearch(lambda query: "Nothing of that kind.")
    demonstration = Demonstration.of(question)
    assert demonstration.searches == ("Where is it?",)
    assert await play_demonstrations([demonstration], dialect=dialect, search=search, limits=LIMITS) == []


def test_batches_use_each_before_any_twice() -> None:
    batches = demonstration_batches([1, 2, 3, 4, 5], steps=4, batch_size=3, seed=0)  # type: ignore[list-item]
    flat = [item for batch in batches for item in batch]
    assert len(batches) == 4
    assert sorted(flat[:5]) == sorted(flat[5:10]) == [1, 2, 3, 4, 5]


async def test_a_search_that_fails_is_said_and_not_taken_for_a_poor_corpus(dialect: Dialect) -> None:
    demonstrations = [Demonstration.of(Question(str(number), "Where?", ("Cairo",))) for number in range(4)]
    with pytest.raises(TooManyFailuresError, match=r"1 of 4 episodes failed.*the store is gone"), ungrouped():
        await play_demonstrations(
            demonstrations, dialect=dialect, search=BrokenSearch(), limits=LIMITS, max_failed_fraction=0.2
        )
