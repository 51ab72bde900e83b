"""The settings of a whole piece of work as one frozen value: written flat, read by concern, kept as TOML or JSON.

::

    config = TrainConfig(group_size=8, steps=12, learning_rate=1e-4)
    config.batch.group_size
    config.replace(group_size=4)
    TrainConfig.from_toml(config.to_toml()) == config
"""

# ruff: noqa: RUF009 (the concerns are frozen: one default serves all)

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, ParamSpec, Self, TypeVar, get_args, get_type_hints

from searchr1_async.boundary.paths import absolute_path, write_atomically
from searchr1_async.boundary.settings import Count, as_flag, check_setting, list_of, shown_with_kind
from searchr1_async.config.concerns import (
    BatchSettings,
    CheckpointSettings,
    CostSettings,
    EpisodeSettings,
    FaultSettings,
    HeldOutSettings,
    LearningSettings,
    LengthSettings,
    LocalOptions,
    Method,
    ModelSettings,
    PipelineSettings,
    SamplingSettings,
    ScoringSettings,
    SelectionSettings,
    WarmUp,
)
from searchr1_async.config.sizes import LAPTOP, RECIPE
from searchr1_async.errors import ConfigurationError

P = ParamSpec("P")
R = TypeVar("R")

_NONE = "none"
"""How TOML, which has no null, writes None where the default is another value."""


class Place(NamedTuple):
    """Where a setting is kept: in a concern of a config, or in the config itself."""

    concern: str | None
    field: str


@cache
def places_of(kind: type[Config]) -> dict[str, Place]:
    """The place of every flat name of a kind of config. A name of two concerns is left out."""
    found: dict[str, list[Place]] = {}
    for own in fields(kind):
        if not is_dataclass(own.default):
            found.setdefault(own.name, []).append(Place(None, own.name))
            continue
        for each in fields(own.default):
            found.setdefault(each.metadata.get("flat", each.name), []).append(Place(own.name, each.name))
    return {name: places[0] for name, places in found.items() if len(places) == 1}


@dataclass(frozen=True, init=False, repr=False)
class Config:
    """A frozen value of settings by concern.

    Created with flat names, with concerns (``batch=BatchSettings(…)``), or with tables (``batch={"group_size": 8}``).

    Raises:
        ConfigurationError: an unknown name, or a value out of range; it names the setting.
    """

    def __init__(self, **settings: Any) -> None:
        self._set({each.name: each.default for each in fields(self)}, settings)

    def replace(self, **settings: Any) -> Self:
        """A copy with these settings changed; names and errors as in the constructor."""
        changed = object.__new__(type(self))
        changed._set({each.name: getattr(self, each.name) for each in fields(self)}, settings)
        return changed

    def flat(self) -> dict[str, Any]:
        """All settings by their flat names."""
        return {
            name: getattr(self if concern is None else getattr(self, concern), own)
            for name, (concern, own) in places_of(type(self)).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Tables of plain values, by concern."""
        return asdict(self)

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads :meth:`to_json`, or any part of it; the rest has its defaults.

        Raises:
            ConfigurationError: not JSON, or as the constructor.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigurationError(f"the settings are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigurationError(f"the settings are {shown_with_kind(values)}: expected an object")
        return cls(**values)

    def to_toml(self) -> str:
        """As TOML, one table per concern."""
        return "\n".join(_toml(self.to_dict(), type(self)().to_dict())).lstrip("\n") + "\n"

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Reads :meth:`to_toml`, or any part of it; the rest has its defaults. Flat names may stand above the tables.

        Raises:
            ConfigurationError: not TOML, or as the constructor.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"the settings are not TOML: {error}") from error
        return cls(**_with_none(values, cls().to_dict()))

    def save(self, path: str | Path) -> None:
        """Writes a TOML file atomically. Raises OSError."""
        write_atomically(absolute_path(path), self.to_toml().encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a ``.toml`` or ``.json`` file.

        Raises:
            ConfigurationError: it cannot be read, or as the constructor.
        """
        path = absolute_path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot read the settings {path}: {error}") from error
        return cls.from_json(text) if path.suffix == ".json" else cls.from_toml(text)

    def __repr__(self) -> str:
        usual = type(self)().flat()
        other = ", ".join(f"{name}={value!r}" for name, value in self.flat().items() if value != usual[name])
        return f"{type(self).__name__}({other})"

    def _set(self, values: dict[str, Any], settings: Mapping[str, Any]) -> None:
        kind, changes = type(self), dict[str, dict[str, Any]]()
        for name, value in settings.items():
            is_concern = is_dataclass(values.get(name))
            if is_concern and (isinstance(value, type(values[name])) or (value is None and name == "local")):
                values[name] = values[name] if value is None else value
            elif is_concern and isinstance(value, Mapping):
                changes.setdefault(name, {}).update(_from_table(type(values[name]), name, value))
            elif (place := places_of(kind).get(name)) is not None:
                concern, own = place
                owner = kind if concern is None else type(values[concern])
                checked = _checked(owner, own, name, value)
                if concern is None:
                    values[name] = checked
                else:
                    changes.setdefault(concern, {})[own] = checked
            elif is_concern:
                check_setting(kind, name, value, name)  # raises
            elif name == "switch_weights_in_flight" and kind is TrainConfig:
                changes.setdefault("pipeline", {})["weights_in_flight"] = _of_deprecated(value)
            else:
                raise ConfigurationError(_unknown(kind, name))
        for name, changed in changes.items():
            values[name] = replace(values[name], **changed)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_relations()

    def _check_relations(self) -> None:
        """Refuses settings that contradict each other."""


def takes_config(kind: type[Config], **renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function with a ``config`` parameter refuse settings passed as its own keywords, saying where they belong.

    Args:
        renamed: earlier keywords, with what to pass instead.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def called(*args: P.args, **keywords: P.kwargs) -> R:
            for name in keywords.keys() & renamed.keys():
                raise ConfigurationError(f"{name}: pass {renamed[name]} instead")
            settings = {*places_of(kind), *(each.name for each in fields(kind))}
            misplaced = [name for name in keywords if name not in parameters and name in settings]
            if misplaced:
                names = ", ".join(f"{name}=…" for name in misplaced)
                raise ConfigurationError(
                    f"{', '.join(misplaced)}: a setting belongs in the config: "
                    f"{function.__name__}(…, config=sr.config.{kind.__name__}({names}))"
                )
            return function(*args, **keywords)

        return called

    return decorate


def _of_deprecated(switches: Any) -> str:
    switches = as_flag("switch_weights_in_flight", switches)
    text = 'switch_weights_in_flight is deprecated: use weights_in_flight="inflight" or "snapshot"'
    warnings.warn(text, DeprecationWarning, stacklevel=4)
    return "inflight" if switches else "snapshot"


def _unknown(kind: type[Config], name: str) -> str:
    tables = [each.name for each in fields(kind) if is_dataclass(each.default)]
    close = difflib.get_close_matches(name, [*places_of(kind), *tables], 3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"see the fields of its concerns {', '.join(tables)}"
    return f"{kind.__name__} has no setting {name!r}: {hint}"


def _from_table(concern: type, table: str, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(concern)}
    if unknown := sorted(values.keys() - names):
        raise ConfigurationError(f"{table} has no setting {unknown[0]!r}: it has {', '.join(sorted(names))}")
    return {name: _checked(concern, name, f"{table}.{name}", value) for name, value in values.items()}


def _checked(owner: type, own: str, name: str, value: Any) -> Any:
    """A setting's value, checked; a table becomes the dataclass that it stands for (``warm_up``, ``price``)."""
    if isinstance(value, Mapping) and (kind := _value_type(owner, own)) is not None:
        needed = [each.name for each in fields(kind) if each.default is each.default_factory is MISSING]
        if lacking := [each for each in needed if each not in value]:
            raise ConfigurationError(f"{name} has no {' and no '.join(lacking)}: it needs {', '.join(needed)}")
        value = kind(**_from_table(kind, name, value))
    return check_setting(owner, own, value, name)


@cache
def _value_type(owner: type, own: str) -> Any:
    return next((member for member in get_args(get_type_hints(owner)[own]) if is_dataclass(member)), None)


def _toml(table: Mapping[str, Any], usual: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """The lines of a table: its own values, then its tables."""
    tables = {name: value for name, value in table.items() if isinstance(value, Mapping)}
    if path and (len(tables) < len(table) or not table):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for name, value in table.items():
        if value is None and usual.get(name) is not None:
            value = _NONE
        if value is not None and name not in tables:
            yield f"{_key(name)} = {_toml_value(value)}"
    for name, value in tables.items():
        yield from _toml(value, usual.get(name) or {}, (*path, name))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_toml_value, value))}]"
    # Strings, numbers and booleans are written as in JSON, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _with_none(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of what :func:`_toml` does with None."""
    return {
        name: _with_none(value, usual.get(name) or {})
        if isinstance(value, Mapping)
        else None
        if value == _NONE and isinstance(usual.get(name), int)
        else value
        for name, value in values.items()
    }


@dataclass(frozen=True, init=False, repr=False)
class AskConfig(Config):
    """Settings of :func:`searchr1_async.ask`: greedy, with a shorter deadline than in training, since a person waits."""

    model: ModelSettings = ModelSettings()
    episode: EpisodeSettings = EpisodeSettings()
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, deadline=600.0)
    local: LocalOptions = LocalOptions()


@dataclass(frozen=True, init=False, repr=False)
class RolloutConfig(Config):
    """Settings of :func:`searchr1_async.rollout`. Open episode settings are those of the run whose weights are used."""

    group_size: Count = 8
    """Episodes per question."""
    model: ModelSettings = ModelSettings()
    episode: EpisodeSettings = EpisodeSettings()
    sampling: SamplingSettings = SamplingSettings()
    faults: FaultSettings = FaultSettings()
    local: LocalOptions = LocalOptions()


@dataclass(frozen=True, init=False, repr=False)
class EvalConfig(Config):
    """Settings of :func:`searchr1_async.evaluate`.

    Open episode settings: a run uses those of its training; the base model those of the evaluated runs if they agree; a baseline
    keeps its own prompt and the default limits; without runs, the recipe's defaults apply. The same holds for the number and length
    of passages if ``search`` does not set them. Differences from training are listed in the report's notes. A run's episode time
    limit does not apply.
    """

    label: str = "evaluation"
    """Label of the system, if there is one without a label."""
    baselines: Annotated[Sequence[Method], list_of(Method)] = ()
    """Additional systems that use the base model in other ways: ``direct``, ``rag``, ``recipe`` (the last needs
    ``pip install 'searchr1_async[recipe]'``); see :class:`~searchr1_async.evaluation.systems.System`."""
    selection: SelectionSettings = SelectionSettings()
    model: ModelSettings = ModelSettings()
    episode: EpisodeSettings = EpisodeSettings()
    sampling: SamplingSettings = SamplingSettings(seed=0, max_episodes_in_flight=1024)
    scoring: ScoringSettings = ScoringSettings()
    faults: FaultSettings = FaultSettings()
    local: LocalOptions = LocalOptions()


@dataclass(frozen=True, init=False, repr=False)
class TrainConfig(Config):
    """Settings of :func:`searchr1_async.train`. Defaults are those of the Search-R1 recipe of tinker-cookbook; sizes left at None are
    chosen by the service, a laptop's on the embedded one."""

    warm_up: WarmUp | None = None
    """A supervised warm-up on demonstrations; None for none."""
    model: ModelSettings = ModelSettings()
    episode: EpisodeSettings = EpisodeSettings()
    sampling: SamplingSettings = SamplingSettings(seed=2)
    """Its seed also orders the questions, draws the demonstrations and initialises the adapter."""
    batch: BatchSettings = BatchSettings()
    learning: LearningSettings = LearningSettings()
    pipeline: PipelineSettings = PipelineSettings()
    length: LengthSettings = LengthSettings()
    evaluation: HeldOutSettings = HeldOutSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    scoring: ScoringSettings = ScoringSettings()
    faults: FaultSettings = FaultSettings()
    cost: CostSettings = CostSettings()
    local: LocalOptions = LocalOptions()

    @classmethod
    def search_r1(cls) -> Self:
        """The recipe with its sizes: 512 groups of 8 episodes per batch, whatever the service."""
        return cls(**asdict(RECIPE))

    @classmethod
    def laptop(cls) -> Self:
        """Sizes for the embedded service on a laptop: 12 steps of 8 groups of 8 episodes."""
        return cls(**asdict(LAPTOP))

    @property
    def seed(self) -> int:
        """The run's seed."""
        assert self.sampling.seed is not None, "checked when created"
        return self.sampling.seed

    def _check_relations(self) -> None:
        batch, min_members = self.batch, self.pipeline.min_members
        if self.sampling.seed is None:
            raise ConfigurationError("seed is None: a training run needs an integer, which orders its questions")
        steps, groups = self.learning.optimizer_steps, batch.groups_per_batch
        if groups is not None and steps > groups:
            raise ConfigurationError(f"optimizer_steps ({steps}) must not exceed groups_per_batch ({groups})")
        if batch.group_size is not None and min_members > batch.group_size:
            raise ConfigurationError(
                f"min_members ({min_members}) is above group_size ({batch.group_size}): no group would be trained on"
            )
        if self.pipeline.refill_groups and not batch.drop_constant_groups:
            raise ConfigurationError("refill_groups replaces dropped groups: it needs drop_constant_groups=True")
        if self.checkpoints.keep_best and self.evaluation.evaluate_every is None:
            raise ConfigurationError("keep_best needs evaluate_every: it selects among the evaluated steps")
