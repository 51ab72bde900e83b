from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.episodes.types import Episode, Group, Question, StopReason, Turn
from searchr1_async.training.batches import Minibatch, MinibatchGatherer, example_tokens


def sized(tokens: int, name: str = "q") -> Group:
    """A group with one episode of this many tokens, one of them sampled."""
    question = Question(name, "?", ("a",))
    turn = Turn((1,), (-1.0,), "x")
    return Group(question, (Episode(question, (0,) * (tokens - 1), (turn,), StopReason.ANSWER),))


def gather(gatherer: MinibatchGatherer, groups: list[Group]) -> list[Minibatch]:
    """All minibatches of a one-part batch with a trainer that is never idle."""
    return [minibatch for one in groups for minibatch in gatherer.add(one)] + gatherer.end_batch()


@given(
    sizes=st.lists(st.integers(2, 400), min_size=1, max_size=60),
    minibatches=st.integers(1, 12),
    steps=st.integers(1, 4),
    synchronous=st.booleans(),
    prior=st.none() | st.floats(1, 500),
    idle=st.lists(st.booleans(), min_size=60, max_size=60),
    dropped=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_every_group_goes_out_once_in_order_and_in_its_part(
    sizes: list[int],
    minibatches: int,
    steps: int,
    synchronous: bool,
    prior: float | None,
    idle: list[bool],
    dropped: list[bool],
) -> None:
    gatherer = MinibatchGatherer(
        len(sizes), minibatches, optimizer_steps=steps, synchronous=synchronous, mean_tokens=prior
    )
    added: list[list[Group]] = [[] for _ in range(steps)]
    out: list[Minibatch] = []
    part = 0
    for place, size in enumerate(sizes):
        while part < steps - 1 and place >= (part + 1) * len(sizes) / steps:
            out += gatherer.end_part()
            part += 1
        if not dropped[place]:
            one = sized(size, str(place))
            added[part].append(one)
            out += gatherer.add(one)
        if idle[place]:
            enough = gatherer.is_enough
            sent = gatherer.trainer_is_idle()
            assert bool(sent) == enough
            out += sent
    assert not (synchronous and out)
    out += gatherer.end_batch()
    for number in range(steps):
        assert [one for minibatch in out if minibatch.part == number for one in minibatch.groups] == added[number]
    assert [minibatch.part for minibatch in out] == sorted(minibatch.part for minibatch in out)
    for minibatch in out:
        assert minibatch.groups
        assert minibatch.tokens == sum(map(example_tokens, minibatch.groups))
    assert gatherer.end_batch() == []


@given(groups=st.integers(1, 60), minibatches=st.integers(1, 20), synchronous=st.booleans())
def test_groups_alike_are_cut_evenly(groups: int, minibatches: int, synchronous: bool) -> None:
    gatherer = MinibatchGatherer(groups, minibatches, synchronous=synchronous)
    sizes = [len(part.groups) for part in gather(gatherer, [sized(50)] * groups)]
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == min(groups, minibatches)


@given(st.lists(st.integers(2, 400), min_size=8, max_size=60), st.integers(1, 8))
def test_minibatches_of_unlike_groups_are_alike_in_tokens(sizes: list[int], minibatches: int) -> None:
    """Synchronous: each is within one group of its share."""
    out = gather(MinibatchGatherer(len(sizes), minibatches, synchronous=True), [sized(size) for size in sizes])
    share = sum(sizes) / len(out)
    assert len(out) == minibatches
    if max(sizes) <= share:
        assert all(abs(minibatch.tokens - share) <= max(sizes) for minibatch in out)


@given(st.integers(0, 10_000))
def test_streamed_minibatches_are_alike_though_long_groups_finish_last(seed: int) -> None:
    """For 64 long-tailed groups in order of length, knowing the last batch's mean: within a third."""
    chance = random.Random(seed)
    sizes = sorted(int(200 * chance.lognormvariate(0, 0.6)) + 2 for _ in range(64))
    gatherer = MinibatchGatherer(64, 4, mean_tokens=sum(sizes) / 64)
    tokens = [minibatch.tokens for minibatch in gather(gatherer, [sized(size) for size in sizes])]
    share = sum(sizes) / 4
    assert len(tokens) == 4
    assert max(abs(size - share) for size in tokens) <= max(share / 3, max(sizes))


def test_an_idle_trainer_gets_a_quarter_of_a_minibatch_and_a_busy_one_a_full_one() -> None:
    gatherer = MinibatchGatherer(32, 4, mean_tokens=100)
    assert gatherer.add(sized(100)) == []
    assert gatherer.trainer_is_idle() == []
    assert gatherer.add(sized(100)) == []
    assert gatherer.is_enough
    assert [len(part.groups) for part in gatherer.trainer_is_idle()] == [2]
    counts = [len(part.groups) for _ in range(30) for part in gatherer.add(sized(100))]
    # 3,000 of 3,200 tokens are left: still four, slightly smaller.
    assert counts == [8, 7, 8, 7]


def test_dropped_groups_leave_no_hole() -> None:
    gatherer = MinibatchGatherer(8, 2, mean_tokens=10)
    assert [len(part.groups) for _ in range(5) for part in gatherer.add(sized(10))] == [4]
    # Three were dropped: the batch ends without them.
    assert [len(part.groups) for part in gatherer.end_batch()] == [1]


def test_a_batch_with_nothing_to_learn_from_sends_nothing_and_passes_its_expectation_on() -> None:
    gatherer = MinibatchGatherer(8, 2, optimizer_steps=2, mean_tokens=10)
    assert gatherer.trainer_is_idle() == gatherer.end_part() == gatherer.end_batch() == []
    assert gatherer.mean_tokens == 10
    assert MinibatchGatherer(8, 2).mean_tokens is None


def test_the_mean_is_of_all_parts_and_counts_dropped_groups_as_nothing() -> None:
    gatherer = MinibatchGatherer(4, 1, optimizer_steps=2, mean_tokens=7)
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


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MinibatchGatherer(0, 1)
