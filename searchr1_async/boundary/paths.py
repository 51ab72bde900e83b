"""Paths as users give them: made absolute once, at the call, with ``~`` expanded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from searchr1_async.errors import ConfigurationError


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
        raise ConfigurationError(f"{name} is {path!r}, a {type(path).__name__}: give a path as text or as a Path")
    text = os.fspath(path)
    if not isinstance(text, str):
        raise ConfigurationError(f"{name} is {text!r}, which is bytes: give a path as text or as a Path")
    if not text.strip() or "\0" in text:
        raise ConfigurationError(f"{name} is {text!r}: give the path of a file or a folder")
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no such user, no HOME; a current folder that was deleted
        raise ConfigurationError(
            f"{name} is {text!r}, which cannot be made absolute ({error}): give a full path"
        ) from error


def cache_folder() -> Path:
    """The package's folder in the user's cache, which may not exist yet.

    ``searchr1_async`` within ``$XDG_CACHE_HOME`` if that is set, else within the platform's place for caches.

    Raises:
        ConfigurationError: the user's home folder is not known.
    """
    if explicit := os.environ.get("XDG_CACHE_HOME"):
        return absolute_path(explicit, "XDG_CACHE_HOME") / "searchr1_async"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ConfigurationError(
            "the user's home folder is not known, and with it the folder for caches: set HOME, or XDG_CACHE_HOME"
        ) from error
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = home / ".cache"
    return base / "searchr1_async"
