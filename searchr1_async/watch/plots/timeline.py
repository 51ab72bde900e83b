"""Timeline of one step from the event log: what episodes and the trainer waited for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from searchr1_async.watch.trackers.lines import LoggedEvent, session_events, steps_of

STAGES = ("sampling", "queued", "searching", "in between")
"""Stages of an episode in flight: at the model, waiting for it, at the search, or between two of these."""


@dataclass(frozen=True, slots=True)
class Span:
    """A period of one trainer state, in seconds since the batch was opened."""

    start: float
    end: float
    state: str
    """``idle``, ``learning`` (minibatch gradients) or ``stepping`` (optimiser step and publishing weights)."""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Mark:
    """An event at one moment."""

    second: float
    what: str
    """``group finished``, ``group dropped`` or ``weights published``."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step, from opening its batch to publishing its weights."""

    step: int
    seconds: float
    is_over: bool
    """Its weights are published; otherwise the timeline ends with the events."""
    samples: tuple[tuple[float, Mapping[str, float]], ...]
    """Second, and episodes by stage from then on."""
    spans: tuple[Span, ...]
    """Trainer states, without gaps."""
    marks: tuple[Mark, ...]

    def trainer_share(self, state: str) -> float:
        """Fraction of the step's time."""
        return sum(span.seconds for span in self.spans if span.state == state) / self.seconds if self.seconds else 0.0

    def stage_shares(self) -> dict[str, float]:
        """Fractions of the total episode time in the step; empty without samples."""
        ends = [second for second, _ in (*self.samples, (self.seconds, None))][1:]
        spent = dict.fromkeys(STAGES, 0.0)
        for (start, counts), end in zip(self.samples, ends, strict=True):
            for stage in STAGES:
                spent[stage] += counts[stage] * (end - start)
        total = sum(spent.values())
        return {stage: value / total for stage, value in spent.items()} if total else {}


def timeline_of(events: Iterable[LoggedEvent], step: int | None = None) -> Timeline | None:
    """A step's timeline; None if the events have no such step.

    Args:
        events: a run's event log, with all sessions. Of a step that a resumed run redid, the last session counts.
        step: counted from 1; None for the last step with published weights, else the first step.
    """
    log = list(events)
    session = session_events(log, step)
    if step is None:
        published = [event.values["step"] for event in _named(session, "WeightsPublished") if event.values["step"] > 0]
        steps = [number for number in steps_of(session) if number > 0]
        step = max((number for number in published if number in steps), default=steps[0] if steps else None)
    if step is None or not session:
        return None
    start = _opened(session, step)
    if start is None:
        return None
    end, is_over = _published(session, step)
    end = max(end, start)
    samples = tuple(_samples(session, start, end))
    return Timeline(
        step, end - start, is_over, samples, tuple(_spans(session, start, end)), tuple(_marks(session, start, end))
    )


def _named(events: Iterable[LoggedEvent], *names: str) -> list[LoggedEvent]:
    return [event for event in events if event.name in names]


def _opened(session: Sequence[LoggedEvent], step: int) -> float | None:
    """When the batch was opened: from ``PipelineChanged``, else when the previous one closed or training started.

    On-policy, its rollouts only start once the previous step's weights are published.
    """
    if _staleness(session) == 0:
        for event in _named(session, "WeightsPublished"):
            if event.values.get("step") == step - 1:
                return event.time
    for event in session:
        if event.name == "PipelineChanged" and event.values.get("step") == step:
            return event.time
    closed = [event.time for event in _named(session, "BatchClosed") if event.values.get("step") == step - 1]
    if closed:
        return closed[-1]
    began = [event.time for event in _named(session, "PhaseStarted") if event.values.get("phase") == "train"]
    is_first = min(steps_of(session), default=step) == step
    if is_first and began:
        return began[-1]
    return next((event.time for event in session if event.values.get("step") == step), None)


def _staleness(session: Sequence[LoggedEvent]) -> object:
    """``max_staleness`` of the run; None if unknown."""
    settings = next((event.values.get("settings") for event in _named(session, "RunStarted")), None)
    pipeline = settings.get("pipeline") if isinstance(settings, Mapping) else None
    return pipeline.get("max_staleness") if isinstance(pipeline, Mapping) else None


def _published(session: Sequence[LoggedEvent], step: int) -> tuple[float, bool]:
    for name in ("WeightsPublished", "StepFinished"):
        for event in _named(session, name):
            if event.values.get("step") == step:
                return event.time, True
    return session[-1].time, False


def _samples(session: Sequence[LoggedEvent], start: float, end: float) -> Iterable[tuple[float, Mapping[str, float]]]:
    """Episodes by stage; the last sample before the start is used at the start."""
    before: Mapping[str, float] | None = None
    started = False
    for event in _named(session, "RolloutSampled"):
        if event.time > end:
            break
        counts = _by_stage(event.values)
        if event.time <= start:
            before = counts
            continue
        if not started and before is not None:
            yield 0.0, before
        started = True
        yield event.time - start, counts
    if not started and before is not None:
        yield 0.0, before


def _by_stage(values: Mapping[str, float]) -> dict[str, float]:
    counts = {stage: float(values.get(stage, 0)) for stage in STAGES[:3]}
    return counts | {"in between": max(0.0, float(values.get("episodes", 0)) - sum(counts.values()))}


def _spans(session: Sequence[LoggedEvent], start: float, end: float) -> Iterable[Span]:
    """Trainer states between all changes; equal neighbours are merged."""
    changes = sorted([*_learning_changes(session), *_stepping_changes(session)])
    learning = stepping = 0
    at, state = start, "idle"
    spans: list[Span] = []
    for moment, is_learning, change in [*changes, (end, False, 0)]:
        until = min(max(moment, start), end)
        if until > at:
            if spans and spans[-1].state == state:
                spans[-1] = Span(spans[-1].start, until - start, state)
            else:
                spans.append(Span(at - start, until - start, state))
            at = until
        learning, stepping = learning + (change if is_learning else 0), stepping + (0 if is_learning else change)
        state = "learning" if learning > 0 else "stepping" if stepping > 0 else "idle"
    return spans


def _learning_changes(session: Sequence[LoggedEvent]) -> Iterable[tuple[float, bool, int]]:
    """A minibatch is open until its gradient arrives, or at the latest until its batch's weights are published."""
    open_of_step: dict[int, int] = {}
    for event in _named(session, "MinibatchSubmitted", "MinibatchLearned", "WeightsPublished"):
        step = event.values.get("step", 0)
        if event.name == "MinibatchSubmitted":
            open_of_step[step] = open_of_step.get(step, 0) + 1
            yield event.time, True, 1
        elif event.name == "MinibatchLearned" and open_of_step.get(step, 0):
            open_of_step[step] -= 1
            yield event.time, True, -1
        elif event.name == "WeightsPublished":
            for _ in range(open_of_step.pop(step, 0)):
                yield event.time, True, -1


def _stepping_changes(session: Sequence[LoggedEvent]) -> Iterable[tuple[float, bool, int]]:
    closed: set[int] = set()
    for event in _named(session, "BatchClosed", "WeightsPublished"):
        step = event.values.get("step", 0)
        if event.name == "BatchClosed" and step not in closed:
            closed.add(step)
            yield event.time, False, 1
        elif event.name == "WeightsPublished" and step in closed:
            closed.remove(step)
            yield event.time, False, -1


def _marks(session: Sequence[LoggedEvent], start: float, end: float) -> Iterable[Mark]:
    for event in session:
        if not start <= event.time <= end:
            continue
        second, values = event.time - start, event.values
        if event.name == "GroupFinished":
            yield Mark(second, "group finished", _versions(values))
        elif event.name == "GroupDropped":
            yield Mark(second, "group dropped", str(values.get("reason", "")))
        elif event.name == "WeightsPublished":
            yield Mark(second, "weights published", f"after step {values.get('step')}")


def _versions(values: Mapping[str, object]) -> str:
    versions = values.get("policy_versions")
    return f"weights of step {', '.join(map(str, versions))}" if isinstance(versions, list) and versions else ""


def step_summary(timeline: Timeline) -> list[str]:
    """One or two lines on what the trainer and the episodes waited for."""
    seconds = _seconds(timeline.seconds)
    trainer = f"the trainer was idle {timeline.trainer_share('idle'):.0%} of {seconds}"
    busy = [
        f"{doing} {timeline.trainer_share(state):.0%}"
        for state, doing in (("learning", "learning"), ("stepping", "updating weights"))
        if timeline.trainer_share(state) >= 0.005
    ]
    lines = [", ".join([trainer, *busy]) + ("" if timeline.is_over else " (in progress)")]
    if shares := timeline.stage_shares():
        names = {"sampling": "sampling", "queued": "in the sampling queue", "searching": "searching"}
        parts = [f"{shares[stage]:.0%} {name}" for stage, name in names.items() if shares[stage] >= 0.005]
        if parts:
            lines.append(f"episode time: {', '.join(parts)}")
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def joined(samples: Sequence[tuple[float, Mapping[str, float]]], most: int) -> list[tuple[float, Mapping[str, float]]]:
    """At most ``most`` samples: neighbours are merged into their time-weighted mean."""
    if len(samples) <= most:
        return list(samples)
    size = -(-len(samples) // most)
    out: list[tuple[float, Mapping[str, float]]] = []
    for place in range(0, len(samples), size):
        chunk = samples[place : place + size + 1]
        held = [max(later - earlier, 1e-9) for (earlier, _), (later, _) in pairwise(chunk)] or [1.0]
        kept = chunk[: len(held)]
        total = sum(held)
        means = {stage: sum(c[stage] * t for (_, c), t in zip(kept, held, strict=True)) / total for stage in STAGES}
        out.append((chunk[0][0], means))
    return out
