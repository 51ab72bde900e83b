"""Values and settings: numbers of any library become Python's, and annotations declare types and bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

import searchr1_async as sr
from searchr1_async.boundary.paths import FilePath
from searchr1_async.boundary.settings import (
    Count,
    Seconds,
    Share,
    check,
    check_settings,
    checked_arguments,
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
from searchr1_async.evaluation.plan import System


@dataclass(frozen=True, slots=True)
class Sizes:
    count: Count = 1
    share: Share = 0.5
    limit: Seconds | None = None
    few: Annotated[int, Field(ge=2, le=4)] = 2
    kind: Literal["a", "b"] = "a"
    workers: Count | Literal["auto"] = 1
    thinking: bool | str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    folder: FilePath | None = None
    reported: Callable[[str], None] | None = None
    price: sr.runs.Price | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        check_settings(self, "the ")


def test_given_values_become_plain_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert type(sizes.anything) is int


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        ({"count": 8.0}, r"the count is 8.0 \(float\): it should be a valid integer"),
        ({"count": 0}, r"the count is 0 \(int\): it should be greater than or equal to 1"),
        ({"share": 1.5}, r"the share is 1.5 \(float\): it should be less than or equal to 1"),
        ({"share": float("nan")}, r"the share is nan \(float\): it should be a finite number"),
        ({"limit": "60"}, r"the limit is '60' \(str\): it should be a valid number"),
        ({"limit": 0}, r"the limit is 0 \(int\): it should be greater than 0"),
        ({"few": 5}, r"the few is 5 \(int\): it should be less than or equal to 4"),
        ({"kind": "c"}, r"the kind is 'c' \(str\): it should be 'a' or 'b'"),
        ({"workers": "many"}, r"the workers is 'many' \(str\): it should be a valid integer or 'auto'"),
        ({"workers": 0}, r"the workers is 0 \(int\): it should be greater than or equal to 1"),
        ({"thinking": 3}, r"the thinking is 3 \(int\): it should be a valid boolean or a valid string"),
        ({"numbers": {"clip": "x"}}, r"the numbers\['clip'\] is 'x' \(str\): it should be a valid number"),
        ({"numbers": [1]}, r"the numbers is \[1\] \(list\): it should be a valid dictionary"),
        ({"folder": 3}, r"the folder is 3 \(int\): expected a path"),
        ({"reported": 3}, r"the reported is 3 \(int\): it should be callable"),
        ({"price": 3}, r"the price is 3 \(int\): it should be an instance of Price"),
    ],
)
def test_a_bad_value_is_refused_by_name(given: dict[str, Any], reported: str) -> None:
    with pytest.raises(sr.errors.ConfigurationError, match=reported):
        Sizes(**given)


def test_arguments_are_checked_by_the_signature() -> None:
    def call(count: Count, names: Sequence[str] = (), *, other=None) -> dict[str, Any]:  # type: ignore[no-untyped-def]
        return checked_arguments(call, locals())

    module_globals = call.__globals__
    assert {"Count", "Sequence"} <= module_globals.keys()
    assert call(np.int64(2), ["a"]) == {"count": 2, "names": ("a",)}
    with pytest.raises(sr.errors.ConfigurationError, match=r"names\[1\] is 3"):
        call(1, ["a", 3])  # pyright: ignore[reportArgumentType]
    with pytest.raises(sr.errors.ConfigurationError, match=r"names is 'ab' \(str\): it should be a list$"):
        call(1, "ab")
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
def test_every_setting_of_the_package_refuses_another_type(kind: Any) -> None:
    for each in fields(kind):
        with pytest.raises(sr.errors.ConfigurationError, match=each.name):
            kind(**{each.name: object()})
    with pytest.raises(sr.errors.ConfigurationError, match="train is 'dear'"):
        sr.runs.Price(1, 2, "dear")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("kind", "value", "becomes"),
    [
        *((Count, value, 8) for value in (8, np.int64(8), np.uint8(8), np.array(8))),
        *((float, value, 0.5) for value in (0.5, np.float32(0.5), np.float64(0.5), np.array(0.5))),
        (bool, np.bool_(True), True),
        (str, np.str_("text"), "text"),
    ],
)
def test_scalars_of_any_library(kind: Any, value: Any, becomes: Any) -> None:
    found = check("it", value, kind)
    assert type(found) is type(becomes)
    assert found == becomes


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert type(check("n", torch.tensor(8), int)) is int
    assert check("x", torch.tensor(0.5), float) == 0.5
    assert check("f", torch.tensor(True), bool) is True


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((int, value) for value in (8.0, np.float64(8.0), "8", True, np.bool_(True), None, np.array([8]), [8], 8j)),
        *((float, value) for value in ("1e-4", float("inf"), np.float32("nan"), True, None, [1.0], 1j, 10**400)),
        *((bool, value) for value in (1, 0, "no", None, [True])),
        *((str, value) for value in (3, None, b"text", "half \ud83d")),
    ],
)
def test_values_of_another_kind(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="group_size is"):
        check("group_size", value, kind)


def test_a_message_stays_short() -> None:
    with pytest.raises(ConfigurationError) as error:
        check("reward", np.zeros(10_000), float)
    assert len(str(error.value)) < 200


def test_other_values_are_unchanged() -> None:
    for value in ("a", b"a", None, [1], {"a": 1}, np.array([1, 2])):
        assert plain(value) is value


def test_a_lone_surrogate_is_found() -> None:
    assert lone_surrogate("é \ud83d") == 2
    assert lone_surrogate("é 😀") is None
