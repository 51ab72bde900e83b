"""The table of models: complete, dated, and looked up correctly."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from searchr1_async.models import (
    default_cloud_model,
    find_format,
    find_model,
    find_price,
    known_models,
    nearest_names,
    nearest_of_family,
    plain_name,
    replacements_for,
)

OFFERED = [model.name for model in known_models() if model.is_offered]
SPRING = [m.name for m in known_models() if m.retired and m.retired >= "2026-06-12"]
"""Models removed since June were there in spring."""


@pytest.mark.parametrize("model", known_models(), ids=lambda model: model.name)
def test_every_entry_is_complete(model) -> None:
    assert model.parameters > 0
    assert plain_name(model.name) == model.name
    assert not (model.is_offered and model.retired)
    if model.retired:
        dt.date.fromisoformat(model.retired)
        assert model.replacements
        assert replacements_for(model.name), "every retired model has a replacement that is still there"
    for other in model.replacements:
        assert find_model(other) is not None
    if model.price:
        dt.date.fromisoformat(model.price.as_of)
    chat = model.format
    assert bool(chat.renderer) != bool(chat.refusal)
    if chat.renderer:
        assert chat.default in chat.thinking
        assert chat.default == "off" or "off" not in chat.thinking, "off where it can be off"
        assert chat.checked


def test_the_default_is_offered_and_can_be_switched_off() -> None:
    model = find_model(default_cloud_model())
    assert model is not None
    assert (model.name, model.is_offered, model.format.default) == ("Qwen/Qwen3.5-4B", True, "off")


def test_a_suffix_is_the_same_model_at_its_own_price() -> None:
    plain, long = find_model("Qwen/Qwen3.8-27B"), find_model("Qwen/Qwen3.8-27B:peft:262144")
    assert plain is not None
    assert long is not None
    assert (long.name, long.family, long.format) == ("Qwen/Qwen3.8-27B:peft:262144", "Qwen", plain.format)
    assert plain.price is not None
    assert long.price is not None
    assert (plain.price.prefill, long.price.prefill) == (1.86, 2.48)
    unpriced = find_model("Qwen/Qwen3-8B:peft:131072")
    assert unpriced is not None
    assert unpriced.price is None
    assert find_price("Qwen/Qwen3.8-27B:peft:262144") == long.price
    assert find_price("Qwen/Qwen3-8B:peft:131072") is None


def test_unknown_names_are_not_guessed() -> None:
    assert find_model("acme/model") is None
    assert find_model("qwen/qwen3-8b") is None
    assert find_model("") is None
    assert find_format("acme") is None
    assert nearest_of_family("acme/model", OFFERED) is None
    assert replacements_for("acme/model") == []


@pytest.mark.parametrize(
    ("offered", "nearest"),
    [
        (SPRING, "Qwen/Qwen3-4B-Instruct-2507"),  # the same size, in spring
        (["Qwen/Qwen3.5-9B", "Qwen/Qwen3-8B", "openai/gpt-oss-20b"], "Qwen/Qwen3-8B"),  # the smaller of the nearest
        (["Qwen/Qwen3.5-9B-Base", "Qwen/Qwen3.6-35B-A3B"], "Qwen/Qwen3.6-35B-A3B"),  # a base model does not chat
        (["Qwen/Qwen3.6-35B-A3B:peft:262144"], "Qwen/Qwen3.6-35B-A3B:peft:262144"),
        (["Qwen/Qwen3.8-27B:peft:262144", "Qwen/Qwen3.8-27B"], "Qwen/Qwen3.8-27B"),  # the longer context costs more
        (["openai/gpt-oss-20b"], None),
        ([], None),
    ],
)
def test_substitutes_for_the_default(offered: list[str], nearest: str | None) -> None:
    assert nearest_of_family(default_cloud_model(), offered) == nearest


def test_nearest_names_put_variants_and_family_first() -> None:
    names = nearest_names("Qwen/Qwen3.6-35B-A3B:peft:1", [*OFFERED, "Qwen/Qwen3.6-35B-A3B:peft:262144"])
    assert names[:2] == ["Qwen/Qwen3.6-35B-A3B", "Qwen/Qwen3.6-35B-A3B:peft:262144"]
    assert nearest_names("Qwen3.5-4b", OFFERED)[0] == "Qwen/Qwen3.5-4B"
    assert len(nearest_names("x", OFFERED, 3)) == 3


def test_a_retired_replacement_is_replaced_in_turn() -> None:
    assert replacements_for("Qwen/Qwen3.5-27B") == ["Qwen/Qwen3.8-27B"]
    assert replacements_for("Qwen/Qwen3.5-27B", ["Qwen/Qwen3.6-27B"]) == ["Qwen/Qwen3.6-27B"]
    assert replacements_for("Qwen/Qwen3-4B-Instruct-2507", ["openai/gpt-oss-20b"]) == []
    assert replacements_for("Qwen/Qwen3-4B-Instruct-2507:peft:1") == ["Qwen/Qwen3.5-4B"]


def test_the_table_is_package_data() -> None:
    import searchr1_async

    assert (Path(searchr1_async.__file__).parent / "models.json").is_file()
