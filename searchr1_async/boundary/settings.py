"""Checks and coerces values of users and files: numbers, flags and texts, and whole settings by their annotations.

``Count``, ``Seconds`` and others are annotations with bounds. An annotation may also name a custom check:
``Annotated[str | Path, as_path]``, where ``as_path(name, value)`` returns the value to use or raises.

numpy and torch scalars are converted, since JSON cannot hold them and writing results would fail after the work is done.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from searchr1_async.errors import ConfigurationError

Check = Callable[[str, Any], Any]
"""Takes an argument's name and value; returns the value to use, or raises :class:`ConfigurationError`."""
Settings = TypeVar("Settings")


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number; None is unbounded."""

    at_least: float | None = None
    over: float | None = None
    at_most: float | None = None


Count = Annotated[int, Range(at_least=1)]
Natural = Annotated[int, Range(at_least=0)]
Seconds = Annotated[float, Range(over=0)]
Positive = Annotated[float, Range(over=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]


def plain(value: Any) -> Any:
    """Converts a scalar of numpy, torch or pandas (or a zero-dimensional array) to Python; returns other values unchanged."""
    if getattr(value, "shape", None) == () and callable(item := getattr(value, "item", None)):
        return item()
    return value


def as_integer(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """An integer.

    Raises:
        ConfigurationError: another type (also ``8.0``, ``"8"`` and ``True``), or out of bounds.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Integral):
        example = 8 if at_least is None else max(1, at_least)
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected an integer, such as {example}")
    _check_bounds(name, int(found), at_least, None, at_most)
    return int(found)


def as_number(
    name: str, value: Any, *, at_least: float | None = None, over: float | None = None, at_most: float | None = None
) -> float:
    """A finite number.

    Raises:
        ConfigurationError: another type (also ``"1e-4"`` and ``True``), infinite or NaN, or out of bounds.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected a number")
    try:
        found = float(found)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ConfigurationError(f"{name} is {shown(value)}: expected a finite number")
    _check_bounds(name, found, at_least, over, at_most)
    return found


def as_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        ConfigurationError: any other value; truthiness of ``"no"`` or ``0`` may not be what was meant.
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected True or False")
    return found


def as_text(name: str, value: Any) -> str:
    """Text that can be encoded.

    Raises:
        ConfigurationError: not text, or it has a lone surrogate, which UTF-8 cannot encode.
    """
    found = plain(value)
    if not isinstance(found, str):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected text")
    if (place := lone_surrogate(found)) is not None:
        raise ConfigurationError(
            f"{name} is {shown(value)}, which has a lone surrogate at {place}: read its file as UTF-8"
        )
    return found


def as_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of several words.

    Raises:
        ConfigurationError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{name} is {shown(value)}: choose one of {', '.join(choices)}")
    return value


def lone_surrogate(text: str) -> int | None:
    """Index of the first lone surrogate, which UTF-8 cannot encode; None if there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def shown(value: Any) -> str:
    """A value's repr for messages, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def shown_with_kind(value: Any) -> str:
    """Like :func:`shown`, with the type: ``8.0 (float)``."""
    return shown(value) if value is None else f"{shown(value)} ({type(value).__name__})"


def _check_bounds(name: str, value: float, at_least: float | None, over: float | None, at_most: float | None) -> None:
    if at_least is not None and value < at_least:
        raise ConfigurationError(f"{name} is {value}: it must be at least {at_least}")
    if over is not None and value <= over:
        raise ConfigurationError(f"{name} is {value}: it must be over {over}")
    if at_most is not None and value > at_most:
        raise ConfigurationError(f"{name} is {value}: it must be at most {at_most}")


def check_settings(settings: Any, prefix: str = "") -> None:
    """Checks a dataclass's fields by their annotations and coerces them in place; call it in ``__post_init__``.

    Args:
        settings: a dataclass instance, possibly frozen.
        prefix: prepended to names in messages: ``"the judge's "``.

    Raises:
        ConfigurationError: naming the field.
    """
    for name, check in _checks_of(type(settings)).items():
        value = getattr(settings, name)
        checked = check(prefix + name, value)
        if checked is not value:
            object.__setattr__(settings, name, checked)


def check_setting(owner: type, field: str, value: Any, name: str) -> Any:
    """Checks and coerces one value by the annotation of a dataclass's field, under another name in messages.

    Raises:
        ConfigurationError: naming ``name``.
    """
    return _checks_of(owner)[field](name, value)


def checked_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks and coerces a call's arguments by the function's annotations; call it first, with ``locals()``.

    Raises:
        ConfigurationError: naming the argument.
    """
    return {name: check(name, given[name]) for name, check in _checks_of(function).items()}


def settings_of(kind: type[Settings], given: Mapping[str, Any], **changed: Any) -> Settings:
    """Builds settings from the arguments with their fields' names, updated by ``changed``."""
    names = [field.name for field in fields(kind) if field.name in given]  # pyright: ignore[reportArgumentType]
    return kind(**{name: given[name] for name in names} | changed)


def list_of(annotation: Any) -> Check:
    """A check for lists of this type, returning a tuple: ``Annotated[Sequence[int], list_of(int)]``."""
    check = _check_for(annotation)

    def as_list(name: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, abc.Iterable):
            raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected a list")
        return tuple(check(f"{name}[{place}]", item) for place, item in enumerate(value))

    return as_list


@dataclass(frozen=True, slots=True)
class _Kind:
    """One alternative of an annotation."""

    wants: str
    """The expected type, in words; empty if anything is accepted."""
    fits: Callable[[Any], bool]
    """Whether a value has this type, within its bounds or not."""
    check: Check


@cache
def _checks_of(owner: Any) -> dict[str, Check]:
    """The check of each field of a dataclass, or parameter of a function."""
    hints = get_type_hints(owner, include_extras=True)
    names = (
        [field.name for field in fields(owner)] if is_dataclass(owner) else list(inspect.signature(owner).parameters)
    )
    return {name: _check_for(hints[name]) for name in names if name in hints}


def _check_for(annotation: Any) -> Check:
    members = _members(annotation)
    kinds = [_kind_of(member) for member in members if member is not NoneType]
    is_optional = len(kinds) < len(members)
    if any(not kind.wants for kind in kinds):  # checked elsewhere
        return lambda name, value: _first_fitting(kinds, name, value)
    wants = " or ".join([kind.wants for kind in kinds] + ["None"] * is_optional)

    def check(name: str, value: Any) -> Any:
        if value is None and is_optional:
            return None
        if len(kinds) > 1 and not any(kind.fits(value) for kind in kinds):
            raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected {wants}")
        return _first_fitting(kinds, name, value)

    return check


def _first_fitting(kinds: list[_Kind], name: str, value: Any) -> Any:
    return next((kind for kind in kinds if kind.fits(value)), kinds[-1]).check(name, value)


def _members(annotation: Any) -> list[Any]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return [inner for member in get_args(annotation) for inner in _members(member)] if is_union else [annotation]


def _kind_of(annotation: Any) -> _Kind:
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *marks = get_args(annotation)
        for mark in marks:
            if isinstance(mark, Range):
                bounds = {name: value for name in Range.__slots__ if (value := getattr(mark, name)) is not None}
                kind = _NUMBERS[base]
                return _Kind(kind.wants, kind.fits, partial(kind.check, **bounds))
            if callable(mark):
                return _Kind("another value", lambda value: value is not None, mark)
        return _kind_of(base)
    if annotation in _NUMBERS:
        return _NUMBERS[annotation]
    if origin is Literal:
        choices = list(get_args(annotation))
        wants = f"one of {', '.join(map(repr, choices))}" if len(choices) > 1 else repr(choices[0])
        return _Kind(
            wants, lambda value: isinstance(value, str) and value in choices, partial(as_choice, choices=choices)
        )
    if origin is abc.Callable:
        return _Kind("a function", callable, partial(_instance, callable, "a function"))
    if origin is abc.Mapping:
        is_mapping = partial(_is_instance, Mapping)
        check = as_numbers if annotation == Mapping[str, float] else partial(_instance, is_mapping, "a dict")
        return _Kind("a dict", is_mapping, check)
    if isinstance(annotation, type) and annotation is not Any and not getattr(annotation, "_is_protocol", False):
        wants = f"an instance of {annotation.__name__}"
        is_one = partial(_is_instance, annotation)
        return _Kind(wants, is_one, partial(_instance, is_one, wants))
    return _Kind("", lambda value: True, lambda name, value: value)


_NUMBERS: dict[Any, _Kind] = {
    bool: _Kind("True or False", lambda value: isinstance(plain(value), bool), as_flag),
    int: _Kind("an integer", lambda value: isinstance(plain(value), numbers.Integral), as_integer),
    float: _Kind("a number", lambda value: isinstance(plain(value), numbers.Real), as_number),
    str: _Kind("text", lambda value: isinstance(plain(value), str), as_text),
}


def _is_instance(kind: type, value: Any) -> bool:
    return isinstance(value, kind)


def _instance(is_one: Callable[[Any], bool], wants: str, name: str, value: Any) -> Any:
    if not is_one(value):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected {wants}")
    return value


def as_numbers(name: str, value: Any) -> dict[str, float]:
    """Finite numbers by name. Raises ConfigurationError."""
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{name} is {shown_with_kind(value)}: expected a dict of numbers by name")
    return {as_text(f"a name in {name}", key): as_number(f"{name}[{key!r}]", each) for key, each in value.items()}
