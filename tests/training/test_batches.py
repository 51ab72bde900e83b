from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.episodes.types import Episode, Group, Question, StopReason, Turn
from searchr1_async.training.batches import MinibatchGatherer, example_tokens


def sized(tokens: int, name: str = "q") -> Group:
    """A group with one episode of this many tokens, one of them sampled."""
    question = Question(name, "?", ("a",))
    turn = Turn((1,), (-1.0,), "x")
    return Group(question, (Episode(question, (0,) * (tokens - 1), (turn,), StopReason.ANSWER),))


def gatherer_of(
    groups: int, minibatches: int, *, optimizer_steps: int = 1, mean_tokens: float | None = None
) -> MinibatchGatherer:
    learning: Any = SimpleNamespace(groups_per_batch=groups, minibatches=minibatches, optimizer_steps=optimizer_steps)
    return MinibatchGatherer(learning, mean_tokens)


def gather(gatherer: MinibatchGatherer, groups: list[Group]) -> list[list[Group]]:
    """All minibatches of a one-part batch with a trainer that is never idle."""
    return [sent for sent in [*map(gatherer.add, groups), gatherer.end_part()] if sent]


@given(
    sizes=st.lists(st.integers(2, 400), min_size=1, max_size=60),
    minibatches=st.integers(1, 12),
    steps=st.integers(1, 4),
    prior=st.none() | st.floats(1, 500),
    idle=st.lists(st.booleans(), min_size=60, max_size=60),
    dropped=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_every_group_goes_out_once_in_order_and_in_its_part(
    sizes: list[int], minibatches: int, steps: int, prior: float | None, idle: list[bool], dropped: list[bool]
) -> None:
    gatherer = gatherer_of(len(sizes), minibatches, optimizer_steps=steps, mean_tokens=prior)
    added: list[Group] = []
    out: list[Group] = []
    part = 0
    for place, size in enumerate(sizes):
        while part < steps - 1 and place >= (part + 1) * len(sizes) / steps:
            out += gatherer.end_part()
            assert out == added
            part += 1
        if not dropped[place]:
            added.append(sized(size, str(place)))
            out += gatherer.add(added[-1])
        if idle[place]:
            out += gatherer.trainer_is_idle()
    assert out + gatherer.end_part() == added
    assert gatherer.end_part() == []


@given(groups=st.integers(1, 60), minibatches=st.integers(1, 20))
def test_groups_alike_are_cut_evenly(groups: int, minibatches: int) -> None:
    sizes = list(map(len, gather(gatherer_of(groups, minibatches), [sized(50)] * groups)))
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == min(groups, minibatches)


@given(st.lists(st.integers(2, 400), min_size=8, max_size=60).map(sorted), st.integers(2, 8))
def test_minibatches_of_unlike_groups_are_alike_in_tokens(sizes: list[int], minibatches: int) -> None:
    """Where short groups finish first and their mean is known: each is near its share.

    A cut is at most one group off, and the minibatches that are left share that error: the last one gets a half of the one before
    it, a third of the one before that, and so on.
    """
    gatherer = gatherer_of(len(sizes), minibatches, mean_tokens=sum(sizes) / len(sizes))
    out = gather(gatherer, [sized(size) for size in sizes])
    share = sum(sizes) / minibatches
    off = max(sizes) * sum(1 / left for left in range(1, minibatches))
    if off <= share:
        assert len(out) == minibatches
    assert all(abs(sum(map(example_tokens, one)) - share) <= off + 1e-6 for one in out)


@given(st.integers(0, 10_000))
def test_streamed_minibatches_are_alike_though_long_groups_finish_last(seed: int) -> None:
    """For 64 long-tailed groups in order of length, knowing the last batch's mean: within a third."""
    chance = random.Random(seed)
    sizes = sorted(int(200 * chance.lognormvariate(0, 0.6)) + 2 for _ in range(64))
    gatherer = gatherer_of(64, 4, mean_tokens=sum(sizes) / 64)
    tokens = [sum(map(example_tokens, one)) for one in gather(gatherer, [sized(size) for size in sizes])]
    share = sum(sizes) / 4
    assert len(tokens) == 4
    assert max(abs(size - share) for size in tokens) <= max(share / 3, max(sizes))


def test_an_idle_trainer_gets_a_quarter_of_a_minibatch_and_a_busy_one_a_full_one() -> None:
    gatherer = gatherer_of(32, 4, mean_tokens=100)
    assert gatherer.add(sized(100)) == []
    assert gatherer.trainer_is_idle() == []
    assert gatherer.add(sized(100)) == []
    assert len(gatherer.trainer_is_idle()) == 2
    # 3,000 of 3,200 tokens are left: still four, slightly smaller.
    assert list(map(len, gather(gatherer, [sized(100)] * 30))) == [8, 7, 8, 7]


def test_dropped_groups_leave_no_hole() -> None:
    # Three of eight were dropped: the batch ends without them.
    assert list(map(len, gather(gatherer_of(8, 2, mean_tokens=10), [sized(10)] * 5))) == [4, 1]


def test_a_batch_with_nothing_to_learn_from_sends_nothing_and_passes_its_expectation_on() -> None:
    gatherer = gatherer_of(8, 2, optimizer_steps=2, mean_tokens=10)
    assert gatherer.trainer_is_idle() == gatherer.end_part() == gatherer.end_part() == []
    assert gatherer.mean_tokens == 10
    assert gatherer_of(8, 2).mean_tokens is None


def test_the_mean_is_of_all_parts_and_counts_dropped_groups_as_nothing() -> None:
    gatherer = gatherer_of(4, 1, optimizer_steps=2, mean_tokens=7)
    gatherer.add(sized(10))
    gatherer.end_part()
    gatherer.add(sized(20))
    assert gatherer.mean_tokens == 30 / 4


def test_only_examples_count_as_tokens() -> None:
    question = Question("q", "?", ("a",))
    turns = (Turn((1, 2), (-1.0, -1.0), "x", appended_tokens=(3,)), Turn((4,), (-1.0,), "y"))
    played = Episode(question, (7, 7, 7), turns, StopReason.ANSWER)
    did_not_fit = Episode(question, (7,) * 99, (), StopReason.MAX_TRAJECTORY_TOKENS)
    assert example_tokens(Group(question, (played, did_not_fit), failed=(played,))) == len(played.tokens) == 7
