"""Default sizes of a run: the recipe's, or a laptop's on the embedded service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from searchr1_async.config.concerns import LearningSettings


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a run, named as its settings; ``steps=None`` is all batches of ``epochs``."""

    group_size: int
    groups_per_batch: int
    minibatches: int
    steps: int | None
    max_turns: int
    max_tokens: int
    max_trajectory_tokens: int
    epochs: int = 1

    def __str__(self) -> str:
        steps = "" if self.steps is None else f"{self.steps} steps of "
        return (
            f"{steps}{self.groups_per_batch} groups of {self.group_size} episodes, at most {self.max_turns} turns of "
            f"{self.max_tokens} tokens"
        )


RECIPE = Sizes(
    group_size=8,
    groups_per_batch=512,
    minibatches=4,
    steps=None,
    max_turns=5,
    max_tokens=1024,
    max_trajectory_tokens=32 * 1024,
)
"""Sizes of the Search-R1 recipe of tinker-cookbook."""
LAPTOP = Sizes(
    group_size=8,
    groups_per_batch=8,
    minibatches=4,
    steps=12,
    max_turns=3,
    max_tokens=64,
    max_trajectory_tokens=4096,
)
"""Sizes on the embedded service: 768 episodes; one step of the recipe has 4,096, most of a day on two cores."""


@dataclass(frozen=True, slots=True)
class RunLearning(LearningSettings):
    """The learning settings of a run with its sizes, all of them chosen; each is documented at its concern."""

    lora_rank: int = 32
    group_size: int = 8
    groups_per_batch: int = 512
    minibatches: int = 4
    drop_constant_groups: bool = True
    steps: int | None = None
    epochs: int = 1
    seed: int = 2
    checkpoint_every: int = 20
    max_failed_fraction: float = 0.2


def chosen_sizes(
    given: Mapping[str, Any], *, questions: int, is_embedded: bool, begun: Mapping[str, Any] | None = None
) -> Sizes:
    """The sizes of a run.

    Args:
        given: the settings by their flat names; None: not set.
        questions: number of training questions; a run with the laptop's default steps uses each at most once.
        is_embedded: on the embedded service.
        begun: recorded settings of the run to resume, whose sizes apply.
    """
    own = {**(begun or {}).get("limits", {}), **(begun or {}).get("learning", {})}
    known = {**own, **{name: value for name, value in given.items() if value is not None}}
    default = LAPTOP if is_embedded else RECIPE
    names = [field.name for field in fields(Sizes) if field.name != "steps"]
    sizes = replace(default, steps=given.get("steps"), **{name: known[name] for name in names if name in known})
    if "minibatches" not in known:
        sizes = replace(sizes, minibatches=min(sizes.minibatches, sizes.groups_per_batch))
    says_nothing = all(given.get(name) is None for name in ("steps", "groups_per_batch", "epochs", "time_limit"))
    # A run started with another batch size was started to complete its epochs.
    if not says_nothing or default.steps is None or sizes.groups_per_batch != default.groups_per_batch:
        return sizes
    return replace(sizes, steps=default.steps) if questions > default.steps * sizes.groups_per_batch else sizes
