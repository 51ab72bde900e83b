"""Merging on small folders, compared with transformers; and rejected adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from searchr1_async.errors import ExportError
from searchr1_async.runs.adapters import merge, read_adapter
from searchr1_async.testing import make_tiny_model

RANK, ALPHA = 4, 8
Q = "model.layers.0.self_attn.q_proj"


def make_adapter(folder: Path, shapes: dict[str, tuple[int, int]], **config: Any) -> Path:
    """Random matrices for modules of shape [out, in]."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for path, (outputs, inputs) in shapes.items():
        state[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator)
        state[f"base_model.model.{path}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator)
    save_file(state, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def update_of(adapter: Path, path: str) -> torch.Tensor:
    state = load_file(adapter / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{path}.lora_{letter}.weight"] for letter in "AB")
    return ALPHA / RANK * b @ a


def shard(folder: Path) -> None:
    """Splits a model into several weights files."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_sharded", [True, False])
def test_only_what_the_adapter_names_changes(
    tmp_path: Path, config_class: Any, is_tied: bool, is_sharded: bool
) -> None:
    base = make_tiny_model(tmp_path / "base", config_class=config_class, tie_word_embeddings=is_tied)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    if is_sharded:
        shard(base)
    adapter = make_adapter(tmp_path / "adapter", {Q: (96, 96), "lm_head": (vocabulary, 96)})
    merge(base, read_adapter(adapter), tmp_path / "merged")
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    after, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    wanted[f"{Q}.weight"] += update_of(adapter, Q)
    wanted["lm_head.weight"] = before.get_output_embeddings().weight + update_of(adapter, "lm_head")
    assert after.state_dict().keys() == wanted.keys()
    for name, tensor in after.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_head_that_is_not_adapted_stays_tied(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", {Q: (96, 96)})
    merge(base, read_adapter(adapter), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_the_precision_of_the_base_is_kept(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    file = base / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", {Q: (96, 96)})
    merge(base, read_adapter(adapter), tmp_path / "merged")
    found, weight = load_file(tmp_path / "merged" / "model.safetensors"), load_file(file)[f"{Q}.weight"]
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    torch.testing.assert_close(found[f"{Q}.weight"], (weight.float() + update_of(adapter, Q)).bfloat16())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.layers.9.self_attn.q_proj": (96, 96)}, "no weight for model.layers.9"),
        ({Q: (96, 95)}, "it is a different model"),
        ({Q: (48, 96)}, r"has shape \[48, 96\]"),
        ({"lm_head": (8, 96), "model.unembed_tokens": (8, 96)}, "two modules of the adapter change lm_head.weight"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], message: str
) -> None:
    base = make_tiny_model(tmp_path / "base")
    with pytest.raises(ExportError, match=message):
        merge(base, read_adapter(make_adapter(tmp_path / "adapter", shapes)), tmp_path / "merged")


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    base = make_tiny_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", {Q: (96, 96)})
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        merge(base, read_adapter(adapter), tmp_path / "merged")


def test_a_base_without_safetensors_is_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    (base / "model.safetensors").unlink()
    adapter = make_adapter(tmp_path / "adapter", {Q: (96, 96)})
    with pytest.raises(ExportError, match="as safetensors"):
        merge(base, read_adapter(adapter), tmp_path / "merged")


def test_an_adapter_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="uses use_dora"):
        read_adapter(make_adapter(tmp_path / "dora", {Q: (96, 96)}, use_dora=True))
    odd = make_adapter(tmp_path / "odd", {Q: (96, 96)})
    save_file({f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 96)}, odd / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="has no pairs of LoRA matrices"):
        read_adapter(odd)
    save_file({"base_model.model.experts.lora_A.weight": torch.zeros(2, 4, 96)}, odd / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="has no pairs of LoRA matrices"):
        read_adapter(odd)
    save_file({}, odd / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="has no pairs of LoRA matrices"):
        read_adapter(odd)
    (odd / "adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match="cannot be read"):
        read_adapter(odd)
