from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.local.packing import micro_batches, pack

# A small alphabet makes shared prefixes frequent.
sequences_of_tokens = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda ids: np.array(ids, np.int32)),
    min_size=1,
    max_size=8,
)


def _distinct_prefixes(sequences: list[np.ndarray]) -> set[tuple[int, ...]]:
    return {tuple(s[: i + 1].tolist()) for s in sequences for i in range(len(s))}


@given(sequences_of_tokens)
def test_every_distinct_prefix_has_one_row_and_every_sequence_finds_its_own(sequences: list[np.ndarray]) -> None:
    packed = pack(sequences)

    assert len(packed.tokens) == len(_distinct_prefixes(sequences))
    for sequence, path in zip(sequences, packed.paths, strict=True):
        rows = path.rows()
        assert packed.tokens[rows].tolist() == sequence.tolist()
        assert packed.positions[rows].tolist() == list(range(len(sequence)))


@given(sequences_of_tokens)
def test_a_segment_sees_exactly_the_tokens_before_it(sequences: list[np.ndarray]) -> None:
    packed = pack(sequences)
    prefixes = _distinct_prefixes(sequences)

    for segment in packed.segments:
        ranges = (*segment.context, (segment.start, segment.stop))
        whole = tuple(token for start, stop in ranges for token in packed.tokens[start:stop].tolist())
        assert whole in prefixes
        assert packed.positions[segment.start] == len(whole) - (segment.stop - segment.start)
    assert [s.start for s in packed.segments] == [0, *(s.stop for s in packed.segments[:-1])]


@given(sequences_of_tokens, st.data())
def test_cached_tokens_get_no_row(sequences: list[np.ndarray], data: st.DataObject) -> None:
    known = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]

    packed = pack(sequences, known)

    for sequence, path in zip(sequences, packed.paths, strict=True):
        cached = sequences[path.past][: path.past_length].tolist() if path.past is not None else []
        assert cached + packed.tokens[path.rows()].tolist() == sequence.tolist()
        assert len(path.rows()) >= 1, "the last token is always computed: its logits are needed"


@given(sequences_of_tokens, st.integers(1, 20))
def test_micro_batches_hold_every_sequence_once_within_the_bound(sequences: list[np.ndarray], bound: int) -> None:
    batches = micro_batches(sequences, bound)

    assert sorted(index for batch in batches for index in batch) == list(range(len(sequences)))
    for batch in batches:
        rows = len(pack([sequences[i] for i in batch]).tokens)
        assert rows <= bound or len(batch) == 1 or rows == max(len(sequences[i]) for i in batch)


def test_members_of_a_group_stay_together() -> None:
    groups = [np.array([first, *range(10), member], np.int32) for member in (50, 51) for first in (7, 3)]

    batches = micro_batches(groups, 13)

    assert [sorted(batch) for batch in batches] == [[1, 3], [0, 2]]
