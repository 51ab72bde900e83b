"""Recorded sequences, and spans of episodes of any shape: correct ones are accepted, each kind of wrong one is rejected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tinker import SampledProvenanceSpan

from searchr1_async.local.backend import Datum, SampledSequence, UserFault
from searchr1_async.local.provenance import Provenance, RecordedSequence, SequenceStore, Span, check, sequence_id
from tests.local.provenance_data import AnySpan, SampledTurn, columns_of, spans_of, without_first, without_last

tokens = st.integers(0, 30)
runs = st.lists(tokens, max_size=4)


def recorded(turns: Sequence[SampledTurn]) -> dict[str, RecordedSequence]:
    return {
        turn.sequence_id: RecordedSequence(
            np.array(turn.prompt, np.int32), np.array(turn.tokens, np.int32), np.array(turn.logprobs, np.float32)
        )
        for turn in turns
    }


@st.composite
def episodes(draw: st.DrawFn, name: str = "a", first_prompt: list[int] | None = None) -> list[SampledTurn]:
    """One to four turns; appended text may be empty, and a truncated turn may have a single token."""
    text = first_prompt or draw(st.lists(tokens, min_size=1, max_size=6))
    turns: list[SampledTurn] = []
    for number in range(draw(st.integers(1, 4))):
        if number:
            text = [*text, *draw(runs)]
        new = draw(st.lists(tokens, min_size=1, max_size=5))
        logprobs = draw(st.lists(st.floats(-9.0, -0.125, width=32), min_size=len(new), max_size=len(new)))
        turns.append(SampledTurn(f"{name}-{number}:0", text, new, logprobs))
        text = [*text, *new]
    return turns


def spans(given: Sequence[AnySpan]) -> tuple[Span, ...]:
    return tuple(
        Span(isinstance(span, SampledProvenanceSpan), span.sequence_id, span.offset, span.length) for span in given
    )


def example(turns: Sequence[SampledTurn], advantage: float = 1.0) -> tuple[Datum, Provenance]:
    columns: dict[str, Any] = columns_of(turns, advantage)
    text = np.array([*turns[-1].prompt, *turns[-1].tokens], np.int32)
    whole = spans_of(turns)
    return Datum(text[:-1], columns), Provenance(spans(without_last(whole)), spans(without_first(whole)))


def proven(datum: Datum, provenance: Provenance, sequences: dict[str, RecordedSequence]) -> Datum:
    (checked,) = check([datum], [provenance], sequences, "was not recorded")
    return checked


def refusal(datum: Datum, provenance: Provenance, sequences: dict[str, RecordedSequence]) -> str:
    with pytest.raises(UserFault) as refused:
        proven(datum, provenance, sequences)
    return str(refused.value)


@given(episodes(), st.data())
def test_correct_spans_are_accepted_and_get_the_recorded_logprobs(
    turns: list[SampledTurn], data: st.DataObject
) -> None:
    # A second episode with the same first prompt, like another group member.
    twin = data.draw(episodes(name="b", first_prompt=turns[0].prompt))
    pairs = [example(turns), example(twin, -0.5)]
    sequences = recorded([*turns, *twin])
    checked = check([datum for datum, _ in pairs], [own for _, own in pairs], sequences, "")
    for (datum, own), result in zip(pairs, checked, strict=True):
        np.testing.assert_array_equal(result.loss_inputs["logprobs"], datum.loss_inputs["logprobs"])
        without = replace(datum, loss_inputs={k: v for k, v in datum.loss_inputs.items() if k != "logprobs"})
        np.testing.assert_array_equal(
            proven(without, own, sequences).loss_inputs["logprobs"], datum.loss_inputs["logprobs"]
        )


@given(episodes(), st.data())
def test_a_shared_first_turn_may_be_named_by_either_request(turns: list[SampledTurn], data: st.DataObject) -> None:
    """A later turn's prompt covers everything before it, including samples, but trains on none of it."""
    last = turns[-1]
    tail = len(last.tokens)
    whole = (Span(False, last.sequence_id, 0, len(last.prompt)), Span(True, last.sequence_id, 0, tail))
    datum, _ = example(turns)
    advantages = datum.loss_inputs["advantages"].copy()
    advantages[: len(last.prompt) - 1] = 0.0
    datum = replace(datum, loss_inputs={**datum.loss_inputs, "advantages": advantages})
    inputs = (whole[0], replace(whole[1], length=tail - 1))
    targets = (Span(False, last.sequence_id, 1, len(last.prompt) - 1), whole[1])
    checked = proven(datum, Provenance(inputs, targets), recorded(turns))
    assert np.count_nonzero(checked.loss_inputs["logprobs"]) == tail
    # Splitting spans and adding empty ones does not change the claim.
    cut = data.draw(st.integers(0, tail))
    pieces = (replace(whole[1], length=cut), Span(True, last.sequence_id, cut, tail - cut))
    again = proven(datum, Provenance(inputs, (targets[0], *pieces)), recorded(turns))
    np.testing.assert_array_equal(again.loss_inputs["logprobs"], checked.loss_inputs["logprobs"])


def changed(provenance: Provenance, side: str, number: int, span: Span) -> Provenance:
    own = list(getattr(provenance, side))
    own[number] = span
    return replace(provenance, **{side: tuple(own)})


SIDES = {"inputs": "model_input_spans", "targets": "loss_fn_input_spans"}


@given(episodes(), st.sampled_from(sorted(SIDES)), st.data())
def test_wrong_spans_are_refused_by_datum_and_span(turns: list[SampledTurn], side: str, data: st.DataObject) -> None:
    datum, provenance = example(turns)
    sequences = recorded(turns)
    own: tuple[Span, ...] = getattr(provenance, side)
    assume(own)
    number = data.draw(st.integers(0, len(own) - 1))
    span, field = own[number], SIDES[side]
    where = f"data[0].{field}[{number}]: "

    missing = refusal(datum, replace(provenance, **{side: ()}), sequences)
    assert f"data[0].{field}: missing" in missing
    longer = refusal(datum, changed(provenance, side, number, replace(span, length=span.length + 1)), sequences)
    assert f"data[0].{field}: the spans cover" in longer
    assert "must tile it exactly" in longer
    unknown = refusal(datum, changed(provenance, side, number, replace(span, sequence_id="x:0")), sequences)
    assert where + "sequence 'x:0' was not recorded" in unknown
    for offset in (1000, -1):
        beyond = refusal(datum, changed(provenance, side, number, replace(span, offset=offset)), sequences)
        assert where + f"claims positions {offset} to" in beyond


@given(episodes(), st.data())
def test_tokens_that_were_not_sampled_or_prompted_are_refused(turns: list[SampledTurn], data: st.DataObject) -> None:
    datum, provenance = example(turns)
    assume(len(datum.tokens) > 1)
    # A changed middle token is in input and targets alike, but differs from the record.
    at = data.draw(st.integers(1, len(datum.tokens) - 1))
    wrong, targets = datum.tokens.copy(), datum.loss_inputs["target_tokens"].copy()
    wrong[at] = targets[at - 1] = 99
    forged = replace(datum, tokens=wrong, loss_inputs={**datum.loss_inputs, "target_tokens": targets})
    text = refusal(forged, provenance, recorded(turns))
    assert re.search(rf"model_input\[{at}\] is 99, but token \d+ (sampled|prompted) in sequence 'a-\d:0' is", text)


def two_turns() -> list[SampledTurn]:
    first = SampledTurn("a:0", [1, 2], [3, 4], [-1.0, -2.0])
    return [first, SampledTurn("b:0", [1, 2, 3, 4, 5], [6, 7], [-0.5, -0.25])]


def test_targets_must_be_the_input_shifted_by_one() -> None:
    datum, provenance = example(two_turns())
    # Both claims are true, but the targets belong to another position.
    unshifted = Datum(datum.tokens, {**datum.loss_inputs, "target_tokens": datum.tokens.astype(np.int64)})
    text = refusal(unshifted, replace(provenance, targets=provenance.inputs), recorded(two_turns()))
    assert "target_tokens[0] is 1, but model_input[1] is 2" in text
    assert "shifted by one" in text


def test_unsampled_targets_may_be_padding() -> None:
    datum, provenance = example(two_turns())
    sequences = recorded(two_turns())

    def with_target(at: int, token: int) -> Datum:
        targets = datum.loss_inputs["target_tokens"].copy()
        targets[at] = token
        return replace(datum, loss_inputs={**datum.loss_inputs, "target_tokens": targets})

    padded = with_target(0, 0)
    assert (padded.loss_inputs["target_tokens"] == [0, 3, 4, 5, 6, 7]).all()
    proven(padded, provenance, sequences)
    assert "target_tokens[0] is 9, but token 1 prompted" in refusal(with_target(0, 9), provenance, sequences)
    assert "target_tokens[1] is 0, but token 0 sampled" in refusal(with_target(1, 0), provenance, sequences)
    inputs = replace(datum, tokens=np.array([0, *datum.tokens[1:]], np.int32))
    assert "model_input[0] is 0, but token 0 prompted" in refusal(inputs, provenance, sequences)


def test_a_sampled_target_must_keep_its_context() -> None:
    """The second turn alone: tokens as recorded, but with a different context."""
    sequences = recorded(two_turns())
    inputs = (Span(False, "b:0", 4, 1), Span(True, "b:0", 0, 1))
    datum = Datum(np.array([5, 6], np.int32), {"target_tokens": np.array([6, 7]), "advantages": np.ones(2, np.float32)})
    text = refusal(datum, Provenance(inputs, (Span(True, "b:0", 0, 2),)), sequences)
    assert "data[0].loss_fn_input_spans[0]: sampled token 0 of sequence 'b:0' follows 1 tokens" in text
    assert "not the 5 it was sampled after" in text


def test_columns_must_agree_with_the_record() -> None:
    datum, provenance = example(two_turns())
    sequences = recorded(two_turns())

    def with_column(name: str, at: int, value: float) -> Datum:
        column = datum.loss_inputs[name].copy()
        column[at] = value
        return replace(datum, loss_inputs={**datum.loss_inputs, name: column})

    text = refusal(with_column("logprobs", 1, -1.5), provenance, sequences)
    assert "data[0]: logprobs[1] is -1.5, but the token was sampled with -1" in text
    proven(with_column("logprobs", 1, -1.0005), provenance, sequences)  # rounded by a file
    proven(with_column("logprobs", 0, 7.0), provenance, sequences)  # not at a sampled token: ignored
    text = refusal(with_column("advantages", 3, 0.5), provenance, sequences)
    assert "data[0]: advantages[3] is 0.5, but the target there was not sampled" in text
    bare = replace(datum, loss_inputs={"advantages": datum.loss_inputs["advantages"]})
    assert "data[0]: loss_fn 'stable_reinforce' needs loss_fn_inputs['target_tokens']" in refusal(
        bare, provenance, sequences
    )


PROMPT = np.arange(10, dtype=np.int32)


def sampled(length: int = 5) -> SampledSequence:
    return SampledSequence(np.arange(length, dtype=np.int32), -np.ones(length, np.float32), "stop")


def ids(*names: str, index: int = 0) -> list[str]:
    return [sequence_id(name, index) for name in names]


def test_a_sequence_is_found_only_in_its_session() -> None:
    store = SequenceStore()
    store.record("s", "r-1", PROMPT, [sampled(1), sampled(2)], now=0.0)
    found = store.use("s", ["r-1:0", "r-1:1"], now=1.0)
    assert [len(found[id].tokens) for id in ("r-1:0", "r-1:1")] == [1, 2]
    assert found["r-1:0"].prompt is found["r-1:1"].prompt, "the prompt is stored once"
    for unknown in ("r-1:2", "r-1:-1", "r-1:00", "r-1:", "r-1", "r-2:0", "", ":0", "r-1:\u0661"):
        assert store.use("s", [unknown], now=1.0) == {}, unknown
    assert store.use("other", ["r-1:0"], now=1.0) == {}
    assert "record_stability_info=True" in store.why_missing()
    assert "24 hours" in store.why_missing()


def test_every_use_renews_a_request() -> None:
    store = SequenceStore(life=10.0)
    for name in ("a", "b"):
        store.record("s", name, PROMPT, [sampled()], now=0.0)
    assert store.use("s", ids("a"), now=9.0)
    store.sweep(now=10.0)
    assert len(store) == 1
    assert not store.use("s", ids("b"), now=10.0)
    assert store.use("s", ids("a"), now=18.0)
    assert not store.use("s", ids("a"), now=28.0), "expired, though not swept yet"
    store.sweep(now=28.0)
    assert (len(store), store.bytes) == (0, 0)


def test_a_session_that_ends_is_forgotten() -> None:
    store = SequenceStore()
    store.record("s", "a", PROMPT, [sampled()], now=0.0)
    store.record("t", "b", PROMPT, [sampled()], now=0.0)
    store.forget("s")
    assert not store.use("s", ids("a"), now=0.0)
    assert store.use("t", ids("b"), now=0.0)


def test_the_least_recently_used_are_dropped_beyond_the_memory_limit(caplog: pytest.LogCaptureFixture) -> None:
    a_request = PROMPT.nbytes + 2 * 5 * 8
    store = SequenceStore(most_bytes=2 * a_request)
    store.record("s", "a", PROMPT, [sampled(), sampled()], now=0.0)
    store.record("s", "b", PROMPT, [sampled(), sampled()], now=1.0)
    assert store.use("s", ids("a"), now=2.0)
    store.record("s", "c", PROMPT, [sampled(), sampled()], now=3.0)
    assert store.bytes == 2 * a_request
    assert store.use("s", ids("a", "b", "c"), now=3.0).keys() == set(ids("a", "c"))
    assert "has dropped 2 of the least recently used" in store.why_missing()
    store.record("s", "d", PROMPT, [sampled(), sampled()], now=4.0)
    assert len(caplog.records) == 1, "logged once"


events = st.lists(
    st.tuples(st.sampled_from(["record", "use", "sweep", "forget"]), st.integers(0, 4), st.integers(0, 4)), max_size=40
)


@given(events)
def test_the_store_matches_a_model(happened: list[tuple[str, int, int]]) -> None:
    store, alive, now, count = SequenceStore(life=6.0), dict[str, tuple[str, float]](), 0.0, 0
    for what, number, wait in happened:
        now += wait
        session = f"s{number % 2}"
        if what == "record":
            store.record(session, f"r{count}", PROMPT, [sampled()], now)
            alive[f"r{count}"], count = (session, now), count + 1
        elif what == "use" and count:
            name = f"r{number % count}"
            expected = name in alive and alive[name][0] == session and now - alive[name][1] < 6.0
            assert bool(store.use(session, ids(name), now)) == expected
            if expected:
                alive[name] = session, now
        elif what == "sweep":
            store.sweep(now)
            alive = {name: (owner, used) for name, (owner, used) in alive.items() if now - used < 6.0}
            assert len(store) == len(alive)
        elif what == "forget":
            store.forget(session)
            alive = {name: entry for name, entry in alive.items() if entry[0] != session}
        assert store.bytes == len(store) * (PROMPT.nbytes + 40)
