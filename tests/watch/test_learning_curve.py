from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.watch.charts import plot_learning, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == PNG
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def metrics(steps: int) -> pl.DataFrame:
    shares = [step / (2 * steps) for step in range(steps)]
    return pl.DataFrame(
        {
            "step": list(range(1, steps + 1)),
            "env/all/correct": shares,
            "env/all/turns_per_episode": [1 + share for share in shares],
            "env/all/valid_calls": [None, *shares[1:]],
            "env/all/answer_in_passage": [float("nan"), *shares[1:]],
        }
    )


POINTS = pl.DataFrame(
    [
        (0, "untrained $x_1$", 0, "atlas", 0.1, 0.05, 0.2, 60),
        (1, "after \x00 warm-up", 0, "atlas", 0.12, 0.06, 0.22, 60),
        (2, "midway", 10, "atlas", 0.3, 0.2, 0.4, 60),
        (3, "after RL", None, "atlas", 0.5, 0.4, 0.6, 60),
        (4, "nothing", 3, "atlas", float("nan"), float("nan"), float("nan"), 60),
    ],
    schema=["order", "label", "step", "suite", "mean", "low", "high", "questions"],
    orient="row",
)


def learning_curve(frame: pl.DataFrame, points: pl.DataFrame, path: Path, *, title: str = "") -> Path:
    """Draws as the demo job does."""
    plot_learning(frame, evaluations=points, title=title, width=380, height=220).save(path, scale_factor=2)
    return path


@pytest.mark.parametrize(
    ("frame", "points"),
    [
        (metrics(20), POINTS),
        (metrics(1), POINTS[:1]),
        (metrics(2), POINTS[:0]),
        (pl.DataFrame(schema={"step": pl.Int64}), POINTS),
        (pl.DataFrame(), POINTS[:0]),
    ],
    ids=["whole", "one step", "two steps", "no steps", "nothing"],
)
def test_any_data_gives_a_picture(frame: pl.DataFrame, points: pl.DataFrame, tmp_path: Path) -> None:
    path = learning_curve(frame, points, tmp_path / "curve.png", title="100 % of $5")
    width, height = size(path)
    assert width > (1650 if frame.height or points.height else 900)
    assert height > (900 if frame.height or points.height else 200)


def test_evaluations_are_drawn(tmp_path: Path) -> None:
    without = learning_curve(metrics(20), POINTS[:0], tmp_path / "a.png").read_bytes()
    again = learning_curve(metrics(20), POINTS[:0], tmp_path / "b.png").read_bytes()
    with_points = learning_curve(metrics(20), POINTS, tmp_path / "c.png").read_bytes()
    assert without == again
    assert without != with_points


def test_drawing_works_in_any_thread(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    threads = [threading.Thread(target=learning_curve, args=(metrics(5), POINTS, path)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths[0].read_bytes() == paths[1].read_bytes()


@given(st.lists(st.floats(-10, 10), max_size=60))
def test_smoothing_stays_within_the_values(values: list[float]) -> None:
    mean_n, spread_n = smoothed(np.array(values))
    assert len(mean_n) == len(spread_n) == len(values)
    if values:
        assert mean_n.min() >= min(values) - 1e-9
        assert mean_n.max() <= max(values) + 1e-9
        assert (spread_n <= max(values) - min(values) + 1e-6).all()


def test_smoothing_keeps_a_constant_constant() -> None:
    mean_n, spread_n = smoothed(np.full(100, 0.3))
    assert mean_n == pytest.approx(0.3)
    assert spread_n == pytest.approx(0.0, abs=1e-6)
