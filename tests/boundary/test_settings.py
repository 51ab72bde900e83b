"""Values and settings: numbers of any library become Python's, and annotations declare types and bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import searchr1_async as sr
from searchr1_async.boundary.paths import FilePath
from searchr1_async.boundary.settings import (
    Count,
    Range,
    Seconds,
    Share,
    as_choice,
    as_flag,
    as_integer,
    as_number,
    as_text,
    check_settings,
    checked_arguments,
    list_of,
    lone_surrogate,
    plain,
    settings_of,
)
from searchr1_async.config import (
    BatchSettings,
    EpisodeSettings,
    FaultSettings,
    LengthSettings,
    PipelineSettings,
    ScoringSettings,
)
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.systems import System


@dataclass(frozen=True, slots=True)
class Sizes:
    count: Count = 1
    share: Share = 0.5
    limit: Seconds | None = None
    few: Annotated[int, Range(at_least=2, at_most=4)] = 2
    kind: Literal["a", "b"] = "a"
    workers: Count | Literal["auto"] = 1
    thinking: bool | str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    folder: FilePath | None = None
    told: Callable[[str], None] | None = None
    price: sr.runs.Price | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        check_settings(self, "the ")


def test_what_is_given_becomes_plain_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = Sizes(
        count=np.int64(3),
        share=np.float32(0.25),
        limit=60,
        thinking=np.bool_(True),  # pyright: ignore[reportArgumentType]
        numbers={"clip": np.float64(0.2)},
        folder="runs",
        anything=np.int64(3),
    )
    assert (sizes.count, sizes.share, sizes.limit, sizes.thinking) == (3, 0.25, 60.0, True)
    assert [type(getattr(sizes, name)) for name in ("count", "share", "limit", "thinking")] == [int, float, float, bool]
    assert type(sizes.numbers["clip"]) is float
    assert sizes.folder == tmp_path / "runs"
    assert type(sizes.anything) is np.int64


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"count": 8.0}, r"the count is 8.0 \(float\): expected an integer"),
        ({"count": 0}, "the count is 0: it must be at least 1"),
        ({"share": 1.5}, "the share is 1.5: it must be at most 1"),
        ({"share": float("nan")}, "the share is nan: expected a finite number"),
        ({"limit": "60"}, r"the limit is '60' \(str\): expected a number"),
        ({"limit": 0}, "the limit is 0.0: it must be over 0"),
        ({"few": 5}, "the few is 5: it must be at most 4"),
        ({"kind": "c"}, "the kind is 'c': choose one of a, b"),
        ({"workers": "many"}, r"the workers is 'many' \(str\): expected an integer or 'auto'"),
        ({"workers": 0}, "the workers is 0: it must be at least 1"),
        ({"thinking": 3}, r"the thinking is 3 \(int\): expected True or False or text or None"),
        ({"numbers": {"clip": "x"}}, r"the numbers\['clip'\] is 'x'"),
        ({"numbers": [1]}, "expected a dict of numbers"),
        ({"folder": 3}, r"the folder is 3 \(int\): expected a path"),
        ({"told": 3}, r"the told is 3 \(int\): expected a function"),
        ({"price": 3}, r"the price is 3 \(int\): expected an instance of Price"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=told):
        Sizes(**given)


def test_arguments_are_checked_by_the_signature() -> None:
    def call(count: Count, names: Annotated[Sequence[str], list_of(str)] = (), *, other=None) -> dict[str, Any]:  # type: ignore[no-untyped-def]
        return checked_arguments(call, locals())

    module_globals = call.__globals__
    assert {"Count", "Annotated", "Sequence", "list_of"} <= module_globals.keys()
    assert call(np.int64(2), ["a"]) == {"count": 2, "names": ("a",)}
    with pytest.raises(sr.errors.ConfigurationError, match=r"names\[1\] is 3"):
        call(1, ["a", 3])  # pyright: ignore[reportArgumentType]
    with pytest.raises(sr.errors.ConfigurationError, match="names is 'ab'"):
        call(1, "ab")


def test_settings_are_made_of_arguments_with_their_names() -> None:
    assert settings_of(Sizes, {"count": 2, "unknown": 1}, share=1) == Sizes(count=2, share=1.0)


@pytest.mark.parametrize(
    "kind",
    [
        *(
            sr.config.EpisodeLimits,
            sr.config.SamplingSettings,
            PipelineSettings,
            sr.WarmUp,
            sr.config.LearningSettings,
            sr.config.LocalOptions,
        ),
        *(EpisodeSettings, BatchSettings, LengthSettings, FaultSettings, ScoringSettings),
        *(sr.Judge, sr.search.PacingSettings, sr.search.CompactSettings, System, sr.rewards.RecipeReward),
    ],
)
def test_every_setting_of_the_package_refuses_what_is_none(kind: Any) -> None:
    for each in fields(kind):
        with pytest.raises(sr.errors.ConfigurationError, match=each.name):
            kind(**{each.name: object()})
    with pytest.raises(sr.errors.ConfigurationError, match="train is 'dear'"):
        sr.runs.Price(1, 2, "dear")  # pyright: ignore[reportArgumentType]


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


def test_a_lone_surrogate_is_found() -> None:
    assert lone_surrogate("é \ud83d") == 2
    assert lone_surrogate("é 😀") is None
