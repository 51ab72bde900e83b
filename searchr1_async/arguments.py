"""Annotations that check arguments of the public functions."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

from searchr1_async.boundary.paths import absolute_path, as_name_or_folder
from searchr1_async.boundary.settings import as_text, shown_with_kind
from searchr1_async.errors import ConfigurationError
from searchr1_async.search import Search
from searchr1_async.service.connection import ServiceName, is_embedded

TINKER_PATH = "tinker://"


def as_search(name: str, value: Any) -> Search:
    """Checks that a value is a :class:`Search`."""
    if isinstance(value, Search):
        return value
    if inspect.iscoroutine(value):
        value.close()
        raise ConfigurationError(f"{name} is a coroutine: await it first, {name} = await Search.open(…)")
    example = repr(str(value)) if isinstance(value, str | Path) else "'atlas'"
    raise ConfigurationError(
        f"{name} is {shown_with_kind(value)}: pass a Search, such as Search.local({example}) or await Search.open({example})"
    )


GivenSearch = Annotated[Search, as_search]


def as_weights(name: str, value: Any) -> str | Path:
    """A ``tinker://`` path unchanged, a run as its folder, a folder as an absolute path."""
    if isinstance(value, str) and value.startswith(TINKER_PATH):
        return value
    return absolute_path(getattr(value, "out_dir", value), name)


GivenWeights = Annotated[str | Path, as_weights]


def model_name(model: str | Path | None, service: ServiceName) -> str | None:
    """A model's name; on the embedded service a folder becomes absolute, elsewhere it is refused."""
    if model is None or is_embedded(service):
        return None if model is None else as_name_or_folder("model", model)
    if not (text := as_text("model", model)).strip():
        raise ConfigurationError(f"model is {model!r}: pass a name, or leave it out")
    return text
