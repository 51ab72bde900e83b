from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.episodes.types import Episode, Group, Question, StopReason
from searchr1_async.learn.minibatches import MinibatchGatherer, drop_reason


def group(*rewards: float, name: str = "q") -> Group:
    question = Question(name, "?", ("a",))
    return Group(question, tuple(Episode(question, (1,), (), StopReason.ANSWER, reward=reward) for reward in rewards))


@given(groups=st.integers(1, 60), minibatches=st.integers(1, 20))
def test_every_group_goes_out_once_in_even_parts(groups: int, minibatches: int) -> None:
    gatherer = MinibatchGatherer(groups, minibatches)
    added = [group(0, 1, name=str(i)) for i in range(groups)]
    out = [part for one in added if (part := gatherer.add(one)) is not None]
    assert [one for part in out for one in part] == added
    assert len(out) == min(groups, minibatches)
    assert max(map(len, out)) - min(map(len, out)) <= 1


def test_a_minibatch_goes_out_with_its_last_group() -> None:
    gatherer = MinibatchGatherer(4, 2)
    assert gatherer.add(group(1, 0)) is None
    assert gatherer.add(group(1, 1)) is not None  # a constant group fills its place


def test_constant_and_tiny_groups_are_dropped_for_a_reason() -> None:
    assert drop_reason(group(1, 1), drop_constant_groups=True) == "constant_reward"
    assert drop_reason(group(1, 1), drop_constant_groups=False) is None
    assert drop_reason(group(1), drop_constant_groups=False) == "too_few_episodes"
    assert drop_reason(group(1, 0), drop_constant_groups=True) is None
