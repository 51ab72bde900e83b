from __future__ import annotations

import numpy as np
import pytest
from tinker import types as tinker_types

from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.training.batches import LearnedMinibatch, learning_metrics, optimizer_metrics


def episode(*turns: tuple[tuple[float, ...], int]) -> Episode:
    """Turns given as log-probabilities and number of appended tokens."""
    played = tuple(Turn((7,) * len(lp), lp, "x", appended_tokens=(8,) * appended) for lp, appended in turns)
    return Episode(Question("q", "?", ("a",)), (1, 2, 3), played, StopReason.ANSWER)


def output(*logprobs: list[float], **metrics: float) -> tinker_types.ForwardBackwardOutput:
    records = [{"logprobs": tinker_types.TensorData.from_numpy(np.asarray(lp, dtype=np.float32))} for lp in logprobs]
    named = {name.replace("__", ":"): value for name, value in metrics.items()}
    return tinker_types.ForwardBackwardOutput("ArrayRecord", records, named)


# Three prompt tokens: targets start at the second, so the first sampled token is target 2.
FIRST = episode(((-0.5, -0.5), 2), ((-1.0,), 0))
SECOND = episode(((-2.0,), 0))
FIRST_LOGPROBS, SECOND_LOGPROBS = [9, 9, -0.5, -0.7, 9, 9, -1.3], [9, 9, -2.0]


def test_metrics_compare_the_same_tokens_over_all_minibatches() -> None:
    metrics = learning_metrics(
        [
            LearnedMinibatch(output(FIRST_LOGPROBS, loss__sum=1.0), [FIRST], 8, kl_base=2.0),
            LearnedMinibatch(output(SECOND_LOGPROBS, loss__sum=2.0), [SECOND], 4, kl_base=1.0),
        ]
    )
    assert metrics == pytest.approx(
        {
            "optim/loss": 3.0,
            "optim/tokens": 4,
            "optim/datums": 2,
            "optim/minibatches": 2,
            "optim/tokens_per_minibatch_min": 4,
            "optim/tokens_per_minibatch_max": 8,
            "optim/entropy": 1.0,
            "optim/kl_sample_train_v1": (0 + 0.2 + 0.3 + 0) / 4,
            "optim/kl_sample_train_v2": 0.5 * (0.04 + 0.09) / 4,
            "optim/kl_base": 3 / 4,
        },
        abs=1e-6,
    )


def test_what_the_service_measures_is_reduced_by_its_name() -> None:
    of_two = output(
        SECOND_LOGPROBS,
        SECOND_LOGPROBS,
        loss__sum=0.0,
        clipped__mean=0.1,
        worst__max=3.0,
        least__min=1.0,
        ids__unique=5.0,
    )
    of_one = output(SECOND_LOGPROBS, loss__sum=0.0, clipped__mean=0.4, worst__max=2.0, least__min=0.5, ids__unique=6.0)
    metrics = learning_metrics([LearnedMinibatch(of_two, [SECOND, SECOND], 8), LearnedMinibatch(of_one, [SECOND], 4)])
    assert metrics["optim/clipped"] == pytest.approx(0.2)
    assert (metrics["optim/worst"], metrics["optim/least"]) == (3.0, 0.5)
    assert "optim/ids" not in metrics
    assert "optim/kl_base" not in metrics


def test_a_batch_of_two_losses_has_the_figures_of_each() -> None:
    """A metric of only one loss is averaged over its own examples."""
    recorded = output(SECOND_LOGPROBS, loss__sum=2.0, clipped__mean=0.5, masked__mean=0.25, worst__max=3.0)
    others = output(FIRST_LOGPROBS, SECOND_LOGPROBS, loss__sum=-0.5, clipped__mean=0.2, ratio__max=1.5, worst__max=4.0)
    for order in (1, -1):
        minibatches = [
            LearnedMinibatch(recorded, [SECOND], 4, is_fallback=False),
            LearnedMinibatch(others, [FIRST, SECOND], 12, is_fallback=True),
        ]
        metrics = learning_metrics(minibatches[::order])
        assert metrics["optim/loss"] == 1.5
        assert metrics["optim/datums"] == 3
        assert metrics["optim/fallback_datums"] == 2
        assert metrics["optim/clipped"] == pytest.approx((0.5 + 2 * 0.2) / 3)
        assert metrics["optim/masked"] == 0.25
        assert (metrics["optim/ratio"], metrics["optim/worst"]) == (1.5, 4.0)


def test_nothing_trained_has_no_figures_of_learning() -> None:
    assert learning_metrics([]) == {"optim/tokens": 0.0}
    assert optimizer_metrics([]) == {}


def test_of_several_optimizer_steps_the_gradient_is_averaged_and_the_state_is_the_last() -> None:
    steps = [{"grad_norm": 1.0, "step": 7.0}, {"grad_norm": 3.0, "step": 8.0}]
    assert optimizer_metrics(steps) == {"optim/grad_norm": 2.0, "optim/step": 8.0}
