"""The prices of Tinker's cloud, as far as they are known. Pure data.

The table holds only what a dated source says word for word; a model that is not in it has no cost, and is shown as unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "https://tinker-docs.thinkingmachines.ai/tinker/models/"
"""The page that every price was transcribed from, at the date of its entry."""

CACHED_PREFILL_DISCOUNT = 0.8
"""Of the prefill price, for the beginning of a prompt that the service has cached (2026-10-07)."""

LAST_RISE = "2026-07-17"
"""Prices rose on that day, most of them by half: an older price is no upper bound of today's."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for a million tokens."""

    prefill: float
    sample: float
    train: float | None = None
    """None where the source gives only what sampling costs."""
    as_of: str = ""
    """The day on which the source said so, ``YYYY-MM-DD``."""
    remark: str = ""


_DISCOUNTED = "a limited-time price, half of the list price"

PRICES: dict[str, Price] = {
    "Qwen/Qwen3-8B": Price(0.195, 0.60, 0.44, "2026-10-07"),
    "Qwen/Qwen3.5-4B": Price(0.33, 1.005, 0.737, "2026-10-07"),
    "Qwen/Qwen3.5-9B": Price(0.66, 1.995, 1.463, "2026-10-07"),
    "Qwen/Qwen3.5-9B-Base": Price(0.66, 2.00, 1.46, "2026-09-23"),
    "Qwen/Qwen3.5-397B-A17B": Price(3.00, 7.50, 6.60, "2026-09-23"),
    "Qwen/Qwen3.6-35B-A3B": Price(0.54, 1.335, 1.177, "2026-10-07"),
    "Qwen/Qwen3.6-27B": Price(1.86, 5.595, 4.103, "2026-07-29"),
    "Qwen/Qwen3.8-27B": Price(1.86, 5.595, None, "2026-10-07"),
    "Qwen/Qwen3.8-27B:peft:262144": Price(2.48, 7.46, None, "2026-10-07"),
    "openai/gpt-oss-20b": Price(0.18, 0.45, 0.396, "2026-07-29"),
    "openai/gpt-oss-120b": Price(0.33, 0.84, 0.737, "2026-07-29"),
    "deepseek-ai/DeepSeek-V3.1": Price(1.695, 4.215, 3.718, "2026-07-29"),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Price(0.195, 0.495, 0.44, "2026-07-29"),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": Price(2.49, 6.225, 5.478, "2026-07-29"),
    "thinkingmachines/Inkling": Price(1.87, 4.68, 5.61, "2026-10-07", _DISCOUNTED),
    # Of models that the page no longer lists, the last prices that it gave.
    "Qwen/Qwen3-4B-Instruct-2507": Price(0.07, 0.22, 0.22, "2026-01-05", "taken off the service on 2026-06-12"),
    "Qwen/Qwen3-30B-A3B": Price(0.12, 0.30, 0.36, "2026-01-05"),
    "Qwen/Qwen3-32B": Price(0.49, 1.47, 1.47, "2026-01-05"),
    "meta-llama/Llama-3.2-1B": Price(0.03, 0.09, 0.09, "2026-01-05"),
    "meta-llama/Llama-3.2-3B": Price(0.06, 0.18, 0.18, "2026-01-05"),
    "meta-llama/Llama-3.1-8B": Price(0.13, 0.40, 0.40, "2026-01-05"),
    "meta-llama/Llama-3.1-70B": Price(1.05, 3.16, 3.16, "2026-01-05"),
}
"""By the name that the service knows the model by. ``<model>:peft:<length>`` is the same model with a longer context, at a
price of its own: it never falls back to the model's."""
