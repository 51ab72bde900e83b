from __future__ import annotations

import numpy as np
import pytest
from tinker import types as tinker_types

from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.learn.learner import learning_metrics


def episode(*turns: tuple[tuple[float, ...], int]) -> Episode:
    """Turns by their log-probabilities and how many tokens were appended behind each."""
    played = tuple(Turn((7,) * len(lp), lp, "x", appended_tokens=(8,) * appended) for lp, appended in turns)
    return Episode(Question("q", "?", ("a",)), (1, 2, 3), played, StopReason.ANSWER)


def output(*logprobs: list[float], loss: float) -> tinker_types.ForwardBackwardOutput:
    records = [{"logprobs": tinker_types.TensorData.from_numpy(np.asarray(lp, dtype=np.float32))} for lp in logprobs]
    return tinker_types.ForwardBackwardOutput("ArrayRecord", records, {"loss:sum": loss})


def test_metrics_compare_the_same_tokens_over_all_minibatches() -> None:
    # Three prompt tokens: targets begin at the second, so the first sampled token is at place 2.
    first = episode(((-0.5, -0.5), 2), ((-1.0,), 0))
    second = episode(((-2.0,), 0))
    outputs = [
        (output([9, 9, -0.5, -0.7, 9, 9, -1.3], loss=1.0), [first]),
        (output([9, 9, -2.0], loss=2.0), [second]),
    ]
    metrics = learning_metrics(outputs)
    assert metrics["optim/loss"] == 3.0
    assert metrics["optim/tokens"] == 4
    assert metrics["optim/datums"] == 2
    assert metrics["optim/entropy"] == pytest.approx(1.0)
    assert metrics["optim/kl_sample_train_v1"] == pytest.approx((0 + 0.2 + 0.3 + 0) / 4)
    assert metrics["optim/kl_sample_train_v2"] == pytest.approx(0.5 * (0.04 + 0.09) / 4, abs=1e-6)


def test_nothing_trained_has_no_figures_of_learning() -> None:
    assert learning_metrics([]) == {"optim/tokens": 0.0}
