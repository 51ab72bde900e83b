"""Data for the final still picture of a run. Pure; the picture is drawn out-of-process."""

from __future__ import annotations

from typing import Any

from searchr1_async.watch.live.snapshot import EvaluationState, Snapshot
from searchr1_async.watch.live.words import compact, counted_steps, heading, shown
from searchr1_async.watch.progress import duration
from searchr1_async.watch.state import RunState


def chart_window(steps: int) -> int:
    """Half-width in rows of the smoothing window: about a twentieth of the curve in total."""
    return min(8, max(1, round(min(steps, 500) / 40)))


def evaluation_rows(state: RunState) -> list[dict[str, Any]]:
    """Held-out evaluations that have a step, as chart rows."""
    return [
        {"step": point.step, "label": shown(point.label, 60), "exact_match": point.exact_match, "low": point.low, "high": point.high}
        for point in state.evaluations
        if point.step is not None
    ]  # fmt: skip


def picture_task(state: RunState, now: float, title: str = "") -> dict[str, Any] | None:
    """Input of :func:`searchr1_async.watch.live.drawing.picture_spec`; None if there is nothing to draw."""
    snapshot = state.snapshot(now)
    steps = state.steps.rows()
    if not steps and not state.evaluations:
        return None
    return {
        "title": f"{heading(snapshot, title)}: {_outcome(snapshot)}",
        "subtitle": list(_subtitle(snapshot, state.evaluations)),
        "window": chart_window(len(steps)),
        "from_zero": state.first_step == 0,
        "steps": steps,
        "evaluations": evaluation_rows(state),
        "suites": [] if steps else _suites(state.evaluations[-1]),
    }


def _outcome(snapshot: Snapshot) -> str:
    what = f"{counted_steps(snapshot)} in " if snapshot.kind == "train" else ""
    return f"{what}{duration(snapshot.seconds)}, {shown(snapshot.reason, 40)}"


def _subtitle(snapshot: Snapshot, evaluations: list[EvaluationState]) -> list[str]:
    lines: list[str] = []
    if evaluations:
        ends = evaluations[:1] if len(evaluations) == 1 else [evaluations[0], evaluations[-1]]
        texts = [f"{shown(e.label, 40)} {e.exact_match:.1%} [{e.low:.1%}, {e.high:.1%}]" for e in ends]
        lines.append(f"Held-out exact match, 95 % interval: {' → '.join(texts)}")
    if snapshot.finished_episodes:
        counts = f"{snapshot.finished_episodes:,} episodes · {compact(snapshot.used.sampled)} tokens sampled"
        lines.append(f"{counts} · cost: {shown(snapshot.cost.text, 60)}")
    return lines


def _suites(evaluation: EvaluationState) -> list[dict[str, Any]]:
    whole = {
        "suite": "all questions",
        "exact_match": evaluation.exact_match,
        "low": evaluation.low,
        "high": evaluation.high,
    }
    if len(evaluation.suites) < 2:
        return [whole]
    return [whole, *({"suite": shown(name, 40), "exact_match": share} for name, share in evaluation.suites.items())]
