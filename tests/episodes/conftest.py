"""Dialects with a tiny tokenizer: our ChatML renderer in both formats, and the package's for Qwen3 and Qwen3.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from renderers import Qwen3Renderer, Qwen3RendererConfig, Qwen35Renderer, Qwen35RendererConfig

from searchr1_async.episodes.formats import Dialect, HermesDialect, TagsDialect
from searchr1_async.episodes.rendering import ChatMLRenderer
from searchr1_async.testing import make_tiny_tokenizer

QWEN3_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
QWEN35_TOKENS = [*QWEN3_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def qwen3_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = make_tiny_tokenizer(Path(tmp_path_factory.mktemp("qwen3")))
    tokenizer.add_tokens(QWEN3_TOKENS, special_tokens=False)
    return tokenizer


@pytest.fixture(scope="session")
def qwen35_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = make_tiny_tokenizer(Path(tmp_path_factory.mktemp("qwen35")))
    tokenizer.add_tokens(QWEN35_TOKENS, special_tokens=False)
    return tokenizer


@pytest.fixture(scope="session")
def dialects(tokenizer: Any, qwen3_tokenizer: Any, qwen35_tokenizer: Any) -> dict[str, tuple[Dialect, Any]]:
    chatml = ChatMLRenderer(tokenizer)
    qwen3 = Qwen3Renderer(qwen3_tokenizer, Qwen3RendererConfig(enable_thinking=False))
    qwen35 = Qwen35Renderer(qwen35_tokenizer, Qwen35RendererConfig(enable_thinking=False))
    return {
        "tags": (TagsDialect(chatml, tokenizer), tokenizer),
        "hermes": (HermesDialect(chatml, tokenizer), tokenizer),
        "qwen3": (HermesDialect(qwen3, qwen3_tokenizer), qwen3_tokenizer),
        "qwen35": (HermesDialect(qwen35, qwen35_tokenizer), qwen35_tokenizer),
    }
