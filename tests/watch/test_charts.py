"""Charts: correct data, valid in both Vega-Lite versions, bounded size, no exceptions without steps."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import pytest

from searchr1_async.episodes.types import GroupOutcome
from searchr1_async.errors import ConfigurationError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.trackers.tracker import encoded
from searchr1_async.watch import drawing as theme
from searchr1_async.watch.charts import ALL_SUITES, draw, evaluation_scores, reward_by_turns
from searchr1_async.watch.drawing import curve_rows, metric_named, plot_learning, plot_metric
from searchr1_async.watch.timeline import plot_timeline
from tests import tiny_world
from tests.watch import builders
from tests.watch.test_timeline import STEP_TWO, logged

REWARD = metric_named("reward", [])
KINDS = ("learning", "timeline", "reward_by_turns", "suites", "reward", "exact_match", "turns")


def metrics_frame(steps: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "step": range(1, steps + 1),
            "env/all/reward/total": [0.2 + 0.5 * step / steps for step in range(steps)],
            "env/all/correct": [0.3 + 0.4 * step / steps for step in range(steps)],
            "env/all/turns_per_episode": [1.5] * steps,
            "env/all/valid_calls": [0.9] * steps,
            "time/step [s].total": [float(step) for step in range(steps)],
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run: three steps, three evaluations of two suites (one with several samples), and an event log."""
    out = tmp_path_factory.mktemp("run")
    records = RunRecords(out)
    for step, row in enumerate(metrics_frame(3).drop("step").iter_rows(named=True), start=1):
        groups = [builders.group(builders.question(f"q{n}"), corrects=(1.0, float(n % 2))) for n in range(4)]
        records.write_step(step, [GroupOutcome(place, group) for place, group in enumerate(groups)], row)
    for label, step, samples in (
        ("untrained", 0, 1),
        ("after warm-up", 0, 1),
        (f"after <RL> {builders.HOSTILE}", 3, 3),
    ):
        records.write_evaluation(label, evaluated(samples), step)
    (out / "events.jsonl").write_bytes(b"".join(encoded(moment, event) for moment, event in STEP_TWO))
    return out


def evaluated(samples: int) -> list[Any]:
    asked = [builders.question(f"q{n}", source) for n in range(6) for source in ("atlas", "rivers")]
    right = [
        builders.episode(question, correct=float((place + sample) % 3 > 0))
        for place, question in enumerate(asked)
        for sample in range(samples)
    ]
    return [*right, builders.episode(asked[0], stop_reason=builders.StopReason.FAILED, turns=())]


def all_rows(spec: Any) -> int:
    """Total data rows of a chart."""
    if isinstance(spec, dict):
        own = sum(len(rows) for rows in spec["datasets"].values()) if "datasets" in spec else 0
        values = spec.get("data", {}).get("values") if isinstance(spec.get("data"), dict) else None
        rest = sum(all_rows(value) for name, value in spec.items() if name not in ("data", "datasets"))
        return own + (len(values) if isinstance(values, list) else 0) + rest
    return sum(map(all_rows, spec)) if isinstance(spec, list) else 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_title_and_picture(folder: Path, kind: str) -> None:
    chart = draw(folder, kind)
    bundle = theme.mime_bundle(chart.to_dict())
    assert bundle[theme.MIME_TYPE]["$schema"].endswith("v5.json")
    picture = base64.b64decode(bundle["image/png"])
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG")
    assert width > 800
    assert height > 300
    assert len(picture) < 150_000
    json.dumps(bundle)


@pytest.mark.parametrize("kind", KINDS)
def test_run_without_steps_has_placeholder_charts(tmp_path: Path, kind: str) -> None:
    spec = draw(tmp_path / "not made yet", kind).to_dict()
    texts = json.dumps(spec)
    assert "nothing to draw" in texts or "No evaluation has been made yet" in texts
    assert theme.mime_bundle(spec)["image/png"]


def test_unknown_kind_lists_the_valid_ones(folder: Path, tmp_path: Path) -> None:
    for wrong, words in (
        ("timelin", "Kinds of charts: learning, timeline"),
        ("turn_per_episode", "turns_per_episode"),
        ("rewrd", "reward"),
        ("correct_", "correct"),
        ("no such thing", "no metric 'no such thing'"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            draw(folder, wrong)
    with pytest.raises(ConfigurationError, match="there is no metric 'timelin'"):
        draw(tmp_path, "timelin")


def test_column_name_with_or_without_env_all(folder: Path) -> None:
    for name in ("env/all/turns_per_episode", "turns_per_episode", "turns", "time/step [s].total"):
        spec = draw(folder, name).to_dict()
        assert all_rows(spec) >= 3
        assert theme.mime_bundle(spec)["image/png"]


def test_charts_can_be_modified_concatenated_and_saved(folder: Path, tmp_path: Path) -> None:
    """A chart with its own config cannot be concatenated."""
    reward, learning, timeline = (draw(folder, kind) for kind in ("reward", "learning", "timeline"))
    both = (reward.properties(title="mine", width=300) | draw(folder, "exact_match")) & learning & timeline
    both.save(tmp_path / "both.png")
    both.save(tmp_path / "both.svg")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "both.svg").read_text()
    assert "mine" in svg
    assert "who waited for what" in svg
    assert theme.TRAINING in svg


def test_evaluation_scores_match_the_evaluation(folder: Path) -> None:
    scores = evaluation_scores(RunRecords(folder).evaluations())
    assert scores["order"].unique().to_list() == [0, 1, 2]
    for order, samples in ((0, 1), (2, 3)):
        expected = Evaluation.of("it", tuple(evaluated(samples)))
        own = scores.filter(pl.col("order") == order)
        assert own["suite"].to_list() == [ALL_SUITES, "atlas", "rivers"]
        low, high = expected.exact_match_interval
        row = own.row(0, named=True)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((expected.exact_match, low, high))
        rivers = own.row(2, named=True)
        assert (rivers["mean"], rivers["low"], rivers["high"]) == pytest.approx(
            expected.estimate("exact_match", "rivers")
        )


def test_reward_by_turns() -> None:
    from searchr1_async.episodes.table import EpisodeRow, episodes_frame

    asked = builders.question()
    turns = [builders.searching_turn(), builders.searching_turn(), builders.answering_turn()]
    episodes = [
        builders.episode(asked, correct=1.0, turns=turns), builders.episode(asked, correct=0.0, turns=turns),
        builders.episode(asked, correct=1.0), builders.episode(asked, turns=[builders.malformed_turn()], correct=0.0),
        builders.episode(asked, stop_reason=builders.StopReason.FAILED, turns=()),
    ]  # fmt: skip
    frame = episodes_frame([EpisodeRow(episode, 1) for episode in episodes]).lazy()
    right = reward_by_turns(frame).filter(pl.col("what") == "exact match")
    assert right.select("n", "mean", "episodes").rows() == [(1, 0.0, 1), (2, 1.0, 1), (3, 0.5, 2)]
    assert (right["low"] >= 0).all()
    assert (right["high"] <= 1).all()


def test_many_steps_give_a_bounded_chart() -> None:
    long = metrics_frame(20_000)
    for chart in (
        plot_learning(long),
        plot_metric(long, "reward"),
    ):
        spec = chart.to_dict()
        assert 1000 < all_rows(spec) <= theme.MAX_ROWS + 4
        assert len(json.dumps(spec)) < 1_000_000


def test_long_step_gives_a_bounded_chart() -> None:
    from searchr1_async.events import GroupFinished
    from tests.watch.test_timeline import opened, sample

    rows = [(0.0, opened(1))]
    rows += [(n / 2, sample(100, n % 50, 10, 20)) for n in range(7200)]  # an hour
    rows += [(float(n % 3600), GroupFinished(builders.group(), 1)) for n in range(5000)]
    chart = plot_timeline(logged(*sorted(rows, key=lambda row: row[0])), 1)  # type: ignore[arg-type]
    assert all_rows(chart.to_dict()) <= theme.MAX_ROWS


def test_series_with_gaps_and_nulls() -> None:
    frame = pl.DataFrame({"step": [1, 2, 3, 4], "env/all/reward/total": [0.1, None, float("nan"), float("inf")]})
    assert curve_rows(frame, [REWARD])["step"].to_list() == [1.0]
    assert "nothing" not in json.dumps(plot_metric(frame, "reward").to_dict())


def test_hostile_text_is_inert(folder: Path) -> None:
    text = json.dumps(draw(folder, "suites").to_dict(), ensure_ascii=False)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "after <RL>" in text


@pytest.fixture
def default_renderer() -> Iterator[None]:
    before = alt.renderers.active
    yield
    alt.renderers.enable(before)


@pytest.mark.usefixtures("default_renderer")
def test_only_altairs_default_renderer_is_replaced(folder: Path) -> None:
    alt.renderers.enable("svg")
    assert not theme.enable_renderer()
    assert alt.renderers.active == "svg"
    alt.renderers.enable("default")
    draw(folder, "reward")
    assert alt.renderers.active == "default", "outside a notebook the user's settings are unchanged"
    assert theme.enable_renderer()
    shown = draw(folder, "reward")._repr_mimebundle_()
    assert set(shown) == {theme.MIME_TYPE, "image/png", "text/plain"}


def test_importing_plots_does_not_import_altair() -> None:
    code = (
        "import sys, searchr1_async.watch.charts, searchr1_async.trackers\n"
        "print(sorted({'altair', 'vl_convert', 'matplotlib', 'wandb', 'trackio', 'tensorboardX', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=tiny_world.child_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- learning curves ---

PNG = b"\x89PNG\r\n\x1a\n"


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == PNG
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def curve_metrics(steps: int) -> pl.DataFrame:
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
    plot_learning(frame, evaluations=points, title=title).save(path, scale_factor=2)
    return path


@pytest.mark.parametrize(
    ("frame", "points"),
    [
        (curve_metrics(20), POINTS),
        (curve_metrics(1), POINTS[:1]),
        (curve_metrics(2), POINTS[:0]),
        (pl.DataFrame(schema={"step": pl.Int64}), POINTS),
        (pl.DataFrame(), POINTS[:0]),
    ],
    ids=["whole", "one step", "two steps", "no steps", "nothing"],
)
def test_any_data_gives_a_picture(frame: pl.DataFrame, points: pl.DataFrame, tmp_path: Path) -> None:
    path = learning_curve(frame, points, tmp_path / "curve.png", title="100 % of $5")
    width, height = size(path)
    assert width > (1400 if frame.height or points.height else 900)
    assert height > (700 if frame.height or points.height else 200)


def test_evaluations_are_drawn(tmp_path: Path) -> None:
    without = learning_curve(curve_metrics(20), POINTS[:0], tmp_path / "a.png").read_bytes()
    again = learning_curve(curve_metrics(20), POINTS[:0], tmp_path / "b.png").read_bytes()
    with_points = learning_curve(curve_metrics(20), POINTS, tmp_path / "c.png").read_bytes()
    assert without == again
    assert without != with_points


def test_drawing_works_in_any_thread(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    threads = [threading.Thread(target=learning_curve, args=(curve_metrics(5), POINTS, path)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths[0].read_bytes() == paths[1].read_bytes()
