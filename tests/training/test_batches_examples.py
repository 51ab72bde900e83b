from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tinker import types as tinker_types
from tinker.proto.request_conv import forward_backward_request_to_proto

from searchr1_async.episodes.types import Episode, Group, Question, StopReason, Turn
from searchr1_async.training.batches import (
    Span,
    at_sampled,
    sampled_logprobs,
    to_datum,
    to_supervised_datum,
    without_sequence_ids,
)

EPISODE = Episode(
    Question("1", "q?", ("a",)),
    (1, 2, 3),
    (Turn((4, 5), (-0.25, -0.5), "x", appended_tokens=(6, 7)), Turn((8,), (-1.0,), "y")),
    StopReason.ANSWER,
)


def test_targets_are_shifted_and_only_sampled_tokens_are_learned() -> None:
    datum = to_datum(EPISODE, -0.5)
    assert datum.model_input.to_ints() == [1, 2, 3, 4, 5, 6, 7]
    inputs = {name: tensor.to_numpy().tolist() for name, tensor in datum.loss_fn_inputs.items()}
    assert inputs == {
        "target_tokens": [2, 3, 4, 5, 6, 7, 8],
        "logprobs": [0, 0, -0.25, -0.5, 0, 0, -1.0],
        "advantages": [0, 0, -0.5, -0.5, 0, 0, -0.5],
    }


def test_a_demonstration_weighs_what_the_model_should_write() -> None:
    datum = to_supervised_datum(EPISODE)
    assert datum.loss_fn_inputs["weights"].to_numpy().tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert datum.loss_fn_inputs["target_tokens"].to_numpy().tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_advantages_may_differ_from_token_to_token_and_a_mask_marks_what_was_sampled() -> None:
    datum = to_datum(EPISODE, np.array([0.5, -0.25, 2.0]), with_ratio_mask=True)
    assert datum.loss_fn_inputs["advantages"].to_numpy().tolist() == [0, 0, 0.5, -0.25, 0, 0, 2.0]
    assert datum.loss_fn_inputs["sequence_ratio_mask"].to_numpy().tolist() == [0, 0, 1, 1, 0, 0, 1]


def test_values_of_sampled_tokens_are_found_among_all() -> None:
    assert sampled_logprobs(EPISODE).tolist() == [-0.25, -0.5, -1.0]
    assert at_sampled(EPISODE, np.arange(7, dtype=np.float32)).tolist() == [2.0, 3.0, 6.0]


def wire(datum: tinker_types.Datum) -> bytes:
    request = tinker_types.ForwardBackwardRequest(
        forward_backward_input=tinker_types.ForwardBackwardInput(data=[datum], loss_fn="ppo"), model_id="m", seq_id=1
    )
    return forward_backward_request_to_proto(request).SerializeToString(deterministic=True)


def test_an_example_is_on_the_wire_what_a_list_of_tokens_would_be() -> None:
    """Tokens are an array that the SDK does not validate, but the request must be the same."""
    datum = to_datum(EPISODE, 1.0)
    plain = tinker_types.Datum(
        model_input=tinker_types.ModelInput.from_ints([1, 2, 3, 4, 5, 6, 7]), loss_fn_inputs=datum.loss_fn_inputs
    )
    assert wire(datum) == wire(plain)


@dataclass(frozen=True)
class Request:
    """A service's record of one sampled sequence."""

    prompt: tuple[int, ...]
    sampled: tuple[int, ...]

    def read(self, span: Span) -> tuple[int, ...]:
        """Tokens of a span."""
        tokens = self.sampled if isinstance(span, tinker_types.SampledProvenanceSpan) else self.prompt
        found = tokens[span.offset : span.offset + span.length]
        assert len(found) == span.length > 0, "the span is within the recorded tokens"
        return found


_tokens = st.lists(st.integers(0, 9), max_size=5).map(tuple)


@st.composite
def played(draw: st.DrawFn, name: str, prompt: tuple[int, ...]) -> tuple[Episode, dict[str, Request]]:
    """An arbitrary episode, including empty turns, as recorded by a service. Few distinct tokens, so that runs look alike."""
    turns: list[Turn] = []
    requests: dict[str, Request] = {}
    seen = prompt
    for number in range(draw(st.integers(1, 6))):
        sampled, appended = draw(_tokens), draw(_tokens)
        id = f"{name}/{number}"
        requests[id] = Request(seen, sampled)
        version = draw(st.integers(0, 3))
        turns.append(Turn(sampled, (-0.5,) * len(sampled), "", "", version, None, appended, sequence_id=id))
        seen += sampled + appended
    turns[-1] = replace(turns[-1], appended_tokens=())
    return Episode(Question("1", "?", ("a",)), prompt, tuple(turns), StopReason.ANSWER), requests


@st.composite
def played_groups(draw: st.DrawFn) -> tuple[list[Episode], dict[str, Request]]:
    """Members of one group, with a shared prompt and distinct ids."""
    prompt = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple))
    members = [draw(played(str(member), prompt)) for member in range(draw(st.integers(1, 3)))]
    return [episode for episode, _ in members], {id: one for _, requests in members for id, one in requests.items()}


@given(played_groups())
def test_every_token_is_read_back_from_the_request_that_its_span_names(
    group: tuple[list[Episode], dict[str, Request]],
) -> None:
    episodes, requests = group
    for episode in episodes:
        datum = to_datum(episode, 1.0, with_provenance=True)  # raises unless the spans tile
        if not episode.action_token_count:
            assert datum.loss_fn_input_spans is None, "nothing was sampled"
            continue
        assert datum.model_input_spans is not None
        assert datum.loss_fn_input_spans is not None
        for spans, tokens in (
            (datum.model_input_spans, episode.tokens[:-1]),
            (datum.loss_fn_input_spans, episode.tokens[1:]),
        ):
            assert tuple(token for span in spans for token in requests[span.sequence_id].read(span)) == tokens
        sampled = [
            flag
            for span in datum.loss_fn_input_spans
            for flag in [isinstance(span, tinker_types.SampledProvenanceSpan)] * span.length
        ]
        # Losses with provenance accept advantages only here.
        assert (datum.loss_fn_inputs["advantages"].to_numpy() != 0).tolist() == sampled
        own = {turn.sequence_id for turn in episode.turns}
        assert {span.sequence_id for span in datum.model_input_spans} <= own


@given(played_groups(), st.data())
def test_an_episode_with_a_turn_that_nobody_named_has_no_provenance(
    group: tuple[list[Episode], dict[str, Request]], data: st.DataObject
) -> None:
    episode = group[0][0]
    lost = data.draw(st.integers(0, len(episode.turns) - 1))
    turns = [replace(turn, sequence_id=None) if at == lost else turn for at, turn in enumerate(episode.turns)]
    datum = to_datum(replace(episode, turns=tuple(turns)), 1.0, with_provenance=True)
    assert datum.model_input_spans is None
    assert datum.loss_fn_input_spans is None
    assert to_datum(episode, 1.0).loss_fn_input_spans is None, "unless requested"


def test_the_spans_of_an_episode_of_two_turns() -> None:
    turns = [replace(turn, sequence_id=name) for turn, name in zip(EPISODE.turns, "ab", strict=True)]
    datum = to_datum(replace(EPISODE, turns=tuple(turns)), 1.0, with_provenance=True)
    prompt, sampled = tinker_types.PromptProvenanceSpan, tinker_types.SampledProvenanceSpan
    middle: list[Span] = [sampled(sequence_id="a", length=2), prompt(sequence_id="b", offset=5, length=2)]
    assert datum.model_input_spans == [prompt(sequence_id="a", length=3), *middle]
    assert datum.loss_fn_input_spans == [
        prompt(sequence_id="a", offset=1, length=2),
        *middle,
        sampled(sequence_id="b", length=1),
    ]


def test_a_group_can_be_made_to_forget_its_sequences() -> None:
    named = replace(EPISODE, turns=tuple(replace(turn, sequence_id="x") for turn in EPISODE.turns))
    assert without_sequence_ids(Group(EPISODE.question, (named,), (named,))) == Group(
        EPISODE.question, (EPISODE,), (EPISODE,)
    )
