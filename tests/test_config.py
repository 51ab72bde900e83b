"""Configs: flat names, concerns, equality, TOML, and errors that name the setting."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import searchr1_async as sr
from searchr1_async.config import AskConfig, BatchSettings, Config, EvalConfig, RolloutConfig, TrainConfig
from searchr1_async.config.base import places_of
from searchr1_async.models import Price

KINDS: list[type[Config]] = [TrainConfig, RolloutConfig, EvalConfig, AskConfig]

counts = st.integers(1, 10**20)
numbers = st.floats(0, 1e300)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(lambda text: bool(text.strip()))
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "model": st.none() | names,
    "format": st.none() | texts,
    "thinking": st.none() | st.booleans() | texts,
    "instructions": st.none() | texts,
    "max_turns": st.none() | counts,
    "malformed_calls": st.sampled_from([None, "end", "tell"]),
    "episode_time_limit": st.none() | st.floats(1e-9, 1e9),
    "temperature": numbers,
    "sampling_deadline": st.floats(1e-9, 1e9),
    "workers": st.just("auto") | counts,
    "port": st.integers(0, 65535),
    "dtype": texts,
}
OWN: dict[type[Config], dict[str, st.SearchStrategy[Any]]] = {
    TrainConfig: {
        "seed": st.integers(),
        "group_size": st.none() | st.integers(2, 100),
        "groups_per_batch": st.none() | st.integers(50, 100),
        "minibatches": st.none() | st.integers(1, 50),
        "learning_rate": st.floats(1e-12, 10),
        "loss": st.sampled_from([None, "ppo", "cispo"]),
        "loss_config": st.dictionaries(texts, st.floats(-10, 10), max_size=3),
        "warm_up": st.none() | st.builds(sr.WarmUp, steps=counts),
        "price": st.none() | st.builds(Price, numbers, numbers, st.none() | numbers, texts, texts),
        "max_cost": st.none() | numbers.filter(bool),
        "drop_constant_groups": st.booleans(),
        "start_from": st.none() | st.just("tinker://run/weights/1"),
    },
    RolloutConfig: {"seed": st.none() | st.integers(), "group_size": counts},
    EvalConfig: {
        "seed": st.none() | st.integers(),
        "samples": counts,
        "label": texts,
        "baselines": st.lists(st.sampled_from(["direct", "rag", "recipe"])),
        "split": st.none() | texts,
    },
    AskConfig: {"seed": st.none() | st.integers()},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_toml_round_trip(kind: type[Config], data: st.DataObject) -> None:
    config = kind(**data.draw(st.fixed_dictionaries({}, optional=COMMON | OWN[kind])))
    assert kind.from_toml(config.to_toml()) == config
    assert kind(**config.flat()) == config
    assert kind(**config.to_dict()) == config
    assert config.replace() == config


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_one_flat_name(kind: type[Config]) -> None:
    concerns = [each for each in fields(kind) if is_dataclass(each.default)]
    settings = sum(len(fields(each.default)) for each in concerns) + len(fields(kind)) - len(concerns)
    assert len(places_of(kind)) == settings, "no name is ambiguous"
    assert kind().to_toml() == kind(**kind().flat()).to_toml()
    assert repr(kind()) == f"{kind.__name__}()"
    assert all(getattr(sr.config, type(each.default).__name__) is type(each.default) for each in concerns), "all public"


@pytest.mark.parametrize("kind", KINDS)
def test_the_signature_shows_the_flat_names(kind: type[Config]) -> None:
    parameters = inspect.signature(kind).parameters
    assert {name: each.default for name, each in parameters.items()} == kind().flat()
    assert parameters["max_tokens"].annotation == int | None
    assert str(parameters["temperature"]) == "temperature: float = " + str(kind().flat()["temperature"])


def test_flat_names_are_read_by_concern() -> None:
    config = TrainConfig(group_size=8, steps=12, learning_rate=1e-4, model="m", checkpoint_every=3, sampling_deadline=5)
    assert (config.batch.group_size, config.length.steps, config.learning.learning_rate) == (8, 12, 1e-4)
    assert (config.model.name, config.checkpoints.checkpoint_every, config.sampling.deadline) == ("m", 3, 5.0)
    changed = config.replace(group_size=4)
    assert (changed.batch.group_size, config.batch.group_size) == (4, 8)
    assert changed != config
    assert changed.replace(group_size=8) == config
    assert repr(TrainConfig(group_size=4, model="m")) == "TrainConfig(model='m', group_size=4)"
    with pytest.raises(FrozenInstanceError):
        config.batch = BatchSettings()  # type: ignore[misc]


def test_concerns_and_tables_are_accepted() -> None:
    whole = TrainConfig(batch=BatchSettings(group_size=4), local=sr.config.LocalOptions(threads=2), minibatches=2)
    assert whole == TrainConfig(batch={"group_size": 4, "minibatches": 2}, threads=2)
    assert TrainConfig(loss_config=None) == TrainConfig()
    text = 'group_size = 4\nmodel = "m"\n[length]\nsteps = 3\n[warm_up]\nsteps = 2\n'
    assert TrainConfig.from_toml(text) == TrainConfig(group_size=4, model="m", steps=3, warm_up=sr.WarmUp(steps=2))


def test_a_file_is_read_back(tmp_path: Path) -> None:
    config = TrainConfig(instructions='say "é"\n\x7f\t\\', seed=5, loss_config={"a b": 0.5})
    config.save(str(tmp_path / "config.toml"))
    assert TrainConfig.load(tmp_path / "config.toml") == TrainConfig.load(str(tmp_path / "config.toml")) == config
    with pytest.raises(sr.errors.ConfigurationError, match=r"cannot read the settings .*none\.toml"):
        TrainConfig.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"gruop_size": 8}, "TrainConfig has no setting 'gruop_size': did you mean group_size"),
        ({"group_size": 8.0}, r"group_size is 8.0 \(float\): it should be a valid integer"),
        ({"group_size": 1}, r"group_size is 1 \(int\): it should be greater than or equal to 2"),
        ({"learning_rate": "1e-4"}, r"learning_rate is '1e-4' \(str\): it should be a valid number"),
        ({"episode_time_limit": -1}, r"episode_time_limit is -1 \(int\): it should be greater than 0"),
        ({"sampling_deadline": 0}, r"sampling_deadline is 0 \(int\): it should be greater than 0"),
        ({"warm_up": True}, "warm_up is True"),
        ({"warm_up": {"steps": 0}}, "warm_up.steps is 0"),
        ({"batch": {"size": 8}}, "batch has no setting 'size': it has drop_constant_groups"),
        ({"batch": {"group_size": "8"}}, "batch.group_size is '8'"),
        ({"batch": 8}, r"batch is 8 \(int\): it should be an instance of BatchSettings"),
        ({"local": 8}, r"local is 8 \(int\): it should be an instance of LocalOptions"),
        ({"price": {"prefill": -1, "sample": 1}}, "prefill is -1 "),
        ({"price": {"prefill": 1}}, "price: Price.__init__\\(\\) missing 1 required positional argument: 'sample'"),
        ({"max_cost": "5"}, "max_cost is '5'"),
        ({"seed": None}, "seed is None"),
        ({"model": " "}, "model is ' '"),
        ({"minibatches": 3, "groups_per_batch": 2}, r"minibatches \(3\) must not exceed groups_per_batch \(2\)"),
        (
            {"optimizer_steps": 3, "groups_per_batch": 2},
            r"optimizer_steps \(3\) must not exceed groups_per_batch \(2\)",
        ),
        ({"min_members": 5, "group_size": 4}, r"min_members \(5\) is above group_size \(4\)"),
        ({"refill_groups": 1, "drop_constant_groups": False}, "refill_groups replaces dropped groups"),
        ({"keep_best": True}, "keep_best needs evaluate_every"),
        ({"synchronous": True, "max_staleness": 1}, "synchronous learning is on-policy"),
    ],
)
def test_errors_name_the_setting(settings: dict[str, Any], reported: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=reported):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("group_size = ", "the settings are not TOML"),
        ("[batch]\ngroup_size = 'x'", "batch.group_size is 'x'"),
        ("[sampling.temperature]\nx = 'none'", "sampling.temperature is .'x': 'none'."),
        ("[bath]\ngroup_size = 1", "TrainConfig has no setting 'bath': did you mean"),
    ],
)
def test_bad_toml_is_refused(text: str, reported: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=reported):
        TrainConfig.from_toml(text)
