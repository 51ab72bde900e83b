"""What a run's state says: one frame of plain JSON values for the live view, and the outcome in sentences. Pure.

Untrusted text (model names, notices, errors) is made visible, put on one line and truncated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from searchr1_async.boundary.paths import shown_name, shown_path
from searchr1_async.events import RolloutSampled
from searchr1_async.records.metrics import CURVES, METRICS, described
from searchr1_async.watch.markup import duration, milliseconds, shown
from searchr1_async.watch.state import ALL_SUITES, Row, RunState, finite

LATE_SECONDS = 0.05
"""Median lag from which the event loop counts as late; an idle loop is under 1 ms."""
CONSTANT_GROUPS = 16
"""Constant groups in a row before an alert: if half of all groups are mixed, chance produces this once in 65,000."""
NOTICE_SECONDS = 600.0
"""How long a warning stays visible."""
MOST_ALERTS = 6
MOST_EVALUATIONS_SHOWN = 8

_SERVICES = ("embedding", "store")
_TITLES = {"train": "Training", "evaluate": "Evaluating", "rollout": "Rolling out"}
_PAST = {"train": "Trained", "evaluate": "Evaluated", "rollout": "Rolled out"}
_PHASE_METRICS = (*CURVES, METRICS["env/all/failed_episodes"])
"""Running metrics of an evaluation or a rollout."""
_IDLE = RolloutSampled(0, 0, 0, 0, 0, 0, 0, 0, {}, "", 0.0, 0.0, 0.0, 0.0)


def frame(state: RunState, now: float, title: str = "") -> dict[str, Any]:
    """Everything that the live view shows at ``now``.

    Args:
        title: shown until kind and model of the work are known.

    Returns:
        ``title``, ``standing``, ``badge``, ``progress``, ``status``; ``bars`` of active phases; ``alerts``; ``stacks``, parts of a
        whole that are drawn as one bar; and ``sections`` of rows.
    """
    work_now = state.work.time(now)
    return {
        "title": heading(state, title),
        "standing": state.standing,
        "badge": shown(state.reason, 40) if state.has_ended else state.standing,
        "progress": _progress(state),
        "status": _status(state, now),
        "bars": [
            {
                "name": shown(phase.name, 160),
                "text": ", ".join(
                    filter(
                        None,
                        (shown(phase.counted(), 80), *described(phase.metrics, _PHASE_METRICS), phase.left(work_now)),
                    )
                ),
                "share": phase.share,
            }
            for phase in state.phases.values()
        ],
        "alerts": list(_alerts(state, now))[:MOST_ALERTS],
        "stacks": [] if state.has_ended else list(_stacks(state)),
        "sections": [(name, rows) for name, rows in _sections(state, now).items() if rows],
    }


def running_row(state: RunState) -> Row | None:
    """Means of the open batch, as a curve row; None before its first episode."""
    values = state.batch.values
    if not values or state.has_ended or state.run.kind != "train":
        return None
    step = max(state.step + 1, state.pipeline.step if state.pipeline else 0)
    # Rounded: changes below chart resolution need not be sent again.
    return {curve.name: round(values[curve.name], 3) if curve.name in values else None for curve in CURVES} | {
        "step": float(step)
    }


def outcome(state: RunState, now: float, title: str = "") -> list[str]:
    """The outcome in sentences, of which the first can be a title."""
    steps = f": {counted_steps(state)}" if state.run.kind == "train" else ""
    reason = shown(state.reason, 40) or "still running"
    said = [f"{heading(state, title)}{steps} in {duration(state.seconds(now))}, {reason}."]
    if state.steps and (parts := described(_known(state.steps[-1]))):
        said.append(f"Last step: {', '.join(parts)}.")
    if overall := [row for row in state.evaluations if row["suite"] == ALL_SUITES]:
        ends = " → ".join(f"{row['label']} {_interval(row)}" for row in overall[:1] + overall[1:][-1:])
        said.append(f"Held-out exact match, 95 % interval: {ends}.")
    if state.finished_episodes:
        session = " in this session" if state.run.step and state.run.kind == "train" else ""
        tokens = f"{state.used.sampled:,} tokens sampled"
        said.append(f"{state.finished_episodes:,} episodes{session}; {tokens}, cost: {shown(state.cost.text, 60)}.")
    return said


def summary(state: RunState, now: float, title: str = "") -> str:
    """The outcome in one paragraph of plain text."""
    said = outcome(state, now, title)
    if state.run.out_dir:
        said.append(f"Saved in {shown(shown_path(state.run.out_dir))}.")
    if state.warnings:
        said.append(f"Last warning: {shown(next(reversed(state.warnings)))}")
    return " ".join(said)


def heading(state: RunState, title: str = "") -> str:
    """Title of the work; ``title`` until kind and model are known."""
    if not state.has_started:
        return shown(title) or "Starting"
    doing = (_PAST if state.has_ended else _TITLES).get(state.run.kind, "Running")
    return f"{doing} {shown(shown_name(state.run.model[:200]), 80)}"


def counted_steps(state: RunState) -> str:
    """``24 of 60 steps``."""
    total = state.run.total_steps
    return f"{state.step:,} steps" if total is None else f"{state.step:,} of {total:,} steps"


def _known(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if value is not None}


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:.1%}" + (f" [{row['low']:.1%}, {row['high']:.1%}]" if row["low"] is not None else "")


def _progress(state: RunState) -> str:
    if state.run.kind == "train" and (state.step or "train" in state.phases):
        return f"Step {counted_steps(state).removesuffix(' steps')}"
    if (main := state.main_phase) is not None:
        return f"{shown(main.event.phase, 80).capitalize()}: {shown(main.counted(), 80)}"
    return shown(state.last_notice, 160) if state.standing == "starting" else ""


def _status(state: RunState, now: float) -> str:
    seconds = duration(state.seconds(now))
    if state.has_ended:
        return f"{seconds} in total"
    left = state.main_phase.left(state.work.time(now)) if state.main_phase else ""
    return f"{seconds} so far" + (f", about {left}" if left else "")


def _stacks(state: RunState) -> Iterator[dict[str, Any]]:
    sample, pipeline = state.rollout or _IDLE, state.pipeline
    stages = {"sampling": sample.sampling, "queued": sample.queued, "searching": sample.searching}
    stages["in between"] = max(0, sample.episodes - sum(stages.values()))
    finished = f", {state.batch.episodes:,} finished in this batch" if state.run.kind == "train" else ""
    yield _stack(f"{sample.episodes:,} episodes in flight{finished}", stages, 1)
    if pipeline is not None and pipeline.batch_groups:
        groups = {"taken": pipeline.taken_groups, "waiting": pipeline.waiting_groups, "in progress": sample.groups}
        title = f"Batch {pipeline.step:,}: {pipeline.taken_groups:,} of {pipeline.batch_groups:,} groups taken"
        yield _stack(title, groups, pipeline.batch_groups)


def _stack(title: str, counts: Mapping[str, int], least: int) -> dict[str, Any]:
    whole = max(least, sum(counts.values()))
    parts = [{"name": name, "count": f"{count:,}", "share": count / whole} for name, count in counts.items()]
    return {"title": title, "parts": parts}


def _sections(state: RunState, now: float) -> dict[str, list[tuple[str, str]]]:
    values, means = state.batch.values, state.batch.means
    batch = []
    for curve in CURVES:
        if curve.name in values:
            # The spread of a fraction follows from the fraction.
            spread = None if curve.is_share else means.spread(curve.name)
            batch.append(
                (curve.heading, curve.text(values[curve.name]) + (f" ± {spread:.2f}" if spread is not None else ""))
            )
    if state.batch.failed:
        batch.append(("failed", f"{state.batch.failed:,} of {state.batch.episodes:,}"))
    last = _known(state.steps[-1]) if state.steps else {}
    return {
        "Last step": [(curve.heading, curve.text(last[curve.name])) for curve in CURVES if curve.name in last],
        "This batch": [] if state.has_ended else batch,
        "Rollouts": list(_rollouts(state, now)),
        "Learning": list(_learning(state)) if state.run.kind == "train" else [],
        "Search": list(_search(state, now)),
        "Tokens": list(_tokens(state)),
        "Exact match, 95 % interval": [
            (row["label"] if row["suite"] == ALL_SUITES else f"· {row['suite']}", _interval(row))
            for row in state.evaluations[-MOST_EVALUATIONS_SHOWN:]
        ],
    }


def _rollouts(state: RunState, now: float) -> Iterator[tuple[str, str]]:
    yield "episodes finished", f"{state.finished_episodes:,}"
    if (sample := state.rollout) is not None:
        yield "episodes per second", f"{state.rates(now)[0]:.1f}"
        yield "limited by", shown(sample.limited_by, 40)
        yield "loop lag p50 / p99", f"{milliseconds(sample.loop_lag_p50)} / {milliseconds(sample.loop_lag_p99)}"
        yield "CPU of this process", f"{sample.cpu:.2f} of a core"


def _learning(state: RunState) -> Iterator[tuple[str, str]]:
    if not state.has_ended:
        yield "trainer", state.pipeline.trainer if state.pipeline else "not started"
    yield "latest weights", f"version {state.policy_version:,}"
    if (staleness := finite(state.metrics.get("env/all/staleness"))) is not None:
        yield "staleness, mean", f"{staleness:.2f} steps"
    if (seconds := finite(state.metrics.get("time/total"))) is not None:
        yield "last step took", duration(seconds)
    for reason, count in sorted(state.dropped.items()):
        yield f"dropped: {shown(reason.replace('_', ' '), 40)}", f"{count:,} groups"


def _search(state: RunState, now: float) -> Iterator[tuple[str, str]]:
    if search := state.search:
        p50, p99, hits, failed = (
            search.get(f"search/{name}", 0.0) for name in ("p50", "p99", "cache_hit_rate", "failed")
        )
        yield "queries per second", f"{state.rates(now)[1]:.1f}"
        yield "cache hits", f"{hits:.0%}"
        yield "p50 / p99", f"{milliseconds(p50)} / {milliseconds(p99)}"
        yield "retries", f"{sum(search.get(f'search/{service}/faults', 0.0) for service in _SERVICES):,.0f}"
        yield "failed", f"{failed:,.0f}"


def _tokens(state: RunState) -> Iterator[tuple[str, str]]:
    used = state.used
    for name, count in (
        ("prompt", used.prompt),
        ("cached", used.cached),
        ("sampled", used.sampled),
        ("trained", used.trained),
    ):
        yield name, f"{count:,}"
    yield "cost", shown(state.cost.text, 60)


def _alerts(state: RunState, now: float) -> Iterator[str]:
    if state.standing == "paused":
        yield "Paused: no new requests are sent until the run is resumed."
    if not state.has_ended:
        yield from _troubles(state)
    for text, last in reversed(state.warnings.items()):
        if now - last < NOTICE_SECONDS or state.has_ended:
            yield shown(text, 400)


def _troubles(state: RunState) -> Iterator[str]:
    batch, sample = state.batch, state.rollout or _IDLE
    seconds_down = max(state.search.get(f"search/{service}/seconds_down", 0.0) for service in _SERVICES)
    if seconds_down > 0:
        yield f"Search has been down for {duration(seconds_down)}: episodes wait and continue when it is back."
    if batch.failed >= 3 and batch.failed >= 0.1 * batch.episodes:
        last = f" Last error: {shown(batch.error, 200)}" if batch.error else ""
        yield f"{batch.failed:,} of {batch.episodes:,} recent episodes failed; they are not trained on.{last}"
    if sample.loop_lag_p50 >= LATE_SECONDS:
        yield (
            f"The event loop is late by {milliseconds(sample.loop_lag_p50)} (median), and this process uses {sample.cpu:.2f} of a core. "
            "Near 1, more workers share the load; else something blocks the loop, such as another cell or a slow async reward."
        )
    if state.constant_groups_in_a_row >= CONSTANT_GROUPS:
        yield (
            f"All rewards were equal within each of the last {state.constant_groups_in_a_row:,} groups, so nothing is learned from them: "
            "the questions are too hard or too easy for the model, or its samples are too similar."
        )
    if sample.limited_by == "service":
        yield "The service is rate limiting (too many requests): concurrency is reduced until it recovers."
