from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from searchr1_async.local.backend import Datum, UserFault, check_data, loss_and_slope, ratio_metrics
from searchr1_async.local.trainer import LOSSES, find_loss, with_sequence_ratio

LP = torch.tensor([-1.0, -0.5, -3.0, -2.0])
Q = torch.tensor([-1.0, -1.5, -1.0, -2.0])
A = torch.tensor([1.0, 2.0, -1.0, 0.0])


def value(name: str, **config: float) -> torch.Tensor:
    loss, thresholds = find_loss(name, config)
    return loss.terms(LP, {"logprobs": Q, "advantages": A, "weights": A}, thresholds)


def test_each_loss_is_its_formula() -> None:
    ratio = torch.exp(LP - Q)
    torch.testing.assert_close(value("cross_entropy"), -A * LP)
    torch.testing.assert_close(value("importance_sampling"), -ratio * A)
    torch.testing.assert_close(value("ppo"), -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A))
    torch.testing.assert_close(value("cispo"), -ratio.clamp(0.0, 4.0) * A * LP)
    torch.testing.assert_close(value("dro"), -(LP * A - 0.025 * (LP - Q) ** 2))


def test_thresholds_can_be_set() -> None:
    ratio = torch.exp(LP - Q)
    torch.testing.assert_close(
        value("ppo", clip_low_threshold=0.5, clip_high_threshold=2.0),
        -torch.minimum(ratio * A, ratio.clamp(0.5, 2.0) * A),
    )
    torch.testing.assert_close(value("cispo", clip_high_threshold=1.5), -ratio.clamp(0.0, 1.5) * A * LP)
    torch.testing.assert_close(value("dro", beta=1.0), -(LP * A - 0.5 * (LP - Q) ** 2))


def test_cispo_keeps_the_gradient_of_clipped_tokens_and_ppo_does_not() -> None:
    lp = torch.tensor([2.0], requires_grad=True)
    inputs = {"logprobs": torch.tensor([0.0]), "advantages": torch.tensor([1.0])}
    gradients = {}
    for name in ("cispo", "ppo"):
        loss, config = find_loss(name, {})
        (gradients[name],) = torch.autograd.grad(loss.terms(lp, inputs, config).sum(), lp)
    assert float(gradients["cispo"]) == -4.0
    assert float(gradients["ppo"]) == 0.0


def stable_slope(log_ratio: float, advantage: float, **config: float) -> float:
    """Derivative with respect to one token's log-probability."""
    lp = torch.tensor([-2.0 + log_ratio], dtype=torch.float64, requires_grad=True)
    loss, thresholds = find_loss("stable_reinforce", config)
    inputs = {"logprobs": torch.tensor([-2.0]), "advantages": torch.tensor([advantage])}
    (slope,) = torch.autograd.grad(loss.terms(lp, inputs, thresholds).sum(), lp)
    return float(slope)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_stable_reinforce_on_policy_is_importance_sampling(advantage: float) -> None:
    assert stable_slope(0.0, advantage) == stable_slope(0.0, advantage, alpha=0.0) == -advantage


@pytest.mark.parametrize("log_ratio", [-200.0, -1.0, 1.0, 200.0])
def test_stable_reinforce_tapers_the_two_signs_differently(log_ratio: float) -> None:
    truncated = min(math.exp(log_ratio), 1.0)
    assert stable_slope(log_ratio, -2.0) == pytest.approx(2.0 * truncated)
    assert stable_slope(log_ratio, 2.0) == -2.0, "a good token keeps full weight"
    assert stable_slope(log_ratio, 2.0, alpha=0.25) == pytest.approx(-2.0 * max(0.25, truncated))
    assert stable_slope(log_ratio, 2.0, alpha=0.0) == pytest.approx(-2.0 * truncated)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("gspo", "cispo", "stable_reinforce")])
def test_gradients_are_finite_differences(name: str) -> None:
    _check_gradient(name, LP.double(), None)


@pytest.mark.parametrize("name", ["cispo", "stable_reinforce"])
def test_gradients_with_a_fixed_weight_are_finite_differences(name: str) -> None:
    """The weight is constant in the gradient, so it is fixed while the log-probability varies."""
    loss, thresholds = find_loss(name, {})
    lp = LP.double()
    weight = loss.terms(lp, {"logprobs": Q, "advantages": A}, thresholds) / lp
    _check_gradient(name, lp, weight)


def _check_gradient(name: str, lp: torch.Tensor, held: torch.Tensor | None) -> None:
    loss, thresholds = find_loss(name, {})
    inputs = {"logprobs": Q.double(), "advantages": A.double(), "weights": A.double()}

    def total(at: torch.Tensor) -> torch.Tensor:
        return (loss.terms(at, inputs, thresholds) if held is None else held * at).sum()

    leaf = lp.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss.terms(leaf, inputs, thresholds).sum(), leaf)
    for index in range(len(lp)):
        step = torch.zeros_like(lp)
        step[index] = 1e-5
        difference = (total(lp + step) - total(lp - step)) / 2e-5
        assert float(slope[index]) == pytest.approx(float(difference), abs=1e-6)


def rl_datum(q: list[float], advantages: list[float]) -> Datum:
    columns = {"logprobs": np.array(q, np.float32), "advantages": np.array(advantages, np.float32)}
    return Datum(np.arange(len(q), dtype=np.int32), {"target_tokens": np.arange(len(q)), **columns})


def test_the_ratios_of_a_request_are_reported() -> None:
    data = [rl_datum([-1.0, -1.0, -1.0], [1.0, -1.0, 0.0]), rl_datum([-1.0], [0.0]), rl_datum([-3.0], [2.0])]
    logprobs = [np.array([-2.0, 0.0, -9.0], np.float32), np.array([5.0], np.float32), np.array([-3.0], np.float32)]
    for name, clipped in {
        "importance_sampling": None,
        "dro": None,
        "ppo": 0.0,  # clips neither a good token that fell nor a bad one that rose
        "cispo": 0.0,
        "stable_reinforce": 2 / 3,
    }.items():
        metrics = ratio_metrics(name, find_loss(name, {})[1], data, logprobs)
        assert metrics["ratio_min:min"] == pytest.approx(math.exp(-1.0))
        assert metrics["ratio_max:max"] == pytest.approx(math.exp(1.0))
        assert metrics.get("clipped_fraction:mean") == clipped, name
    narrow = find_loss("cispo", {"clip_high_threshold": 1.5})[1]
    assert ratio_metrics("cispo", narrow, data, logprobs)["clipped_fraction:mean"] == pytest.approx(1 / 3)


def test_huge_ratios_are_reported_as_finite_numbers() -> None:
    for name in ("importance_sampling", "ppo", "stable_reinforce"):
        metrics = ratio_metrics(name, find_loss(name, {})[1], [rl_datum([-5000.0], [1.0])], [np.zeros(1, np.float32)])
        assert all(math.isfinite(value) for value in metrics.values())
    assert ratio_metrics("ppo", find_loss("ppo", {})[1], [rl_datum([-1.0], [0.0])], [np.zeros(1, np.float32)]) == {}


MASK = torch.tensor([1.0, 1.0, 0.0, 1.0])


def gspo(lp: torch.Tensor, **config: float) -> torch.Tensor:
    """Two sequences of two tokens; the second has one token in its ratio."""
    loss, thresholds = find_loss("gspo", config)
    inputs = with_sequence_ratio({"logprobs": Q, "advantages": A, "sequence_ratio_mask": MASK}, lp, [2, 2])
    return loss.terms(lp, inputs, thresholds)


def test_gspo_has_one_ratio_per_sequence_over_the_marked_tokens() -> None:
    log_ratio = torch.tensor([0.5, 0.5, 0.0, 0.0])  # the mean of 0 and 1; only the marked token
    wide = {"clip_low_threshold": 0.0, "clip_high_threshold": 9.0}
    torch.testing.assert_close(gspo(LP, **wide), -log_ratio.exp() * A)
    torch.testing.assert_close(gspo(LP, clip_high_threshold=1.1)[:2], -1.1 * A[:2])
    torch.testing.assert_close(gspo(LP)[:2], -(1 + 4e-4) * A[:2])


def test_gspo_gives_each_token_its_own_gradient_and_none_to_a_clipped_sequence() -> None:
    lp = LP.clone().requires_grad_()
    (free,) = torch.autograd.grad(gspo(lp, clip_low_threshold=0.0, clip_high_threshold=9.0).sum(), lp)
    torch.testing.assert_close(free, -torch.tensor([0.5, 0.5, 0.0, 0.0]).exp() * A)
    (clipped,) = torch.autograd.grad(gspo(lp).sum(), lp)
    torch.testing.assert_close(clipped, torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_gspo_does_not_depend_on_sequence_length() -> None:
    """Doubling every token keeps the ratio and the terms."""
    loss, thresholds = find_loss("gspo", {"clip_high_threshold": 9.0})
    once = {"logprobs": Q[:2], "advantages": A[:2], "sequence_ratio_mask": MASK[:2]}
    twice = {name: values.repeat(2) for name, values in once.items()}
    short = loss.terms(LP[:2], with_sequence_ratio(once, LP[:2], [2]), thresholds)
    long = loss.terms(LP[:2].repeat(2), with_sequence_ratio(twice, LP[:2].repeat(2), [4]), thresholds)
    torch.testing.assert_close(long, short.repeat(2))


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_scripted_model_computes_the_same_losses(name: str) -> None:
    """numpy against autograd: value and slope of random data with clipped ratios and zero advantages."""
    chance = np.random.default_rng(3)
    q, lp = -chance.uniform(0.1, 3.0, (2, 64))
    inputs = {
        "logprobs": q,
        "advantages": chance.normal(size=64) * (chance.random(64) < 0.8),
        "weights": chance.normal(size=64),
        "sequence_ratio_mask": (chance.random(64) < 0.5).astype(float),
    }
    for config in ({}, {"clip_low_threshold": 0.3, "clip_high_threshold": 2.5}):
        known = LOSSES[name].inputs.config
        loss, thresholds = find_loss(name, {key: number for key, number in config.items() if key in known})
        leaf = torch.tensor(lp, requires_grad=True)
        tensors = {key: torch.tensor(values) for key, values in inputs.items()}
        if loss.inputs.is_sequential:
            tensors = with_sequence_ratio(tensors, leaf, [64])
        expected = loss.terms(leaf, tensors, thresholds).sum()
        (slope,) = torch.autograd.grad(expected, leaf)
        value, slope_T = loss_and_slope(name, lp, inputs, thresholds)
        assert value == pytest.approx(expected.item())
        np.testing.assert_allclose(slope_T, slope.numpy(), rtol=1e-6, atol=1e-9)
        assert np.abs(slope_T).max() > 0.0 or name == "gspo"


def test_an_unknown_loss_is_refused_by_name() -> None:
    with pytest.raises(UserFault, match=r"'reinforce'.*cross_entropy, importance_sampling, ppo, cispo, dro, gspo"):
        find_loss("reinforce", {})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("cross_entropy", {"beta": 1.0}, "'beta'; allowed: nothing"),
        ("ppo", {"beta": 1.0}, "clip_low_threshold, clip_high_threshold"),
        ("dro", {"beta": float("nan")}, "not a finite number"),
        ("ppo", {"clip_low_threshold": 1.5}, "above clip_high_threshold"),
        ("stable_reinforce", {"alpha": 1.5}, r"alpha is 1.5; it must lie in \[0, 1\]"),
        ("stable_reinforce", {"beta": 1.0}, "allowed: alpha"),
    ],
)
def test_a_bad_configuration_is_refused(name: str, config: dict[str, float], message: str) -> None:
    with pytest.raises(UserFault, match=message):
        find_loss(name, config)


def datum(**changes: np.ndarray | None) -> Datum:
    inputs = {
        "target_tokens": np.array([2, 3, 4]),
        "logprobs": np.zeros(3, np.float32),
        "advantages": np.ones(3, np.float32),
    }
    tokens = changes.pop("tokens", np.array([1, 2, 3], np.int32))
    assert tokens is not None
    merged = {**inputs, **changes}
    return Datum(tokens, {name: values for name, values in merged.items() if values is not None})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (datum(advantages=None), r"datum 1 of 2: loss_fn 'ppo' needs loss_fn_inputs\['advantages'\]"),
        (datum(target_tokens=None), "target_tokens"),
        (datum(logprobs=np.zeros(2, np.float32)), r"'logprobs'\] has shape \[2\], but model_input has 3 tokens"),
        (datum(logprobs=np.array([0, np.inf, 0], np.float32)), "'logprobs'.*not finite"),
        (datum(weights=np.ones(3, np.float32)), "takes target_tokens, logprobs, advantages, not weights"),
        (datum(target_tokens=np.array([1, 2, 10])), "target_tokens contains a token id outside 0 to 9"),
        (datum(tokens=np.array([1, -2, 3], np.int32)), "model_input contains a token id outside 0 to 9"),
        (datum(tokens=np.arange(9, dtype=np.int32)), "expected 1 to 8 tokens"),
    ],
)
def test_bad_data_is_refused_by_datum_and_field(bad: Datum, message: str) -> None:
    with pytest.raises(UserFault, match=message):
        check_data([datum(), bad], "ppo", LOSSES["ppo"].inputs, vocabulary=10, context=8)
    with pytest.raises(UserFault, match="no data"):
        check_data([], "ppo", LOSSES["ppo"].inputs, vocabulary=10, context=8)


def test_a_sequence_without_a_token_in_its_ratio_is_refused() -> None:
    with pytest.raises(UserFault, match=r"datum 0 of 1: loss_fn_inputs\['sequence_ratio_mask'\] marks no token"):
        check_data([datum(sequence_ratio_mask=np.zeros(3, np.float32))], "gspo", LOSSES["gspo"].inputs)
