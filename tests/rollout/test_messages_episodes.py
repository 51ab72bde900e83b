"""Episodes cross the channel unchanged, without data that the pool already has."""

from __future__ import annotations

import pickle
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.rollout.messages import Packer, Unpacker

QUESTION = Question("q", "Which?", ("yes",), metadata={"cannot be pickled": lambda: None})
PASSAGES = tuple(Passage(str(number), "title", "text " * 50, 0.5) for number in range(3))

tokens = st.lists(st.integers(0, 200_000), max_size=6).map(tuple)
found = st.lists(st.lists(st.sampled_from(PASSAGES), max_size=3).map(tuple), max_size=3).map(tuple)


@st.composite
def calls(draw: st.DrawFn, searches: dict[int, Any]) -> SearchCall | None:
    kind = draw(st.sampled_from(("none", "malformed", "searched", "of its own")))
    if kind == "none":
        return None
    if kind == "malformed":
        return SearchCall((), problem="an empty query")
    # Fresh tuples, as from a channel: equal but not identical.
    results = tuple(tuple(list(passages)) for passages in draw(found))
    if kind == "searched":
        searches[len(searches)] = results
    return SearchCall(("query",) * len(results), results, seconds=0.5)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[Episode], dict[int, Any]]:
    searches: dict[int, Any] = {}
    prompt = draw(tokens)
    episodes = []
    for _ in range(draw(st.integers(1, 4))):
        turns = [
            Turn(
                draw(tokens),
                tuple(draw(st.lists(st.floats(-9, 0), max_size=4))),
                "text",
                "content",
                draw(st.integers(0, 9)),
                draw(calls(searches)),
                draw(tokens),
                1.5,
                draw(st.booleans()),
            )
            for _ in range(draw(st.integers(0, 3)))
        ]
        episodes.append(
            Episode(
                QUESTION,
                prompt if draw(st.booleans()) else draw(tokens),
                tuple(turns),
                draw(st.sampled_from(StopReason)),
                draw(st.none() | st.just("answer")),
                error=draw(st.none() | st.just("StoreError: gone")),
                seconds=2.0,
                given=draw(calls(searches)),
            )
        )
    return episodes, searches


@given(groups())
@settings(max_examples=100, deadline=None)
def test_episodes_cross_as_they_are(group: tuple[list[Episode], dict[int, Any]]) -> None:
    episodes, searches = group
    packer, unpacker = Packer(7), Unpacker(QUESTION)
    for number, results in searches.items():
        packer.learn(number, results)
        unpacker.found[number] = tuple(tuple(list(passages)) for passages in results)
    for member, episode in enumerate(episodes):
        played = pickle.loads(pickle.dumps(packer.pack(member, episode)))
        assert (played.group, played.member) == (7, member)
        assert unpacker.unpack(played) == episode


def test_prompts_and_passages_are_sent_once_and_shared() -> None:
    packer, unpacker = Packer(0), Unpacker(QUESTION)
    prompt, here, there = tuple(range(3000)), (PASSAGES,), (tuple(list(PASSAGES)),)
    packer.learn(5, there)
    unpacker.found[5] = here
    turn = Turn((1, 2), (-0.1, -0.2), "x", call=SearchCall(("q",), there))
    episodes, sizes = [], []
    for member in range(8):
        data = pickle.dumps(packer.pack(member, Episode(QUESTION, tuple(prompt), (turn,), StopReason.ANSWER)))
        sizes.append(len(data))
        episodes.append(unpacker.unpack(pickle.loads(data)))
    assert sizes[0] > 6000
    assert max(sizes[1:]) < 600
    assert len({id(episode.prompt_tokens) for episode in episodes}) == 1
    assert all(episode.calls[0].results[0] is PASSAGES for episode in episodes)
    assert episodes[0].question is QUESTION
