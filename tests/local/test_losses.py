from __future__ import annotations

import numpy as np
import pytest
import torch

from searchr1_async.local.backend import Datum, UserFault
from searchr1_async.local.losses import LOSSES, check_data, find_loss

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


def test_a_loss_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(UserFault, match=r"'gspo'.*cross_entropy, importance_sampling, ppo, cispo, dro"):
        find_loss("gspo", {})


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
        check_data([datum(), bad], "ppo", LOSSES["ppo"], vocabulary=10, context=8)
    with pytest.raises(UserFault, match="no data"):
        check_data([], "ppo", LOSSES["ppo"], vocabulary=10, context=8)
