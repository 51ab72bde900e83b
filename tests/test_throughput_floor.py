"""The floor of the throughput benchmark: against hand-computed values, and against every schedule of a small batch."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shared.scripted_episodes import GROUP_SIZE, Subject, World, episodes_seen, reply_text, shuffled_to
from benchmarks.throughput.floor import (
    GroupCourse,
    courses,
    pipelined_floor,
    run_seen,
    streaming_floor,
    synchronous_floor,
)
from searchr1_async.local.process import Served, ServedSequence, TrainingTimes

TIMES = TrainingTimes(per_token=0.001, optim_step=0.5, save=1.5)
BATCH = [GroupCourse(1.0, 2.0), GroupCourse(10.0, 1.0), GroupCourse(2.0, 2.0)]
GROUPS = st.lists(
    st.builds(GroupCourse, st.floats(0, 20, allow_nan=False), st.floats(0, 5, allow_nan=False)), min_size=1, max_size=5
)


def world(subjects: int = 4) -> World:
    words = tuple(f"word{number}" for number in range(40))
    made = tuple(
        Subject(
            f"Question zebra {number:05d}: who was it, in truth, of them all?", "it", words[number : number + 6], 0.5
        )
        for number in range(subjects)
    )
    return World(seed=1, scale=1.0, subjects=made, words=words)


def test_a_batch_against_hand_computed_values() -> None:
    # The first trains from 1 to 3, the third from 3 to 5, the second from 10 to 11; then optimizer and save.
    assert streaming_floor([BATCH], TIMES) == [13.0]
    assert synchronous_floor([BATCH], TIMES) == [17.0]
    # Two batches: the trainer has 1 + 2 * 5 + 2 * 2 = 15 s of work; both may be rolled out from the start.
    assert pipelined_floor([BATCH, BATCH], TIMES, 1) == 15.0


def test_the_longest_episodes_set_the_floor_if_training_is_fast() -> None:
    batch = [GroupCourse(1.0, 0.0), GroupCourse(10.0, 0.5), GroupCourse(2.0, 0.0)]
    assert pipelined_floor([batch] * 3, TIMES, 0) == sum(streaming_floor([batch] * 3, TIMES)) == 3 * 12.5
    # Of the six that start at once, three are released after 2 s: the third batch starts after 4 s.
    assert pipelined_floor([batch] * 2, TIMES, 1) == 12.5
    assert pipelined_floor([batch] * 3, TIMES, 1) == 4 + 12.5
    # After the second batch, whose slowest took 10.5 + 2 s, the fourth starts.
    assert pipelined_floor([batch] * 4, TIMES, 1) == 12.5 + 12.5
    assert pipelined_floor([batch] * 3, TIMES, 2) == 12.5


def test_a_busy_trainer_sets_the_floor() -> None:
    busy = [GroupCourse(1.0, 4.0)] * 3
    assert streaming_floor([busy], TIMES) == [15.0]
    assert pipelined_floor([busy] * 4, TIMES, 1) == 1.0 + 4 * 12.0 + 4 * 2.0


@given(GROUPS)
def test_no_order_of_training_beats_the_streaming_floor(batch: list[GroupCourse]) -> None:
    def end(order: tuple[GroupCourse, ...]) -> float:
        free = 0.0
        for group in order:
            free = max(free, group.release) + group.training
        return free + TIMES.optim_step + TIMES.save

    best = min(map(end, itertools.permutations(batch)))
    (floor,) = streaming_floor([batch], TIMES)
    assert floor == pytest.approx(best)
    assert floor <= synchronous_floor([batch], TIMES)[0] + 1e-9


@given(st.lists(GROUPS, min_size=1, max_size=4))
def test_older_weights_never_raise_the_floor(batches: list[list[GroupCourse]]) -> None:
    floors = [pipelined_floor(batches, TIMES, staleness) for staleness in range(4)]
    assert floors == sorted(floors, reverse=True)
    assert floors[0] <= sum(streaming_floor(batches, TIMES)) + 1e-9


def test_a_group_is_released_with_its_last_member_and_its_new_searches() -> None:
    made = world()
    tokens = {(subject, member): 100 for subject in range(4) for member in range(GROUP_SIZE)}
    (free,), (searching,), (shared,) = (
        courses(made, [range(4)], tokens, per_token=0.001, search_seconds=seconds, first_turn_shared=together)
        for seconds, together in ((0.0, False), (0.2, False), (0.2, True))
    )
    for subject in range(4):
        plans = [made.plan(subject, member) for member in range(GROUP_SIZE)]
        sums = [sum(turn.seconds for turn in plan.turns) for plan in plans]
        assert free[subject].release == pytest.approx(max(sums))
        searches = max(len(plan.turns) - 1 for plan in plans)
        assert max(sums) <= searching[subject].release <= max(sums) + 0.2 * searches + 1e-9
        assert shared[subject].release >= searching[subject].release
        differs = len({plan.is_right for plan in plans}) > 1
        assert free[subject].training == pytest.approx(0.001 * 100 * GROUP_SIZE if differs else 0.0)


def sample(began: float, prompt: int, version: int, *sequences: tuple[str, float, int]) -> Served:
    drawn = tuple(ServedSequence(*sequence) for sequence in sequences)
    return Served("sample", began, max(each.seconds for each in drawn), version, tokens=prompt, sequences=drawn)


LOG = [
    Served("create", 0.0, 0.0, 0),
    Served("snapshot", 0.0, 1.0, 0),
    sample(2.0, 50, 0, ("0/0/0", 1.0, 10), ("0/1/0", 3.0, 20)),
    sample(5.0, 100, 0, ("0/0/1", 2.0, 5)),
    Served("forward_backward", 7.0, 1.0, 0, tokens=150, examples=2),
    Served("optim_step", 8.0, 0.5, 0),
    Served("export", 8.5, 1.5, 1),
    Served("snapshot", 10.0, 1.5, 1),
    sample(12.0, 60, 1, ("1/0/0", 4.0, 10)),
    Served("forward_backward", 16.0, 1.0, 1, tokens=70, examples=1),
    Served("optim_step", 17.0, 0.5, 1),
    Served("snapshot", 17.5, 1.5, 2),
    Served("export", 19.0, 1.5, 2),
]


def test_a_run_is_read_from_the_log() -> None:
    seen = run_seen(LOG, 2)
    assert (seen.began, seen.step_ends, seen.walls) == (2.0, (11.5, 19.0), [9.5, 7.5])
    assert (seen.sample_requests, seen.samples, seen.in_flight) == (3, 4, 2)
    assert (seen.forward_backwards, seen.examples, seen.training_tokens) == (2, 3, 220)
    assert (seen.optimizer_steps, seen.saves) == (2, 4), "what begins behind the last weights is not of the run"
    episodes = episodes_seen(LOG)
    assert {key: (each.turns, each.tokens) for key, each in episodes.items()} == {
        (0, 0): (2, 104),
        (0, 1): (1, 69),
        (1, 0): (1, 69),
    }
    assert (episodes[0, 0].began, episodes[0, 0].ended) == (2.0, 7.0)


def test_a_last_step_ends_with_its_checkpoint() -> None:
    checkpoint = Served("export", 30.0, 1.5, 2)
    without = [request for request in LOG if (request.kind, request.version) not in {("snapshot", 2), ("export", 2)}]
    assert run_seen([*without, checkpoint], 2).step_ends == (11.5, 31.5)
    assert run_seen([*LOG, checkpoint], 2).step_ends == (11.5, 19.0), "weights that were published count"
    with pytest.raises(ValueError, match=r"steps \[2\]"):
        run_seen([*without, checkpoint, Served("snapshot", 40.0, 1.5, 3)], 3)


def test_an_unfinished_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps \[2, 3\]"):
        run_seen(LOG[:9], 3)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers())
def test_question_order_is_undone_by_the_shuffle(count: int, seed: int) -> None:
    handed = shuffled_to(range(count), random.Random(seed))
    random.Random(seed).shuffle(handed)
    assert handed == list(range(count))


def test_episodes_are_independent_of_each_other() -> None:
    first, second = world(), world()
    for subject, member in itertools.product(range(4), range(GROUP_SIZE)):
        plan = first.plan(subject, member)
        assert plan == second.plan(subject, member)
        assert 1 <= len(plan.turns) <= 5
        assert [turn.query is None for turn in plan.turns] == [False] * (len(plan.turns) - 1) + [True]
        texts = [reply_text(first, subject, member, turn) for turn in range(len(plan.turns))]
        assert ["<tool_call>" in text for text in texts] == [turn.query is not None for turn in plan.turns]
        assert all(str(turn.query) in text for turn, text in zip(plan.turns, texts, strict=True) if turn.query)
        assert ("Answer: it" in texts[-1]) is plan.is_right
    scaled = World(1, 2.0, first.subjects, first.words)
    assert scaled.plan(0, 0).turns[0].seconds == pytest.approx(2 * first.plan(0, 0).turns[0].seconds)
