"""How large a run is where its user does not say: the recipe's sizes, or those that a laptop can play to their end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a run, as :func:`searchr1_async.train` takes them; ``steps=None`` is all batches of ``epochs``."""

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
"""Of the Search-R1 recipe of tinker-cookbook."""
LAPTOP = Sizes(
    group_size=8,
    groups_per_batch=8,
    minibatches=4,
    steps=12,
    max_turns=3,
    max_tokens=64,
    max_trajectory_tokens=4096,
)
"""On the embedded service: 768 episodes, where the recipe's 4,096 a step take two cores most of a day."""


def chosen_sizes(
    given: Mapping[str, Any], *, questions: int, is_embedded: bool, begun: Mapping[str, Any] | None = None
) -> Sizes:
    """The sizes of a run.

    Args:
        given: the arguments of :func:`searchr1_async.train`, None where the user names no size.
        questions: to train on; a run of a laptop's steps plays each once at most.
        is_embedded: on the embedded service.
        begun: the settings of the run that this one goes on with: its sizes hold.
    """
    own = {**(begun or {}).get("limits", {}), **(begun or {}).get("learning", {})}
    known = {**own, **{name: value for name, value in given.items() if value is not None}}
    default = LAPTOP if is_embedded else RECIPE
    names = [field.name for field in fields(Sizes) if field.name != "steps"]
    sizes = replace(default, steps=given.get("steps"), **{name: known[name] for name in names if name in known})
    if "minibatches" not in known:
        sizes = replace(sizes, minibatches=min(sizes.minibatches, sizes.groups_per_batch))
    says_nothing = all(given.get(name) is None for name in ("steps", "groups_per_batch", "epochs", "time_limit"))
    # A run that was begun with another batch was begun to play its epochs.
    if not says_nothing or default.steps is None or sizes.groups_per_batch != default.groups_per_batch:
        return sizes
    return replace(sizes, steps=default.steps) if questions > default.steps * sizes.groups_per_batch else sizes
