"""Numbers of any library become Python's; what is no number is refused by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from searchr1_async.boundary.settings import as_choice, as_flag, as_integer, as_number, as_text, half_a_character, plain
from searchr1_async.errors import ConfigurationError


@pytest.mark.parametrize("value", [8, np.int64(8), np.uint8(8), np.array(8)])
def test_whole_numbers_of_any_library(value: Any) -> None:
    found = as_integer("group_size", value, at_least=2)
    assert type(found) is int
    assert found == 8


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5)])
def test_numbers_of_any_library(value: Any) -> None:
    found = as_number("learning_rate", value, over=0)
    assert type(found) is float
    assert found == 0.5


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert type(as_integer("n", torch.tensor(8))) is int
    assert as_number("x", torch.tensor(0.5)) == 0.5
    assert as_flag("f", torch.tensor(True)) is True


@pytest.mark.parametrize("value", [8.0, np.float64(8.0), "8", True, np.bool_(True), None, np.array([8]), [8], 8j])
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="group_size is"):
        as_integer("group_size", value)


@pytest.mark.parametrize("value", ["1e-4", float("inf"), np.float32("nan"), True, None, [1.0], 1j, 10**400])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="learning_rate is"):
        as_number("learning_rate", value)


def test_bounds_are_named() -> None:
    with pytest.raises(ConfigurationError, match="steps is 0: it must be at least 1"):
        as_integer("steps", 0, at_least=1)
    with pytest.raises(ConfigurationError, match="port is 70000: it must be at most 65535"):
        as_integer("port", 70_000, at_most=65_535)
    with pytest.raises(ConfigurationError, match=r"price is 0\.0: it must be over 0"):
        as_number("price", 0, over=0)


@pytest.mark.parametrize("value", [1, 0, "no", None, [True]])
def test_what_is_no_flag(value: Any) -> None:
    assert as_flag("resume", np.bool_(True)) is True
    with pytest.raises(ConfigurationError, match="resume is"):
        as_flag("resume", value)


@pytest.mark.parametrize("value", [3, None, b"text", "half \ud83d"])
def test_what_is_no_text(value: Any) -> None:
    assert type(as_text("instructions", np.str_("text"))) is str
    with pytest.raises(ConfigurationError, match="instructions is"):
        as_text("instructions", value)


def test_choices() -> None:
    assert as_choice("loss", "ppo", ("ppo", "cispo")) == "ppo"
    for value in ("PPO", None, 3, ["ppo"]):
        with pytest.raises(ConfigurationError, match="choose one of ppo, cispo"):
            as_choice("loss", value, ("ppo", "cispo"))


def test_a_message_stays_short() -> None:
    with pytest.raises(ConfigurationError) as error:
        as_number("reward", np.zeros(10_000))
    assert len(str(error.value)) < 200


def test_everything_else_is_left_as_it_is() -> None:
    for value in ("a", b"a", None, [1], {"a": 1}, np.array([1, 2])):
        assert plain(value) is value


def test_half_a_character_is_found() -> None:
    assert half_a_character("é \ud83d") == 2
    assert half_a_character("é 😀") is None
