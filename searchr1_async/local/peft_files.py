"""The PEFT form of a LoRA adapter: the names of its files and matrices, and its configuration. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_ALPHA = 32.0
"""Updates are scaled by ``alpha / rank``. Tinker's exported adapters name 32 whatever the rank, so it is 32 here too."""
IMPORT_ROUTE = "import_weights"
"""The one route that only the embedded service has: it copies an adapter of this machine into its checkpoints."""
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def matrix_name(path: str, letter: str) -> str:
    """The name of matrix ``A`` or ``B`` of the module at ``path`` (``model.layers.0.mlp.up_proj``)."""
    return f"base_model.model.{path}.lora_{letter}.weight"


def lora_parts(name: str) -> tuple[str, str] | None:
    """The module's path and the letter in a matrix's name; None for another name."""
    found = _MATRIX.fullmatch(name)
    return (found[1], found[2]) if found else None


def adapter_config(names: Iterable[str], *, base_model: str, rank: int) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT reads it.

    Args:
        names: of the adapter's matrices; they give the target modules.
        base_model: a name on the Hugging Face hub, or the name of a local folder.
        rank: of every matrix.
    """
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
