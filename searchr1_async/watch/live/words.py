"""What a live view says of a run: one frame of plain JSON values for the widget's page and for rich text alike. Pure.

Every text that comes from outside (a model's name, a notice, an error) is made visible here, on one line and cut, so that a
page has only to set it as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypedDict

from searchr1_async.boundary.paths import shown_name, shown_path
from searchr1_async.watch.live.series import CURVES
from searchr1_async.watch.live.snapshot import PhaseState, Snapshot
from searchr1_async.watch.progress import _one_line, duration

LATE_FOR = 2.0
"""Seconds for which the event loop must have been late before it is said: one long piece of work is no state."""
CONSTANT_GROUPS = 16
"""So many groups in a row in which no reward differs are worth a word: where half of all groups differ, chance makes it once in
65,000."""
NOTICE_SECONDS = 600.0
"""For so long a warning stays in sight."""

_TITLES = {"train": "Training", "evaluate": "Evaluating", "rollout": "Playing"}
_PAST = {"train": "Trained", "evaluate": "Evaluated", "rollout": "Played"}
_DROPPED = {
    "constant_reward": "all alike",
    "too_few_episodes": "too few episodes",
    "too_slow": "too slow",
    "step_time_limit": "step's time limit",
}
_LIMITS = {
    "growing": "growing",
    "work": "no more is wanted",
    "settings": "the settings",
    "service": "the service pushes back",
    "queue": "the service queues",
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
    """At least the sum of the parts; the rest stays empty."""


class Section(TypedDict):
    title: str
    rows: list[tuple[str, str]]


class Frame(TypedDict):
    title: str
    standing: str
    """``starting``, ``running``, ``paused`` or ``ended``."""
    badge: str
    progress: str
    """How far it is: what a screen reader is told when it changes."""
    status: str
    """Times."""
    bars: list[Bar]
    alerts: list[Alert]
    stacks: list[Stack]
    curves: dict[str, str]
    """The newest value of each, in words; empty where the work has no steps."""
    running: dict[str, float | None]
    """The open batch so far, as one row of the curves; empty before its first episode."""
    sections: list[Section]


def frame(snapshot: Snapshot, title: str = "") -> Frame:
    """Everything that a view says at this moment.

    Args:
        title: of the work, until its kind and model are known.
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
    """What the work came to, in one paragraph of plain text."""
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
        whole = f"In this session: {episodes}. In all: " if snapshot.is_resumed else f"{episodes}, "
        said.append(f"{whole}{tokens}, cost: {shown(snapshot.cost.text, 60)}.")
    if snapshot.out_dir:
        said.append(f"Kept in {shown(shown_path(snapshot.out_dir))}.")
    if snapshot.warnings:
        said.append(f"Last warning: {shown(snapshot.warnings[-1].text)}")
    return " ".join(said)


_HEADINGS = {
    "reward": "Reward",
    "exact_match": "Exact match",
    "turns": "Turns an episode",
    "valid_calls": "Valid calls",
}


def shown(text: str, most: int = 300) -> str:
    """``text`` of unknown origin on one line, nothing in it unseen, and cut where it is long."""
    cut = text[:most]
    return _one_line(cut).strip() + ("…" if len(text) > most else "")


def compact(count: int) -> str:
    """A count for people: ``987``, ``12.3 k``, ``4.56 M``, ``1.20 G``."""
    for size, unit, digits in ((10**9, "G", 2), (10**6, "M", 2), (10**4, "k", 1)):
        if count >= size:
            return f"{count / (1000 if unit == 'k' else size):.{digits}f} {unit}"
    return f"{count:,}"


def milliseconds(seconds: float) -> str:
    """A short time for people."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else duration(seconds)


def heading(snapshot: Snapshot, title: str = "") -> str:
    """A name for the work: ``title`` until it is known what is done with which model."""
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
        return f"{duration(snapshot.seconds)} in all"
    main = _main_phase(snapshot)
    left = "" if main is None or main.seconds_left is None else f", about {duration(main.seconds_left)} left"
    return f"{duration(snapshot.seconds)} so far{left}"


def _main_phase(snapshot: Snapshot) -> PhaseState | None:
    """Training, where an evaluation runs beside it."""
    return next((phase for phase in snapshot.phases if phase.name == "train"), next(iter(snapshot.phases), None))


_PHASE_METRICS = {
    "correct": "exact match {:.1%}",
    "reward/total": "reward {:+.3f}",
    "turns_per_episode": "{:.2f} turns an episode",
    "valid_calls": "{:.0%} of calls valid",
    "failed_episodes": "{:.0f} episodes FAILED",
}
"""Of an evaluation or a rollout, so far."""


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
            Part(name="under way", count=snapshot.groups),
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
            # A share's spread says nothing that the share does not.
            spread = snapshot.batch.spread.get(name) if name in ("reward", "turns") else None
            parts.append(f"now {open_batch}" + (f" ± {spread:.2f}" if spread is not None else ""))
        said[name] = ", ".join(parts)
    return said


def _running(snapshot: Snapshot) -> dict[str, float | None]:
    if not snapshot.batch.values or snapshot.standing == "ended" or snapshot.kind != "train":
        return {}
    # Four digits: what is not seen in a curve need not be sent again.
    row: dict[str, float | None] = {name: _rounded(snapshot.batch.values.get(name)) for name in CURVES}
    row["step"] = float(max(snapshot.step + 1, snapshot.step_of_batch))
    return row


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _sections(snapshot: Snapshot) -> list[Section]:
    sections, used = [_playing(snapshot)], snapshot.used
    if snapshot.kind == "train":
        sections.append(_learning(snapshot))
    if (search := _search(snapshot)) is not None:
        sections.append(search)
    sections.append(
        Section(
            title="Tokens",
            rows=[
                ("read", compact(used.prompt)),
                ("of them cached", compact(used.cached)),
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
        if len(suites) > 1:  # of the newest, right below it
            rows[1:1] = [(f"· {shown(suite, 40)}", f"{share:.1%}") for suite, share in suites.items()]
        sections.append(Section(title="Exact match, 95 % interval", rows=rows))
    return sections


def _playing(snapshot: Snapshot) -> Section:
    rows = [("episodes finished", f"{snapshot.finished_episodes:,}")]
    if snapshot.standing != "ended":
        rows.append(("episodes a second", f"{snapshot.episodes_a_second:.1f}"))
        if snapshot.limited_by:
            rows.append(("held down by", _LIMITS.get(snapshot.limited_by, shown(snapshot.limited_by, 40))))
    if snapshot.kind != "train" and snapshot.batch.values:
        rows += [
            (_HEADINGS[name].lower(), _value(name, snapshot.batch.values.get(name)))
            for name in CURVES
            if name in snapshot.batch.values
        ]
    if snapshot.batch.failed:
        rows.append(("failed lately", f"{snapshot.batch.failed:,} of {snapshot.batch.episodes:,}"))
    return Section(title="Playing", rows=rows)


def _learning(snapshot: Snapshot) -> Section:
    rows = [("trainer", snapshot.trainer or "not begun")] if snapshot.standing != "ended" else []
    rows.append(("newest weights", f"version {snapshot.policy_version:,}"))
    if snapshot.staleness is not None:
        rows.append(("staleness, mean", f"{snapshot.staleness:.2f} steps"))
    if snapshot.seconds_a_step is not None:
        rows.append(("last step took", duration(snapshot.seconds_a_step)))
    for reason, count in sorted(snapshot.dropped.items()):
        label = _DROPPED.get(reason, shown(reason, 40))
        rows.append((f"dropped: {label}", f"{count:,} of {max(snapshot.finished_groups, count):,}"))
    return Section(title="Learning", rows=rows)


def _search(snapshot: Snapshot) -> Section | None:
    search = snapshot.search
    if search is None:
        return None
    rows = [
        ("queries a second", f"{search.queries_a_second:.1f}"),
        ("cache hits", f"{search.cache_hit_rate:.0%}"),
        ("p50 / p99", f"{milliseconds(search.p50)} / {milliseconds(search.p99)}"),
        ("requests retried", f"{search.faults:,}"),
    ]
    if search.failed:
        rows.append(("failed for good", f"{search.failed:,}"))
    return Section(title="Search", rows=rows)


def _alerts(snapshot: Snapshot) -> Iterator[Alert]:
    if snapshot.standing == "paused":
        yield Alert(kind="info", text="Paused: nothing more is asked of the services until it is resumed.")
    if snapshot.standing != "ended":
        yield from _troubles(snapshot)
    for notice in reversed(snapshot.warnings):
        if notice.age < NOTICE_SECONDS or snapshot.standing == "ended":
            times = f" (said {notice.count} times)" if notice.count > 1 else ""
            yield Alert(kind="warning", text=shown(notice.text, 400) + times)


def _troubles(snapshot: Snapshot) -> Iterator[Alert]:
    search, batch = snapshot.search, snapshot.batch
    if search is not None and search.seconds_down > 0:
        yield _warning(
            f"The search has been down for {duration(search.seconds_down)}: episodes wait for it, and go on when it answers."
        )
    elif search is not None and search.failed_lately:
        yield _warning(
            f"{search.failed_lately:,} searches failed within the last 10 s: their episodes are not trained on."
        )
    if batch.failed >= 3 and batch.failed >= 0.1 * batch.episodes:
        last = f" The last said: {shown(batch.error, 200)}" if batch.error else ""
        yield _warning(f"{batch.failed:,} of {batch.episodes:,} episodes failed lately; they are not trained on.{last}")
    if snapshot.late_for >= LATE_FOR:
        busy = (
            f"this process uses {snapshot.cpu:.2f} of a core, and more workers would share its work"
            if (snapshot.cpu or 0.0) >= 0.85
            else "something holds it, such as another cell that computes, or a reward function that takes long; move that to a thread"
        )
        yield _warning(f"The event loop is late by {milliseconds(snapshot.loop_lag_p50)} (median): {busy}.")
    elif snapshot.longest_hold:
        yield _warning(
            f"The event loop stood still for {duration(snapshot.longest_hold)}, such as by another cell that computes: the run waited meanwhile."
        )
    if snapshot.constant_groups_in_a_row >= CONSTANT_GROUPS:
        yield _warning(
            f"In the last {snapshot.constant_groups_in_a_row:,} groups no reward differs within a group, so nothing is learned from them: "
            "the questions are too hard or too easy for the model, or it samples too much alike."
        )
    if snapshot.limited_by == "service":
        yield _warning("The service pushes back (too many requests): fewer samples are in flight until it is quiet.")
    elif snapshot.limited_by == "client" and snapshot.late_for < LATE_FOR:
        yield Alert(kind="info", text="This process plays as much as it can: more workers would play more.")


def _warning(text: str) -> Alert:
    return Alert(kind="warning", text=text)
