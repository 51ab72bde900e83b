"""Interfaces of libraries that are not public, all that the service uses. Checked with tinker 0.38 and torch 2.10 to 2.13.

The fallbacks: without the messages' file, :mod:`tinker` is imported whole; without oneDNN's operators, torch's own linear multiplies.
Importing this module loads neither library.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

PACKED_ROWS = 256
"""The packed layout serves products of 2 to this many rows: 1.5 times as fast as MKL with 32 rows, slower with 1,040."""


def tinker_messages() -> Any:
    """The module ``tinker.proto.tinker_public_pb2``, loaded from its file unless ``tinker`` is already imported.

    ``import tinker`` imports torch, which takes seconds and which a scripted service does not need. Loading the file twice is
    safe: protobuf keeps one class per message.
    """
    package = None if "tinker" in sys.modules else importlib.util.find_spec("tinker")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "proto" / "tinker_public_pb2.py"
        spec = importlib.util.spec_from_file_location("searchr1_async.local._tinker_public_pb2", file)
        if file.is_file() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    from tinker.proto import tinker_public_pb2

    return tinker_public_pb2


def has_onednn() -> bool:
    """Whether oneDNN's prepacked linear exists and agrees with ``F.linear`` on random numbers."""
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    try:
        generator = torch.Generator().manual_seed(0)
        weight, x = torch.randn(48, 32, generator=generator), torch.randn(5, 32, generator=generator)
        y = packed_linear(weight)(x, None)
    except (AttributeError, RuntimeError, NotImplementedError):
        logger.info("oneDNN's prepacked linear is not available; using torch's")
        return False
    return torch.allclose(y, torch.nn.functional.linear(x, weight), atol=1e-4)


def packed_linear(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """``x Wᵀ + b`` as a function of x [rows, in] and b [out], with a copy of ``weight`` [out, in] in oneDNN's packed layout.

    Float32 on a CPU only, where :func:`has_onednn`.
    """
    import torch

    multiply = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
    return lambda x, bias: multiply(x, packed, bias, "none", [], "")
