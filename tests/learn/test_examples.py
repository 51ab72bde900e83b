from __future__ import annotations

from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.learn.examples import to_datum, to_supervised_datum

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
