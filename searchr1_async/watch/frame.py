"""The live view's text: one frame of plain JSON values, from a run's state. Pure.

Untrusted text (model names, notices, errors) is made visible, put on one line and truncated here, so a page only sets it as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypedDict

from searchr1_async.boundary.paths import shown_name, shown_path
from searchr1_async.events import RolloutSampled
from searchr1_async.records.metrics import CURVES, METRICS, Metric, described
from searchr1_async.watch.console import duration, one_line
from searchr1_async.watch.progress import Phase
from searchr1_async.watch.state import EvaluationState, RunState

LATE_FOR = 2.0
"""Seconds that the event loop must be late before an alert."""
CONSTANT_GROUPS = 16
"""Constant groups in a row before an alert: if half of all groups are mixed, chance produces this once in 65,000."""
NOTICE_SECONDS = 600.0
"""How long a warning stays visible."""

MOST_EVALUATIONS_SHOWN = 6
_SERVICES = ("embedding", "store")

_TITLES = {"train": "Training", "evaluate": "Evaluating", "rollout": "Rolling out"}
_PAST = {"train": "Trained", "evaluate": "Evaluated", "rollout": "Rolled out"}
_DROPPED = {
    "constant_reward": "constant reward",
    "too_few_episodes": "too few episodes",
    "too_slow": "too slow",
    "step_time_limit": "step time limit",
}
_PHASE_METRICS = (*CURVES, METRICS["env/all/failed_episodes"])
"""Running metrics of an evaluation or a rollout."""
_IDLE = RolloutSampled(0, 0, 0, 0, 0, 0, 0, 0, {}, "", 0.0, 0.0, 0.0, 0.0)
_LIMITS = {
    "growing": "ramp-up",
    "work": "no more work",
    "settings": "settings",
    "service": "service rate limit",
    "queue": "service queue",
    "client": "this process",
}


class Bar(TypedDict):
    name: str
    text: str
    share: float
    """0 to 1."""


class Alert(TypedDict):
    kind: Literal["warning", "info"]
    text: str


class Part(TypedDict):
    name: str
    count: int


class Stack(TypedDict):
    """Parts of a whole, drawn as one bar."""

    title: str
    parts: list[Part]
    whole: int
    """At least the sum of the parts; the rest is empty."""


class Section(TypedDict):
    title: str
    rows: list[tuple[str, str]]


class Frame(TypedDict):
    title: str
    standing: str
    """``starting``, ``running``, ``paused`` or ``ended``."""
    badge: str
    progress: str
    """Main progress; announced by screen readers when it changes."""
    status: str
    """Elapsed and remaining time."""
    bars: list[Bar]
    alerts: list[Alert]
    stacks: list[Stack]
    curves: dict[str, str]
    """Newest value of each curve as text; empty for work without steps."""
    running: dict[str, float | None]
    """Means of the open batch, as one curve row; empty before its first episode."""
    sections: list[Section]


def frame(state: RunState, now: float, title: str = "") -> Frame:
    """Everything that a view shows at ``now``.

    Args:
        title: shown until kind and model of the work are known.
    """
    return Frame(
        title=heading(state, title),
        standing=state.standing,
        badge=shown(state.reason, 40) if state.has_ended else state.standing,
        progress=_progress(state),
        status=_status(state, now),
        bars=[_bar(phase, now) for phase in state.phases.values()],
        alerts=list(_alerts(state, now))[:6],
        stacks=[] if state.has_ended else _stacks(state),
        curves={curve.name: _curve(curve, state) for curve in CURVES} if state.run.kind == "train" else {},
        running=_running(state),
        sections=_sections(state, now),
    )


def summary(state: RunState, now: float, title: str = "") -> str:
    """The outcome in one paragraph of plain text."""
    said = [heading(state, title)]
    if state.run.kind == "train":
        said[0] += f": {counted_steps(state)}"
    said[0] += f" in {duration(state.seconds(now))}, {shown(state.reason, 40) or 'still running'}."
    if parts := described({name: value for name, value in state.latest.items() if value is not None}):
        said.append(f"Last step: {', '.join(parts)}.")
    for point in state.evaluations[-MOST_EVALUATIONS_SHOWN:]:
        said.append(f"{shown(point.label, 60)}: exact match {point.mean:.1%} ({point.low:.1%} to {point.high:.1%}).")
    if state.finished_episodes:
        tokens = f"{compact(state.used.sampled)} tokens sampled"
        episodes = f"{state.finished_episodes:,} episodes"
        whole = f"This session: {episodes}. In total: " if state.is_resumed else f"{episodes}, "
        said.append(f"{whole}{tokens}, cost: {shown(state.cost.text, 60)}.")
    if state.run.out_dir:
        said.append(f"Saved in {shown(shown_path(state.run.out_dir))}.")
    if state.warnings:
        said.append(f"Last warning: {shown(state.warnings[-1].text)}")
    return " ".join(said)


def shown(text: str, most: int = 300) -> str:
    """Untrusted ``text`` on one line, invisible characters escaped, truncated."""
    return one_line(text[:most]).strip() + ("…" if len(text) > most else "")


def compact(count: int) -> str:
    """Format a count: ``987``, ``12.3 k``, ``4.56 M``, ``1.20 G``."""
    for size, unit, digits in ((10**9, "G", 2), (10**6, "M", 2), (10**4, "k", 1)):
        if count >= size:
            return f"{count / (1000 if unit == 'k' else size):.{digits}f} {unit}"
    return f"{count:,}"


def milliseconds(seconds: float) -> str:
    """Format a short time."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else duration(seconds)


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


def _progress(state: RunState) -> str:
    if state.run.kind == "train" and (state.step or "train" in state.phases):
        return f"Step {counted_steps(state).removesuffix(' steps')}"
    main = _main_phase(state)
    if main is not None:
        return f"{shown(main.event.phase, 80).capitalize()}: {_done(main)}"
    if state.finished_episodes and state.run.kind != "train":
        return f"{state.finished_episodes:,} episodes"
    return shown(state.last_notice, 160) if state.standing == "starting" else ""


def _status(state: RunState, now: float) -> str:
    seconds = duration(state.seconds(now))
    if state.has_ended:
        return f"{seconds} in total"
    main = _main_phase(state)
    left = None if main is None else main.estimate.seconds_left(now)
    return f"{seconds} so far" + ("" if left is None else f", about {duration(left)} left")


def _main_phase(state: RunState) -> Phase | None:
    """The training phase if there is one, else the first."""
    return state.phases.get("train") or next(iter(state.phases.values()), None)


def _done(phase: Phase) -> str:
    return f"{phase.estimate.done:,} of {phase.estimate.total:,} {shown(phase.event.unit, 40)}"


def _bar(phase: Phase, now: float) -> Bar:
    name, done, total = shown(phase.event.phase, 80), phase.estimate.done, phase.estimate.total
    if phase.event.label:
        name += f" ({shown(phase.event.label, 80)})"
    left = phase.estimate.seconds_left(now)
    text = [
        _done(phase),
        *described(phase.metrics, _PHASE_METRICS),
        *([] if left is None else [f"{duration(left)} left"]),
    ]
    return Bar(name=name, text=", ".join(text), share=min(1.0, max(0.0, done / total)) if total > 0 else 0.0)


def _stacks(state: RunState) -> list[Stack]:
    sample, pipeline = state.rollout or _IDLE, state.pipeline
    stages = {"sampling": sample.sampling, "queued": sample.queued, "searching": sample.searching}
    stages["in between"] = max(0, sample.episodes - sum(stages.values()))
    finished = f", {state.batch.episodes:,} finished in this batch" if state.run.kind == "train" else ""
    stacks = [_stack(f"{sample.episodes:,} episodes in flight{finished}", stages, 1)]
    if groups := pipeline.batch_groups if pipeline else state.run.groups_per_batch or 0:
        taken, waiting = (pipeline.taken_groups, pipeline.waiting_groups) if pipeline else (0, 0)
        title = f"Batch {pipeline.step if pipeline else 0:,}: {taken:,} of {groups:,} groups taken"
        stacks.append(_stack(title, {"taken": taken, "waiting": waiting, "in progress": sample.groups}, groups))
    return stacks


def _stack(title: str, counts: Mapping[str, int], least: int) -> Stack:
    parts = [Part(name=name, count=count) for name, count in counts.items()]
    return Stack(title=title, parts=parts, whole=max(least, sum(counts.values())))


def _curve(curve: Metric, state: RunState) -> str:
    """``+0.412, now +0.395 ± 0.48``: the last step, and the open batch."""
    settled, batch = state.latest.get(curve.name), state.batch.values.get(curve.name)
    parts = [] if settled is None else [curve.text(settled)]
    if batch is not None and not state.has_ended:
        # The spread of a fraction follows from the fraction.
        spread = None if curve.is_share else state.batch.means.spread(curve.name)
        parts.append(f"now {curve.text(batch)}" + (f" ± {spread:.2f}" if spread is not None else ""))
    return ", ".join(parts)


def _running(state: RunState) -> dict[str, float | None]:
    values = state.batch.values
    if not values or state.has_ended or state.run.kind != "train":
        return {}
    # Rounded: changes below chart resolution need not be sent again.
    row: dict[str, float | None] = {
        curve.name: round(values[curve.name], 4) if curve.name in values else None for curve in CURVES
    }
    return row | {"step": float(max(state.step + 1, state.pipeline.step if state.pipeline else 0))}


def _sections(state: RunState, now: float) -> list[Section]:
    is_training = state.run.kind == "train"
    sections = [
        Section(title="Rollouts", rows=_rollouts(state, now)),
        Section(title="Learning", rows=_learning(state) if is_training else []),
        Section(title="Search", rows=_search(state, now)),
        Section(title="Tokens", rows=_tokens(state)),
    ]
    if sample := state.rollout:
        lag = f"{milliseconds(sample.loop_lag_p50)} / {milliseconds(sample.loop_lag_p99)}"
        rows = [("loop lag p50 / p99", lag), ("CPU", f"{sample.cpu:.2f} of a core")]
        sections.append(Section(title="This process", rows=rows))
    sections.append(Section(title="Exact match, 95 % interval", rows=_evaluated(state.evaluations)))
    return [section for section in sections if section["rows"]]


def _rollouts(state: RunState, now: float) -> list[tuple[str, str]]:
    rows = [("episodes finished", f"{state.finished_episodes:,}")]
    if not state.has_ended:
        rows.append(("episodes per second", f"{state.episodes_per_second(now):.1f}"))
        if limit := state.rollout.limited_by if state.rollout else "":
            rows.append(("limited by", _LIMITS.get(limit, shown(limit, 40))))
    values, batch = state.batch.values, state.batch
    if state.run.kind != "train":
        rows += [(curve.heading, curve.text(values[curve.name])) for curve in CURVES if curve.name in values]
    if batch.failed:
        rows.append(("failed recently", f"{batch.failed:,} of {batch.episodes:,}"))
    return rows


def _learning(state: RunState) -> list[tuple[str, str]]:
    trainer = state.pipeline.trainer if state.pipeline else "not started"
    rows = [] if state.has_ended else [("trainer", trainer)]
    rows.append(("latest weights", f"version {state.policy_version:,}"))
    if state.staleness is not None:
        rows.append(("staleness, mean", f"{state.staleness:.2f} steps"))
    if state.seconds_per_step is not None:
        rows.append(("last step took", duration(state.seconds_per_step)))
    for reason, count in sorted(state.dropped.items()):
        label = _DROPPED.get(reason, shown(reason, 40))
        rows.append((f"dropped: {label}", f"{count:,} of {max(state.finished_groups, count):,}"))
    return rows


def _search(state: RunState, now: float) -> list[tuple[str, str]]:
    if not state.search:
        return []
    p50, p99, hits, failed = (_searched(state, name) for name in ("p50", "p99", "cache_hit_rate", "failed"))
    rows = [
        ("queries per second", f"{state.queries_per_second(now):.1f}"),
        ("cache hits", f"{hits:.0%}"),
        ("p50 / p99", f"{milliseconds(p50)} / {milliseconds(p99)}"),
        ("retries", f"{sum(_searched(state, f'{service}/faults') for service in _SERVICES):,.0f}"),
    ]
    return [*rows, ("failed", f"{failed:,.0f}")] if failed else rows


def _searched(state: RunState, name: str) -> float:
    return state.search.get(f"search/{name}", 0.0)


def _tokens(state: RunState) -> list[tuple[str, str]]:
    used = state.used
    counts = {"prompt": used.prompt, "cached": used.cached, "sampled": used.sampled}
    if state.run.kind == "train":
        counts["trained"] = used.trained
    return [*((name, compact(count)) for name, count in counts.items()), ("cost", shown(state.cost.text, 60))]


def _evaluated(evaluations: Sequence[EvaluationState]) -> list[tuple[str, str]]:
    rows = [
        (shown(point.label, 40), f"{point.mean:.1%}  [{point.low:.1%}, {point.high:.1%}]")
        for point in reversed(evaluations[-MOST_EVALUATIONS_SHOWN:])
    ]
    suites = evaluations[-1].suites if evaluations else {}
    if len(suites) > 1:  # suites of the newest evaluation, right below it
        rows[1:1] = [(f"· {shown(suite, 40)}", f"{share:.1%}") for suite, share in suites.items()]
    return rows


def _alerts(state: RunState, now: float) -> Iterator[Alert]:
    if state.standing == "paused":
        yield Alert(kind="info", text="Paused: no new requests are sent until the run is resumed.")
    if not state.has_ended:
        yield from _troubles(state, now)
    for warned in reversed(state.warnings):
        if now - warned.last < NOTICE_SECONDS or state.has_ended:
            times = f" ({warned.count} times)" if warned.count > 1 else ""
            yield _warning(shown(warned.text, 400) + times)


def _troubles(state: RunState, now: float) -> Iterator[Alert]:
    batch, sample = state.batch, state.rollout or _IDLE
    seconds_down = max(_searched(state, f"{service}/seconds_down") for service in _SERVICES)
    if seconds_down > 0:
        yield _warning(
            f"Search has been down for {duration(seconds_down)}: episodes wait and continue when it is back."
        )
    elif failed := state.searches_failed_lately(now):
        yield _warning(f"{failed:,} searches failed within the last 10 s; their episodes are not trained on.")
    if batch.failed >= 3 and batch.failed >= 0.1 * batch.episodes:
        last = f" Last error: {shown(batch.error, 200)}" if batch.error else ""
        yield _warning(f"{batch.failed:,} of {batch.episodes:,} recent episodes failed; they are not trained on.{last}")
    is_late = state.late_for(now) >= LATE_FOR
    if is_late:
        busy = (
            f"this process uses {sample.cpu:.2f} of a core; more workers would share the load"
            if sample.cpu >= 0.85
            else "something blocks it, such as another running cell or a slow reward function; move that to a thread"
        )
        yield _warning(f"The event loop is late by {milliseconds(sample.loop_lag_p50)} (median): {busy}.")
    elif stall := state.longest_stall(now):
        yield _warning(
            f"The event loop was blocked for {duration(stall)}, for example by another running cell; the run made no progress meanwhile."
        )
    if state.constant_groups_in_a_row >= CONSTANT_GROUPS:
        yield _warning(
            f"All rewards were equal within each of the last {state.constant_groups_in_a_row:,} groups, so nothing is learned from them: "
            "the questions are too hard or too easy for the model, or its samples are too similar."
        )
    if sample.limited_by == "service":
        yield _warning("The service is rate limiting (too many requests): concurrency is reduced until it recovers.")
    elif sample.limited_by == "client" and not is_late:
        yield Alert(kind="info", text="This process is CPU-bound: more workers would roll out more episodes.")


def _warning(text: str) -> Alert:
    return Alert(kind="warning", text=text)
