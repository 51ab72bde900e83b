"""PEFT file names, matrix names and configuration of a LoRA adapter. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_ALPHA = 32.0
"""Updates are scaled by ``alpha / rank``. 32 for every rank, as in adapters exported by Tinker."""
IMPORT_ROUTE = "import_weights"
"""Route of the embedded service only: imports an adapter from this machine into its checkpoints."""
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def matrix_name(path: str, letter: str) -> str:
    """PEFT name of matrix ``A`` or ``B`` of the module at ``path`` (``model.layers.0.mlp.up_proj``)."""
    return f"base_model.model.{path}.lora_{letter}.weight"


def lora_parts(name: str) -> tuple[str, str] | None:
    """Module path and letter from a PEFT matrix name; None if it is not one."""
    found = _MATRIX.fullmatch(name)
    return (found[1], found[2]) if found else None


def adapter_config(names: Iterable[str], *, base_model: str, rank: int) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT reads it. The matrix ``names`` determine the target modules."""
    paths = {parts[0] for name in names if (parts := lora_parts(name))}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(LORA_ALPHA),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
