"""Where generated things are kept between runs: one folder of the user, never the working directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The package's folder in the user's cache, which may not exist yet.

    ``searchr1_async`` within ``$XDG_CACHE_HOME`` if that is set, else within the platform's place for caches.
    """
    if explicit := os.environ.get("XDG_CACHE_HOME"):
        base = Path(explicit)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    return base / "searchr1_async"
