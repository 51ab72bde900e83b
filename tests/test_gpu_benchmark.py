"""The GPU benchmark: without a GPU it says so, and its verdict fails what is inexact or unmeasured, but no model that does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.figures import ACROSS, AGREEMENT, NO_FIT, PEAK, problem_of
from benchmarks.gpu.report import body, problems
from searchr1_async.errors import ServiceError, ServiceStartError

ROOT = Path(__file__).parents[1]


def row(figure: str, value: float | None, part: str = "float32", model: str = "small", **more: Any) -> dict[str, Any]:
    empty = {"low": None, "high": None, "problem": None}
    return {"model": model, "part": part, "figure": figure, "value": value, **empty, **more}


EXACT = [row(AGREEMENT, 2e-5), row(ACROSS, 3e-5), row(AGREEMENT, 0.05, "bfloat16")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_ends_at_once_and_says_why() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "needs a CUDA GPU" in ended.stderr
    assert "--device cpu --quick" in ended.stderr
    assert ended.stdout == ""


def test_exact_figures_pass_and_bfloat16_has_no_bound() -> None:
    assert problems(EXACT) == []


@pytest.mark.parametrize("value", [1e-3, 0.5, float("nan")])
@pytest.mark.parametrize("figure", [AGREEMENT, ACROSS])
def test_a_difference_in_float32_that_is_not_below_the_bound_fails(figure: str, value: float) -> None:
    (found,) = problems([*EXACT, row(figure, value, model="large")])
    assert "large in float32" in found
    assert "0.001" in found


def test_a_model_that_does_not_fit_is_reported_and_fails_nothing() -> None:
    rows = [*EXACT, row("loading the model", None, model="large", problem=NO_FIT), row(PEAK, 80.0, model="large")]
    assert problems(rows) == []
    page = "\n".join(body(rows, {}))
    assert f"| loading the model | {NO_FIT} | – |" in page
    assert "| small" not in page


def test_another_error_fails() -> None:
    (found,) = problems([*EXACT, row("prefill tokens/s", None, "bfloat16", problem="RuntimeError: no kernel | image")])
    assert "no kernel" in found


def test_nothing_checked_is_a_failure() -> None:
    (found,) = problems([row("loading the model", None, problem=NO_FIT)])
    assert "no model was checked" in found


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ServiceStartError("the embedded service could not start: CUDA out of memory. Tried to allocate"), NO_FIT),
        (ExceptionGroup("", [ServiceError("the embedded service exited unexpectedly (exit code -9); end")]), NO_FIT),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), NO_FIT),
        (TimeoutError(), "took too long"),
        (ServiceError("first line\nsecond line"), "ServiceError: first line"),
    ],
)
def test_a_reason_is_short_and_want_of_memory_is_one_thing(error: Exception, problem: str) -> None:
    assert problem_of(error) == problem
