"""Settings declare their kinds and bounds in their annotations; one function checks and coerces them."""

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
    check_settings,
    checked_arguments,
    list_of,
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
    price: sr.Price | None = None
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
    with pytest.raises(sr.ConfigurationError, match=told):
        Sizes(**given)


def test_arguments_are_checked_by_the_signature() -> None:
    def call(count: Count, names: Annotated[Sequence[str], list_of(str)] = (), *, other=None) -> dict[str, Any]:  # type: ignore[no-untyped-def]
        return checked_arguments(call, locals())

    module_globals = call.__globals__
    assert {"Count", "Annotated", "Sequence", "list_of"} <= module_globals.keys()
    assert call(np.int64(2), ["a"]) == {"count": 2, "names": ("a",)}
    with pytest.raises(sr.ConfigurationError, match=r"names\[1\] is 3"):
        call(1, ["a", 3])  # pyright: ignore[reportArgumentType]
    with pytest.raises(sr.ConfigurationError, match="names is 'ab'"):
        call(1, "ab")


def test_settings_are_made_of_arguments_with_their_names() -> None:
    assert settings_of(Sizes, {"count": 2, "unknown": 1}, share=1) == Sizes(count=2, share=1.0)


@pytest.mark.parametrize(
    "kind",
    [
        *(sr.EpisodeLimits, sr.SamplingSettings, PipelineSettings, sr.WarmUp, sr.LearningSettings, sr.LocalOptions),
        *(EpisodeSettings, BatchSettings, LengthSettings, FaultSettings, ScoringSettings),
        *(sr.Judge, sr.PacingSettings, sr.CompactSettings, System, sr.RecipeReward),
    ],
)
def test_every_setting_of_the_package_refuses_what_is_none(kind: Any) -> None:
    for each in fields(kind):
        with pytest.raises(sr.ConfigurationError, match=each.name):
            kind(**{each.name: object()})
    with pytest.raises(sr.ConfigurationError, match="train is 'dear'"):
        sr.Price(1, 2, "dear")  # pyright: ignore[reportArgumentType]
