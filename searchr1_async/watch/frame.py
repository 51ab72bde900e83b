"""The live view's text: one frame of plain JSON values, for widget and rich text alike. Pure.

Untrusted text (model names, notices, errors) is made visible, put on one line and truncated here, so a page only sets it as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypedDict

from searchr1_async.boundary.paths import shown_name, shown_path
from searchr1_async.watch.console import _one_line, duration
from searchr1_async.watch.snapshot import CURVES, PhaseState, Snapshot

LATE_FOR = 2.0
"""Seconds that the event loop must be late before an alert."""
CONSTANT_GROUPS = 16
"""Constant groups in a row before an alert: if half of all groups are mixed, chance produces this once in 65,000."""
NOTICE_SECONDS = 600.0
"""How long a warning stays visible."""

_TITLES = {"train": "Training", "evaluate": "Evaluating", "rollout": "Rolling out"}
_PAST = {"train": "Trained", "evaluate": "Evaluated", "rollout": "Rolled out"}
_DROPPED = {
    "constant_reward": "constant reward",
    "too_few_episodes": "too few episodes",
    "too_slow": "too slow",
    "step_time_limit": "step time limit",
}
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


def frame(snapshot: Snapshot, title: str = "") -> Frame:
    """Everything that a view shows at this moment.

    Args:
        title: shown until kind and model of the work are known.
    """
    return Frame(
        title=heading(snapshot, title),
        standing=snapshot.standing,
        badge=shown(snapshot.reason, 40) if snapshot.standing == "ended" else snapshot.standing,
        progress=_progress(snapshot),
        status=_status(snapshot),
        bars=[_bar(phase) for phase in snapshot.phases],
        alerts=list(_alerts(snapshot))[:6],
        stacks=_stacks(snapshot),
        curves=_curves(snapshot) if snapshot.kind == "train" else {},
        running=_running(snapshot),
        sections=_sections(snapshot),
    )


def summary(snapshot: Snapshot, title: str = "") -> str:
    """The outcome in one paragraph of plain text."""
    said = [heading(snapshot, title)]
    if snapshot.kind == "train":
        said[0] += f": {counted_steps(snapshot)}"
    said[0] += f" in {duration(snapshot.seconds)}, {shown(snapshot.reason, 40) or 'still running'}."
    if snapshot.latest:
        parts = [
            f"{_HEADINGS[name].lower()} {text}" for name in CURVES if (text := _value(name, snapshot.latest.get(name)))
        ]
        if parts:
            said.append(f"Last step: {', '.join(parts)}.")
    for point in snapshot.evaluations:
        said.append(
            f"{shown(point.label, 60)}: exact match {point.exact_match:.1%} ({point.low:.1%} to {point.high:.1%})."
        )
    if snapshot.finished_episodes:
        tokens = f"{compact(snapshot.used.sampled)} tokens sampled"
        episodes = f"{snapshot.finished_episodes:,} episodes"
        whole = f"This session: {episodes}. In total: " if snapshot.is_resumed else f"{episodes}, "
        said.append(f"{whole}{tokens}, cost: {shown(snapshot.cost.text, 60)}.")
    if snapshot.out_dir:
        said.append(f"Saved in {shown(shown_path(snapshot.out_dir))}.")
    if snapshot.warnings:
        said.append(f"Last warning: {shown(snapshot.warnings[-1].text)}")
    return " ".join(said)


_HEADINGS = {
    "reward": "Reward",
    "exact_match": "Exact match",
    "turns": "Turns per episode",
    "valid_calls": "Valid calls",
}


def shown(text: str, most: int = 300) -> str:
    """Untrusted ``text`` on one line, invisible characters escaped, truncated."""
    cut = text[:most]
    return _one_line(cut).strip() + ("…" if len(text) > most else "")


def compact(count: int) -> str:
    """Format a count: ``987``, ``12.3 k``, ``4.56 M``, ``1.20 G``."""
    for size, unit, digits in ((10**9, "G", 2), (10**6, "M", 2), (10**4, "k", 1)):
        if count >= size:
            return f"{count / (1000 if unit == 'k' else size):.{digits}f} {unit}"
    return f"{count:,}"


def milliseconds(seconds: float) -> str:
    """Format a short time."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else duration(seconds)


def heading(snapshot: Snapshot, title: str = "") -> str:
    """Title of the work; ``title`` until kind and model are known."""
    if not snapshot.model:
        return shown(title) or "Starting"
    return f"{(_PAST if snapshot.standing == 'ended' else _TITLES).get(snapshot.kind, 'Running')} {shown(shown_name(snapshot.model), 80)}"


def counted_steps(snapshot: Snapshot) -> str:
    """``24 of 60 steps``."""
    return (
        f"{snapshot.step:,} steps"
        if snapshot.total_steps is None
        else f"{snapshot.step:,} of {snapshot.total_steps:,} steps"
    )


def _progress(snapshot: Snapshot) -> str:
    if snapshot.kind == "train" and (snapshot.step or any(phase.name == "train" for phase in snapshot.phases)):
        return f"Step {counted_steps(snapshot).removesuffix(' steps')}"
    main = _main_phase(snapshot)
    if main is not None:
        return f"{shown(main.name).capitalize()}: {main.done:,} of {main.total:,} {shown(main.unit)}"
    if snapshot.finished_episodes and snapshot.kind != "train":
        return f"{snapshot.finished_episodes:,} episodes"
    return shown(snapshot.last_notice, 160) if snapshot.standing == "starting" else ""


def _status(snapshot: Snapshot) -> str:
    if snapshot.standing == "ended":
        return f"{duration(snapshot.seconds)} in total"
    main = _main_phase(snapshot)
    left = "" if main is None or main.seconds_left is None else f", about {duration(main.seconds_left)} left"
    return f"{duration(snapshot.seconds)} so far{left}"


def _main_phase(snapshot: Snapshot) -> PhaseState | None:
    """The training phase if there is one, else the first."""
    return next((phase for phase in snapshot.phases if phase.name == "train"), next(iter(snapshot.phases), None))


_PHASE_METRICS = {
    "correct": "exact match {:.1%}",
    "reward/total": "reward {:+.3f}",
    "turns_per_episode": "{:.2f} turns per episode",
    "valid_calls": "{:.0%} of calls valid",
    "failed_episodes": "{:.0f} episodes FAILED",
}
"""Running metrics of an evaluation or a rollout."""


def _bar(phase: PhaseState) -> Bar:
    name = f"{shown(phase.name)} ({shown(phase.label)})" if phase.label else shown(phase.name)
    text = f"{phase.done:,} of {phase.total:,} {shown(phase.unit)}"
    for metric, words in _PHASE_METRICS.items():
        if (value := phase.metrics.get(metric)) is not None:
            text += ", " + words.format(value)
    if phase.seconds_left is not None:
        text += f", {duration(phase.seconds_left)} left"
    return Bar(name=name, text=text, share=min(1.0, max(0.0, phase.done / phase.total)) if phase.total > 0 else 0.0)


def _stacks(snapshot: Snapshot) -> list[Stack]:
    if snapshot.standing == "ended":
        return []
    between = max(0, snapshot.episodes - snapshot.sampling - snapshot.queued - snapshot.searching)
    stages = [
        Part(name="sampling", count=snapshot.sampling),
        Part(name="queued", count=snapshot.queued),
        Part(name="searching", count=snapshot.searching),
        Part(name="in between", count=between),
    ]
    finished = f", {snapshot.batch.episodes:,} finished in this batch" if snapshot.kind == "train" else ""
    stacks = [
        Stack(
            title=f"{snapshot.episodes:,} episodes in flight{finished}",
            parts=stages,
            whole=max(1, sum(part["count"] for part in stages)),
        )
    ]
    if snapshot.batch_groups:
        parts = [
            Part(name="taken", count=snapshot.taken_groups),
            Part(name="waiting", count=snapshot.waiting_groups),
            Part(name="in progress", count=snapshot.groups),
        ]
        title = f"Batch {snapshot.step_of_batch:,}: {snapshot.taken_groups:,} of {snapshot.batch_groups:,} groups taken"
        stacks.append(Stack(title=title, parts=parts, whole=max(snapshot.batch_groups, sum(p["count"] for p in parts))))
    return stacks


def _value(curve: str, value: float | None) -> str:
    if value is None:
        return ""
    return {"reward": f"{value:+.3f}", "turns": f"{value:.2f}"}.get(curve, f"{value:.1%}")


def _curves(snapshot: Snapshot) -> dict[str, str]:
    said: dict[str, str] = {}
    for name in CURVES:
        settled, open_batch = _value(name, snapshot.latest.get(name)), _value(name, snapshot.batch.values.get(name))
        parts = [settled] if settled else []
        if open_batch and snapshot.standing != "ended":
            # The spread of a fraction follows from the fraction.
            spread = snapshot.batch.spread.get(name) if name in ("reward", "turns") else None
            parts.append(f"now {open_batch}" + (f" ± {spread:.2f}" if spread is not None else ""))
        said[name] = ", ".join(parts)
    return said


def _running(snapshot: Snapshot) -> dict[str, float | None]:
    if not snapshot.batch.values or snapshot.standing == "ended" or snapshot.kind != "train":
        return {}
    # Rounded: changes below chart resolution need not be sent again.
    row: dict[str, float | None] = {name: _rounded(snapshot.batch.values.get(name)) for name in CURVES}
    row["step"] = float(max(snapshot.step + 1, snapshot.step_of_batch))
    return row


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _sections(snapshot: Snapshot) -> list[Section]:
    sections, used = [_rollouts(snapshot)], snapshot.used
    if snapshot.kind == "train":
        sections.append(_learning(snapshot))
    if (search := _search(snapshot)) is not None:
        sections.append(search)
    sections.append(
        Section(
            title="Tokens",
            rows=[
                ("prompt", compact(used.prompt)),
                ("cached", compact(used.cached)),
                ("sampled", compact(used.sampled)),
                *([("trained", compact(used.trained))] if snapshot.kind == "train" else []),
                ("cost", shown(snapshot.cost.text, 60)),
            ],
        )
    )
    if snapshot.cpu is not None:
        lag = f"{milliseconds(snapshot.loop_lag_p50)} / {milliseconds(snapshot.loop_lag_p99)}"
        sections.append(
            Section(title="This process", rows=[("loop lag p50 / p99", lag), ("CPU", f"{snapshot.cpu:.2f} of a core")])
        )
    if snapshot.evaluations:
        rows = [
            (shown(point.label, 40), f"{point.exact_match:.1%}  [{point.low:.1%}, {point.high:.1%}]")
            for point in reversed(snapshot.evaluations)
        ]
        suites = snapshot.evaluations[-1].suites
        if len(suites) > 1:  # suites of the newest evaluation, right below it
            rows[1:1] = [(f"· {shown(suite, 40)}", f"{share:.1%}") for suite, share in suites.items()]
        sections.append(Section(title="Exact match, 95 % interval", rows=rows))
    return sections


def _rollouts(snapshot: Snapshot) -> Section:
    rows = [("episodes finished", f"{snapshot.finished_episodes:,}")]
    if snapshot.standing != "ended":
        rows.append(("episodes per second", f"{snapshot.episodes_per_second:.1f}"))
        if snapshot.limited_by:
            rows.append(("limited by", _LIMITS.get(snapshot.limited_by, shown(snapshot.limited_by, 40))))
    if snapshot.kind != "train" and snapshot.batch.values:
        rows += [
            (_HEADINGS[name].lower(), _value(name, snapshot.batch.values.get(name)))
            for name in CURVES
            if name in snapshot.batch.values
        ]
    if snapshot.batch.failed:
        rows.append(("failed recently", f"{snapshot.batch.failed:,} of {snapshot.batch.episodes:,}"))
    return Section(title="Rollouts", rows=rows)


def _learning(snapshot: Snapshot) -> Section:
    rows = [("trainer", snapshot.trainer or "not started")] if snapshot.standing != "ended" else []
    rows.append(("latest weights", f"version {snapshot.policy_version:,}"))
    if snapshot.staleness is not None:
        rows.append(("staleness, mean", f"{snapshot.staleness:.2f} steps"))
    if snapshot.seconds_per_step is not None:
        rows.append(("last step took", duration(snapshot.seconds_per_step)))
    for reason, count in sorted(snapshot.dropped.items()):
        label = _DROPPED.get(reason, shown(reason, 40))
        rows.append((f"dropped: {label}", f"{count:,} of {max(snapshot.finished_groups, count):,}"))
    return Section(title="Learning", rows=rows)


def _search(snapshot: Snapshot) -> Section | None:
    search = snapshot.search
    if search is None:
        return None
    rows = [
        ("queries per second", f"{search.queries_per_second:.1f}"),
        ("cache hits", f"{search.cache_hit_rate:.0%}"),
        ("p50 / p99", f"{milliseconds(search.p50)} / {milliseconds(search.p99)}"),
        ("retries", f"{search.faults:,}"),
    ]
    if search.failed:
        rows.append(("failed", f"{search.failed:,}"))
    return Section(title="Search", rows=rows)


def _alerts(snapshot: Snapshot) -> Iterator[Alert]:
    if snapshot.standing == "paused":
        yield Alert(kind="info", text="Paused: no new requests are sent until the run is resumed.")
    if snapshot.standing != "ended":
        yield from _troubles(snapshot)
    for notice in reversed(snapshot.warnings):
        if notice.age < NOTICE_SECONDS or snapshot.standing == "ended":
            times = f" ({notice.count} times)" if notice.count > 1 else ""
            yield Alert(kind="warning", text=shown(notice.text, 400) + times)


def _troubles(snapshot: Snapshot) -> Iterator[Alert]:
    search, batch = snapshot.search, snapshot.batch
    if search is not None and search.seconds_down > 0:
        yield _warning(
            f"Search has been down for {duration(search.seconds_down)}: episodes wait and continue when it is back."
        )
    elif search is not None and search.failed_lately:
        yield _warning(
            f"{search.failed_lately:,} searches failed within the last 10 s; their episodes are not trained on."
        )
    if batch.failed >= 3 and batch.failed >= 0.1 * batch.episodes:
        last = f" Last error: {shown(batch.error, 200)}" if batch.error else ""
        yield _warning(f"{batch.failed:,} of {batch.episodes:,} recent episodes failed; they are not trained on.{last}")
    if snapshot.late_for >= LATE_FOR:
        busy = (
            f"this process uses {snapshot.cpu:.2f} of a core; more workers would share the load"
            if (snapshot.cpu or 0.0) >= 0.85
            else "something blocks it, such as another running cell or a slow reward function; move that to a thread"
        )
        yield _warning(f"The event loop is late by {milliseconds(snapshot.loop_lag_p50)} (median): {busy}.")
    elif snapshot.longest_stall:
        yield _warning(
            f"The event loop was blocked for {duration(snapshot.longest_stall)}, for example by another running cell; the run made no progress meanwhile."
        )
    if snapshot.constant_groups_in_a_row >= CONSTANT_GROUPS:
        yield _warning(
            f"All rewards were equal within each of the last {snapshot.constant_groups_in_a_row:,} groups, so nothing is learned from them: "
            "the questions are too hard or too easy for the model, or its samples are too similar."
        )
    if snapshot.limited_by == "service":
        yield _warning("The service is rate limiting (too many requests): concurrency is reduced until it recovers.")
    elif snapshot.limited_by == "client" and snapshot.late_for < LATE_FOR:
        yield Alert(kind="info", text="This process is CPU-bound: more workers would roll out more episodes.")


def _warning(text: str) -> Alert:
    return Alert(kind="warning", text=text)
