from __future__ import annotations

import numpy as np
from tinker import types as tinker_types
from tinker.proto.request_conv import forward_backward_request_to_proto

from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.learn.examples import at_sampled, sampled_logprobs, to_datum, to_supervised_datum

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
    """Its tokens are an array that the SDK does not check: what it sends must not differ."""
    datum = to_datum(EPISODE, 1.0)
    plain = tinker_types.Datum(
        model_input=tinker_types.ModelInput.from_ints([1, 2, 3, 4, 5, 6, 7]), loss_fn_inputs=datum.loss_fn_inputs
    )
    assert wire(datum) == wire(plain)
