"""Tinker's protobuf messages, without importing the rest of ``tinker``.

``import tinker`` imports torch, which takes seconds and which a scripted service does not need. Unless ``tinker`` is
already imported, the self-contained generated module is loaded from its file. Loading it twice is safe: protobuf keeps
one class per message.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as pb
else:

    def _load() -> Any:
        if "tinker" not in sys.modules:
            package = importlib.util.find_spec("tinker")
            for folder in (package and package.submodule_search_locations) or ():
                file = Path(folder) / "proto" / "tinker_public_pb2.py"
                spec = importlib.util.spec_from_file_location("searchr1_async.local._tinker_public_pb2", file)
                if file.is_file() and spec is not None and spec.loader is not None:
                    module = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(module)
                    return module
        from tinker.proto import tinker_public_pb2

        return tinker_public_pb2

    pb = _load()

__all__ = ["pb"]
