"""The embedded Tinker service: a local server that speaks the Tinker protocol and runs its own model.

Start it with :func:`local_service` and pass its URL and key to ``tinker.ServiceClient``. Importing this package loads
neither torch nor a model.
"""

from __future__ import annotations

from searchr1_async.local.model_files import DEFAULT_MODEL
from searchr1_async.local.process import LocalService, Scripted, listener_at, local_service

__all__ = ["DEFAULT_MODEL", "LocalService", "Scripted", "listener_at", "local_service"]
