"""The embedded Tinker service: a server that speaks the Tinker protocol, with a model of its own behind it.

Reached only through the ``tinker`` SDK, like the cloud: start it with :func:`local_service` and hand its URL and key to
``tinker.ServiceClient``. Importing this package loads neither torch nor a model.
"""

from __future__ import annotations

from searchr1_async.local.process import DEFAULT_MODEL, LocalService, Scripted, local_service

__all__ = ["DEFAULT_MODEL", "LocalService", "Scripted", "local_service"]
