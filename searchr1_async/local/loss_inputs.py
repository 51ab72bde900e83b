"""Inputs and configuration of Tinker's losses and their validation, shared by all backends. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from searchr1_async.local.backend import Datum, UserFault

Thresholds = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """A loss's inputs besides the tokens."""

    fields: tuple[str, ...]
    """Per-token fields besides ``target_tokens``."""
    config: Thresholds
    """Allowed ``loss_fn_config`` names with their defaults."""
    weight: str | None
    """The field whose zeros mark tokens without gradient; None: every token may have one."""
    is_sequential: bool = False
    """Terms depend on the sequence's log-probabilities, through a ratio without gradient."""


RATIO_MASK = "sequence_ratio_mask"
"""gspo: non-zero where a token counts in its sequence's ratio."""
STABLE_REINFORCE = "stable_reinforce"
"""Its data must have provenance; the service inserts the recorded ``logprobs``."""
_RL = ("logprobs", "advantages")
LOSS_INPUTS: Mapping[str, LossInputs] = {
    "cross_entropy": LossInputs(("weights",), {}, "weights"),
    "importance_sampling": LossInputs(_RL, {}, "advantages"),
    "ppo": LossInputs(_RL, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, "advantages"),
    "cispo": LossInputs(_RL, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, "advantages"),
    "dro": LossInputs(_RL, {"beta": 0.05}, None),
    # Zheng et al., 2025, section 5.1. Much tighter than PPO's, since sequence means vary far less than tokens.
    "gspo": LossInputs(
        (*_RL, RATIO_MASK),
        {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
        "advantages",
        is_sequential=True,
    ),
    STABLE_REINFORCE: LossInputs(_RL, {"alpha": 1.0}, "advantages"),
}


def find_inputs(name: str, config: Mapping[str, float]) -> tuple[LossInputs, Thresholds]:
    """A loss's inputs, and its configuration with defaults filled in.

    Raises:
        UserFault: unknown loss, or a configuration entry that is unknown, not finite or out of range.
    """
    known_losses = ", ".join(LOSS_INPUTS)
    inputs = LOSS_INPUTS.get(name)
    if inputs is None:
        raise UserFault(f"Unknown loss_fn {name!r}; expected one of {known_losses}.")
    for key, value in config.items():
        if key not in inputs.config:
            known = ", ".join(inputs.config) or "nothing"
            raise UserFault(f"loss_fn_config of {name!r} contains {key!r}; allowed: {known}.")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserFault(f"loss_fn_config[{key!r}] is {value!r}, which is not a finite number.")
    thresholds = {**inputs.config, **config}
    if thresholds.get("clip_low_threshold", 0.0) > thresholds.get("clip_high_threshold", math.inf):
        raise UserFault(f"loss_fn_config of {name!r}: clip_low_threshold is above clip_high_threshold.")
    if not 0.0 <= thresholds.get("alpha", 0.0) <= 1.0:
        raise UserFault(f"loss_fn_config of {name!r}: alpha is {thresholds['alpha']:g}; it must lie in [0, 1].")
    return inputs, thresholds


def check_data(
    data: Sequence[Datum], name: str, inputs: LossInputs, vocabulary: int | None = None, context: int | None = None
) -> None:
    """Validate data for a loss. Raises :class:`UserFault` naming the invalid datum and field.

    ``vocabulary`` is the exclusive upper bound of token ids, ``context`` the maximum tokens per datum; None: no limit.
    """
    if not data:
        raise UserFault("forward_backward got no data.")
    most = math.inf if context is None else context
    wanted = ("target_tokens", *inputs.fields)
    for index, datum in enumerate(data):
        where = f"datum {index} of {len(data)}"
        tokens = datum.tokens
        if tokens.ndim != 1 or not 1 <= len(tokens) <= most:
            raise UserFault(f"{where}: model_input has shape {list(tokens.shape)}; expected 1 to {most} tokens.")
        for field in wanted:
            if field not in datum.loss_inputs:
                raise UserFault(f"{where}: loss_fn {name!r} needs loss_fn_inputs[{field!r}]; it has {_names(datum)}.")
            values = np.asarray(datum.loss_inputs[field])
            if values.shape != tokens.shape:
                raise UserFault(
                    f"{where}: loss_fn_inputs[{field!r}] has shape {list(values.shape)}, but model_input has "
                    f"{len(tokens)} tokens."
                )
            if field != "target_tokens" and not np.isfinite(values).all():
                raise UserFault(f"{where}: loss_fn_inputs[{field!r}] contains values that are not finite.")
        if extra := sorted(set(datum.loss_inputs) - set(wanted)):
            raise UserFault(f"{where}: loss_fn {name!r} takes {', '.join(wanted)}, not {', '.join(extra)}.")
        if inputs.is_sequential and not np.any(datum.loss_inputs[RATIO_MASK]):
            raise UserFault(f"{where}: loss_fn_inputs[{RATIO_MASK!r}] marks no token, so its sequence has no ratio.")
        for field, ids in (("model_input", tokens), ("target_tokens", np.asarray(datum.loss_inputs["target_tokens"]))):
            if ids.min() < 0 or (vocabulary is not None and ids.max() >= vocabulary):
                last = "" if vocabulary is None else vocabulary - 1
                raise UserFault(f"{where}: {field} contains a token id outside 0 to {last}.")


def _names(datum: Datum) -> str:
    return ", ".join(sorted(datum.loss_inputs)) or "nothing"
