"""Checks and coerces values of users and files by annotations, with pydantic: arguments, and the settings of a dataclass.

An annotation may name a check of its own: ``Annotated[str | Path, as_path]``, where ``as_path(name, value)`` returns the value to use
or raises. Scalars of numpy and torch are converted, since JSON cannot hold them and writing results would fail after the work is done.
"""

from __future__ import annotations

import inspect
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import FunctionType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from searchr1_async.errors import ConfigurationError

Settings = TypeVar("Settings")
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_TYPE_ERRORS = ("_type", "literal_error", "is_instance_of")
"""Endings of pydantic's errors for a value of another kind, which say nothing once another alternative fits its kind."""


def plain(value: Any) -> Any:
    """Converts a scalar of numpy, torch or pandas (or a zero-dimensional array) to Python; returns other values unchanged."""
    if getattr(value, "shape", None) == () and callable(item := getattr(value, "item", None)):
        return item()
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


def check(name: str, value: Any, annotation: Any) -> Any:
    """The value to use where this annotation is expected (an ``int`` is no ``bool`` and no text); raises ConfigurationError, naming it."""
    return _check(name, value, _adapter(annotation))


def check_settings(settings: Any, prefix: str = "") -> None:
    """Checks a dataclass's fields by their annotations, and coerces them in place. Raises ConfigurationError, naming ``prefix`` and field."""
    for name, adapter in _adapters(type(settings)).items():
        value = getattr(settings, name)
        checked = _check(prefix + name, value, adapter)
        if checked is not value:
            object.__setattr__(settings, name, checked)


def check_setting(owner: type, field: str, value: Any, name: str) -> Any:
    """Checks and coerces one value by the annotation of a dataclass's field. Raises ConfigurationError, naming ``name``."""
    return _check(name, value, _adapters(owner)[field])


def checked_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks and coerces the arguments (``locals()``) of a call by its annotations. Raises ConfigurationError, naming the argument."""
    return {name: _check(name, given[name], adapter) for name, adapter in _adapters(function).items()}


def settings_of(kind: type[Settings], given: Mapping[str, Any], **changed: Any) -> Settings:
    """Builds settings from the arguments with their fields' names, updated by ``changed``."""
    names = [field.name for field in fields(kind) if field.name in given]  # pyright: ignore[reportArgumentType]
    return kind(**{name: given[name] for name in names} | changed)


@cache
def _adapters(owner: Any) -> dict[str, TypeAdapter[Any]]:
    """The adapter of each field of a dataclass, or parameter of a function."""
    hints = get_type_hints(owner, include_extras=True)
    names = (
        [field.name for field in fields(owner)] if is_dataclass(owner) else list(inspect.signature(owner).parameters)
    )
    return {name: _adapter(hints[name]) for name in names if name in hints}


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_checked_type(annotation), config=None if is_dataclass(annotation) else _STRICT)


def _checked_type(annotation: Any) -> Any:
    """The annotation as pydantic should read it: objects by their class alone, and nothing of what only its user can check."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return Union[tuple(map(_checked_type, inner))]  # noqa: UP007
    if origin is Annotated:
        own = next((mark for mark in inner[1:] if isinstance(mark, FunctionType)), None)
        return annotation if own is None else Annotated[Any, PlainValidator(_by(own))]
    if origin is abc.Sequence:
        return Annotated[abc.Sequence[_checked_type(inner[0])], AfterValidator(tuple)]
    is_table = annotation in (abc.Mapping[str, float], abc.Mapping[str, str])
    if is_table or origin in (Literal, abc.Callable) or annotation in (bool, int, float, str, type(None)):
        return annotation
    if origin is abc.Mapping:
        return InstanceOf[abc.Mapping]
    is_class = isinstance(annotation, type) and origin is None and annotation is not Any
    return InstanceOf[annotation] if is_class and not getattr(annotation, "_is_protocol", False) else Any


def _by(check: Callable[[str, Any], Any]) -> Callable[[Any, ValidationInfo], Any]:
    return lambda value, info: check(str(info.context), value)


def _check(name: str, value: Any, adapter: TypeAdapter[Any]) -> Any:
    found = plain(value)
    if isinstance(found, str) and (place := lone_surrogate(found)) is not None:
        raise ConfigurationError(
            f"{name} is {shown(value)}, which has a lone surrogate at {place}: read its file as UTF-8"
        )
    try:
        return adapter.validate_python(found, context=name)
    except ValidationError as error:
        errors = error.errors()
    for each in errors:
        if isinstance(own := each.get("ctx", {}).get("error"), ConfigurationError):
            raise own
    errors = [each for each in errors if not each["type"].endswith(_TYPE_ERRORS)] or errors
    if len(errors) == 1 and errors[0]["loc"] and errors[0]["input"] is not found:
        name, found = name + "".join(f"[{place!r}]" for place in errors[0]["loc"]), errors[0]["input"]
    kinds = ("a list" if each["type"] == "sequence_str" else each["msg"] for each in errors)
    wanted = " or ".join(dict.fromkeys(kind.removeprefix("Input should be ") for kind in kinds))
    raise ConfigurationError(f"{name} is {shown_with_kind(found)}: it should be {wanted}")
