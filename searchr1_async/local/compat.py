"""Interfaces of libraries that are not public, all that the service uses. Checked with tinker 0.38 and torch 2.10 to 2.13.

The fallbacks: without the messages' file, :mod:`tinker` is imported whole; without oneDNN's operators, torch's own linear multiplies.
Importing this module loads neither library.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

_PACKED_ROWS = 64
"""Rows that the packed layout is chosen for; it serves any number."""


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


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear exists for it and agrees with ``F.linear`` on random numbers."""
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    try:
        generator = torch.Generator().manual_seed(0)
        weight, x = (torch.randn(rows, 32, generator=generator).to(dtype) for rows in (48, 5))
        products = [onednn_linear(x, form) for form in (weight, packed(weight))]
    except (AttributeError, RuntimeError, NotImplementedError):
        logger.info("oneDNN's linear is not available; using torch's")
        return False
    expected, tolerance = torch.nn.functional.linear(x, weight), 1e-4 if dtype == torch.float32 else 1e-1
    return all(torch.allclose(y, expected, atol=tolerance, rtol=tolerance) for y in products)


def packed(weight: Tensor) -> Tensor:
    """A copy of ``weight`` [out, in] in oneDNN's packed layout, for :func:`onednn_linear` alone. On a CPU only."""
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` of contiguous x [rows, in]; ``weight`` may be :func:`packed`. Without autograd, on a CPU only."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
