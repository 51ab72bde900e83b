"""The base of all configs: one frozen value, written flat, read by concern, kept as TOML.

::

    config = TrainConfig(group_size=8, steps=12, learning_rate=1e-4)
    config.batch.group_size
    config.replace(group_size=4)
    TrainConfig.from_toml(config.to_toml()) == config
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

from searchr1_async.boundary.paths import absolute_path, write_atomically
from searchr1_async.boundary.settings import check_setting
from searchr1_async.errors import ConfigurationError

_NONE = "none"
"""How TOML, which has no null, writes None where the default is another value."""


Place = tuple[str | None, str]
"""Where a setting is kept: its concern (None: the config itself), and its field."""


@cache
def places_of(kind: type[Config]) -> dict[str, Place]:
    """The place of every flat name of a kind of config."""
    found: dict[str, Place] = {}
    for own in fields(kind):
        if is_dataclass(own.default):
            found |= {each.metadata.get("flat", each.name): (own.name, each.name) for each in fields(own.default)}
        else:
            found[own.name] = (None, own.name)
    return found


class _FlatSignature:
    """The signature of a kind of config, for editors: its settings by their flat names, each with its type and default."""

    def __get__(self, config: Config | None, kind: type[Config]) -> inspect.Signature:
        defaults, parameters = kind().flat(), []
        for name, (concern, own) in places_of(kind).items():
            hint = get_type_hints(kind if concern is None else type(getattr(kind, concern)))[own]
            only = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, only, default=defaults[name], annotation=hint))
        return inspect.Signature(parameters)


@dataclass(frozen=True, init=False, repr=False)
class Config:
    """A frozen value of settings by concern.

    Created with flat names, with concerns (``batch=BatchSettings(…)``), or with tables (``batch={"group_size": 8}``).

    Raises:
        ConfigurationError: an unknown name, or a value out of range; it names the setting.
    """

    __signature__ = _FlatSignature()

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

    def to_toml(self) -> str:
        """As TOML, one table per concern."""
        return "\n".join(_toml(self.to_dict(), type(self)().to_dict())).lstrip("\n") + "\n"

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Reads :meth:`to_toml`, or any part of it; flat names may stand above the tables. Raises ConfigurationError."""
        try:
            return cls(**_with_none(tomllib.loads(text), cls().to_dict()))
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"the settings are not TOML: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes a TOML file atomically. Raises OSError."""
        write_atomically(absolute_path(path), self.to_toml().encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a TOML file. Raises ConfigurationError: it cannot be read, or as the constructor."""
        path = absolute_path(path)
        try:
            return cls.from_toml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read the settings {path}: {error}") from error

    def __repr__(self) -> str:
        usual = type(self)().flat()
        other = ", ".join(f"{name}={value!r}" for name, value in self.flat().items() if value != usual[name])
        return f"{type(self).__name__}({other})"

    def _set(self, values: dict[str, Any], settings: Mapping[str, Any]) -> None:
        kind, changes = type(self), dict[str, dict[str, Any]]()
        for name, value in settings.items():
            concern, own = places_of(kind).get(name, (None, name))
            if is_dataclass(values.get(name)) and isinstance(value, Mapping):
                changes.setdefault(name, {}).update(_from_table(type(values[name]), name, value))
            elif concern is not None:
                owner = type(values[concern])
                changes.setdefault(concern, {})[own] = _checked(owner, own, name, value)
            elif name in values:
                values[name] = _checked(kind, name, name, value)
            else:
                raise ConfigurationError(_unknown(kind, name))
        for name, changed in changes.items():
            values[name] = replace(values[name], **changed)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_relations()

    def _check_relations(self) -> None:
        """Refuses settings that contradict each other."""


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
        try:
            value = kind(**_from_table(kind, name, value))
        except TypeError as error:  # a field without a default is missing
            raise ConfigurationError(f"{name}: {error}") from None
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

    def read(name: str, value: Any) -> Any:
        own = usual.get(name)
        if isinstance(value, Mapping):
            return _with_none(value, own if isinstance(own, Mapping) else {})
        return None if value == _NONE and isinstance(own, int) else value

    return {name: read(name, value) for name, value in values.items()}
