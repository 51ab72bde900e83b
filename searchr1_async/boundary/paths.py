"""Paths as users give them: made absolute once, at the call, with ``~`` expanded."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from searchr1_async.boundary.values import as_text, shown, shown_with_kind
from searchr1_async.errors import ConfigurationError

logger = logging.getLogger(__name__)

_LONGEST_NAME = 255
"""Bytes in the name of one file or folder, on all common file systems."""


def absolute_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The absolute path that a user means, so that a later ``chdir`` changes nothing.

    Links and ``..`` stay as they are, and no character is a wildcard.

    Args:
        path: relative paths are below the current folder; ``~`` and ``~user`` are home folders.
        name: of the argument, for messages.

    Raises:
        ConfigurationError: no path, an empty one, or one whose home folder or current folder is not known.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError(f"{name} is {shown_with_kind(path)}: give a path as text or as a Path")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise ConfigurationError(f"{name} is {text!r}, which is bytes: give a path as text or as a Path")
    if not text.strip() or "\0" in text:
        raise ConfigurationError(f"{name} is {text!r}: give the path of a file or a folder")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{name} is {text!r}, which holds half a character (a lone surrogate) at {error.start}: no file has such a name"
        ) from None
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(text).parts):
        raise ConfigurationError(
            f"{name} is {shown(text)}, which holds a name of more than {_LONGEST_NAME} bytes: no file has such a name"
        )
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no such user, no HOME; a current folder that was deleted
        raise ConfigurationError(
            f"{name} is {text!r}, which cannot be made absolute ({error}): give a full path"
        ) from error


def as_path(name: str, value: Any) -> Path:
    """:func:`absolute_path` as the check of an annotation (:mod:`~searchr1_async.boundary.settings`)."""
    return absolute_path(value, name)


def path_argument(text: str) -> Path:
    """:func:`absolute_path` as the type of a command's option."""
    try:
        return absolute_path(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


FilePath = Annotated[str | Path, as_path]
"""Of a file or a folder."""


def folder_at(text: str) -> Path | None:
    """The absolute path of a folder; None where there is none of this name, as for a model on a hub."""
    try:
        folder = absolute_path(text)
        return folder if folder.is_dir() else None
    except (ConfigurationError, OSError):  # blank, or too long for a path
        return None


def as_name_or_folder(name: str, value: Any) -> str:
    """The name of a model or of a tokenizer, or the absolute path of its folder on this machine.

    Text is a folder where there is one of this name, or where it begins as a path does: ``~``, ``/``, ``./``, ``../``.

    Raises:
        ConfigurationError: it is blank, neither text nor a path, or the path of no folder.
    """
    if not isinstance(value, os.PathLike):
        value = as_text(name, value)
        if not value.strip():
            raise ConfigurationError(f"{name} is {value!r}: give a name or a folder, or leave it out")
        if not value.startswith(("~", "/", "./", "../")) and folder_at(value) is None:
            return value
    folder = absolute_path(value, name)
    if not folder.is_dir():
        raise ConfigurationError(f"{name} is {os.fspath(value)!r}, and there is no folder {folder}")
    return str(folder)


def shown_name(name: str) -> str:
    """What :func:`as_name_or_folder` returned, for people: the name, or the last part of the folder's path."""
    return Path(name).name if Path(name).is_absolute() else name


def shown_path(path: str | Path) -> str:
    """An absolute path for people: relative, where it lies in the current folder."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


NameOrFolder = Annotated[str | Path, as_name_or_folder]


def is_same_place(one: str, other: str) -> bool:
    """Whether two texts are the same path from the current folder, or the same name."""
    return one == other or absolute_path(one) == absolute_path(other)


def cache_folder() -> Path:
    """The package's folder in the user's cache, made if need be.

    It is ``searchr1_async`` within ``$XDG_CACHE_HOME`` if that is set, else within the platform's place for caches. Without a home
    folder that can be written it is one for this user among the temporary files; that is said once.

    Raises:
        ConfigurationError: no folder can be made there.
    """
    if explicit := os.environ.get("XDG_CACHE_HOME"):
        folder = absolute_path(explicit, "XDG_CACHE_HOME") / "searchr1_async"
        if problem := _problem_of(folder):
            raise ConfigurationError(
                f"XDG_CACHE_HOME is {explicit!r}, where no folder can be made ({problem}): set it to one that can be written"
            )
        return folder
    try:
        folder = _platform_cache() / "searchr1_async"
    except RuntimeError:
        return _temporary_cache("the user's home folder is not known")
    problem = _problem_of(folder)
    return folder if problem is None else _temporary_cache(f"{folder} cannot be made ({problem})")


def _platform_cache() -> Path:
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return home.absolute() / ".cache"


def _problem_of(folder: Path) -> str | None:
    """Why a folder cannot be made; None where it exists. One that cannot be written can still be read."""
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return None


@cache
def _temporary_cache(reason: str) -> Path:
    owner = os.getuid() if hasattr(os, "getuid") else "cache"
    advice = "set XDG_CACHE_HOME to a folder that stays and can be written"
    try:
        folder = Path(tempfile.gettempdir()).absolute() / f"searchr1_async-{owner}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigurationError(f"there is no folder for caches: {reason}, nor {error}: {advice}") from error
    if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != owner):
        raise ConfigurationError(f"there is no folder for caches: {reason}, and {folder} is another user's: {advice}")
    logger.warning("%s: indexes and models are kept in %s, which may not last: %s", reason, folder, advice)
    return folder
