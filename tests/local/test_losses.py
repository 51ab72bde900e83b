from __future__ import annotations

import numpy as np
import pytest
import torch

from searchr1_async.local.backend import Datum, UserFault
from searchr1_async.local.losses import LOSSES, check_data, find_loss, with_sequence_ratio
from searchr1_async.local.scripted_losses import loss_and_slope

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


MASK = torch.tensor([1.0, 1.0, 0.0, 1.0])


def gspo(lp: torch.Tensor, **config: float) -> torch.Tensor:
    """Two sequences of two tokens; in the second one token is in the ratio."""
    loss, thresholds = find_loss("gspo", config)
    inputs = with_sequence_ratio({"logprobs": Q, "advantages": A, "sequence_ratio_mask": MASK}, lp, [2, 2])
    return loss.terms(lp, inputs, thresholds)


def test_gspo_has_one_ratio_a_sequence_over_the_marked_tokens() -> None:
    log_ratio = torch.tensor([0.5, 0.5, 0.0, 0.0])  # the mean of 0 and 1; of the token that is marked alone
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


def test_gspo_is_not_a_function_of_how_long_a_sequence_is() -> None:
    """Doubling every token leaves the ratio, so terms stay as they are."""
    loss, thresholds = find_loss("gspo", {"clip_high_threshold": 9.0})
    once = {"logprobs": Q[:2], "advantages": A[:2], "sequence_ratio_mask": MASK[:2]}
    twice = {name: values.repeat(2) for name, values in once.items()}
    short = loss.terms(LP[:2], with_sequence_ratio(once, LP[:2], [2]), thresholds)
    long = loss.terms(LP[:2].repeat(2), with_sequence_ratio(twice, LP[:2].repeat(2), [4]), thresholds)
    torch.testing.assert_close(long, short.repeat(2))


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_scripted_model_computes_the_same_losses(name: str) -> None:
    """In numpy: value and slope of random data, some ratios clipped and some advantages 0, against autograd."""
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


def test_a_loss_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(UserFault, match=r"'reinforce'.*cross_entropy, importance_sampling, ppo, cispo, dro, gspo"):
        find_loss("reinforce", {})


def test_a_loss_that_only_the_cloud_has_is_refused_with_the_reason() -> None:
    with pytest.raises(UserFault, match=r"'stable_reinforce' learns from what the Tinker cloud records.*Choose one of"):
        find_loss("stable_reinforce", {})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("cross_entropy", {"beta": 1.0}, "'beta'; it may hold nothing"),
        ("ppo", {"beta": 1.0}, "clip_low_threshold, clip_high_threshold"),
        ("dro", {"beta": float("nan")}, "no finite number"),
        ("ppo", {"clip_low_threshold": 1.5}, "above clip_high_threshold"),
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
        (datum(target_tokens=np.array([1, 2, 10])), "target_tokens holds a token outside 0 to 9"),
        (datum(tokens=np.array([1, -2, 3], np.int32)), "model_input holds a token outside 0 to 9"),
        (datum(tokens=np.arange(9, dtype=np.int32)), "wanted 1 to 8 tokens"),
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
