"""State of a run, folded from its events: the one fold behind console, live view and final picture.

Pure: the caller passes the time in. Memory is bounded however long the run, and :meth:`RunState.see` takes microseconds.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from searchr1_async.billing import Billing, Cost, TokenUsage, billing_of
from searchr1_async.episodes.types import Episode
from searchr1_async.events import (
    BatchClosed,
    BesideSampled,
    EpisodeFinished,
    EvaluationFinished,
    Event,
    GroupDropped,
    GroupFinished,
    MinibatchLearned,
    MinibatchSubmitted,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    PipelineChanged,
    RolloutSampled,
    RunEnded,
    RunPaused,
    RunResumed,
    RunStarted,
    ServiceAnswers,
    ServiceSilent,
    StepFinished,
    WeightsPublished,
)
from searchr1_async.records.metrics import CURVES, EpisodeMeans
from searchr1_async.watch.progress import Estimate, Pauses, Phase, Series, finite

LATE_SECONDS = 0.02
"""Median lag from which the event loop counts as late; an idle loop is under 1 ms."""
RATE_SECONDS = 10.0
"""Window for rates."""
STALL_SECONDS = 30.0
"""How long a stall of the event loop is remembered."""
MOST_EVALUATIONS = 200
_MOST_NOTICES = 6
_MOST_PHASES = 8
_MOST_OPEN_STEPS = 16
_LONGEST_TEXT = 500
"""Maximum characters kept of a notice or an error: a service's error response can be a whole page."""

Standing = Literal["starting", "running", "paused", "ended"]


@dataclass(slots=True)
class StepCounts:
    """Counts of one step; kept per step because steps overlap."""

    episodes: int = 0
    groups: int = 0
    dropped: int = 0
    trained: int = 0
    """Groups submitted to the trainer."""


@dataclass(slots=True)
class OpenBatch:
    """Episodes finished since the last batch was closed."""

    episodes: int = 0
    """Complete and failed."""
    failed: int = 0
    error: str = ""
    """Of the most recent failed episode."""
    means: EpisodeMeans = field(default_factory=EpisodeMeans)
    """Over complete episodes."""

    def add(self, episode: Episode) -> None:
        self.episodes += 1
        if episode.is_complete:
            self.means.add(episode)
            return
        self.failed += episode.failed
        if episode.error:
            self.error = episode.error[:_LONGEST_TEXT]

    @property
    def values(self) -> dict[str, float]:
        """The known curves' means by name."""
        means = self.means.metrics()
        return {curve.name: value for curve in CURVES if (value := finite(means.get(curve.name))) is not None}


@dataclass(frozen=True, slots=True)
class EvaluationState:
    """Exact match of one held-out evaluation, with its 95 % interval."""

    label: str
    step: int | None
    mean: float
    low: float
    high: float
    suites: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Warned:
    """A warning, merged with equal ones."""

    text: str
    last: float
    """Time of the last occurrence."""
    count: int


@dataclass(frozen=True, slots=True)
class _Reading:
    """Totals at one time, from which rates are computed."""

    time: float
    episodes: int
    queries: float
    failed: float


@dataclass(slots=True)
class _Total:
    """A counter that survives engine restarts: each engine starts at 0, the sum continues."""

    before: int = 0
    last: int = 0

    def see(self, value: int) -> None:
        if value < self.last:
            self.before += self.last
        self.last = max(0, value)

    @property
    def value(self) -> int:
        return self.before + self.last


class RunState:
    """Folds a run's events. Attributes are for reading; those that depend on the time are methods."""

    def __init__(self) -> None:
        self.steps = Series()
        self.evaluations: list[EvaluationState] = []
        """Held-out evaluations; past :data:`MOST_EVALUATIONS`, every second one between the first and the last is dropped."""
        self.evaluated = 0
        """Total evaluations seen."""
        self.run = RunStarted("train", "", False, "")
        """How the run started; without a model until then."""
        self.reason = ""
        """Why the run ended; empty before."""
        self.step = 0
        """Optimiser steps finished."""
        self.phases: dict[str, Phase] = {}
        """Active phases by name, in start order."""
        self.counts: dict[int, StepCounts] = {}
        """Counts of the unfinished steps, and of the last finished one."""
        self.batch = OpenBatch()
        self.pipeline: PipelineChanged | None = None
        self.dropped: Counter[str] = Counter()
        """Groups not trained on, by reason."""
        self.finished_groups = 0
        self.constant_groups_in_a_row = 0
        """Consecutive groups whose rewards are all equal; always 0 for a group size of 1."""
        self.warnings: deque[Warned] = deque(maxlen=_MOST_NOTICES)
        """Recent warnings, newest last."""
        self.last_notice = ""
        self.staleness: float | None = None
        """Mean over the last finished step, in optimiser steps."""
        self.seconds_per_step: float | None = None
        self._began: float | None = None
        self._ended_at: float | None = None
        self._pauses = Pauses()
        self._rollout: RolloutSampled | None = None
        self._published = 0
        self._finished_episodes = _Total()
        self._tokens = (_Total(), _Total(), _Total())
        """Prompt, cached prompt and sampled tokens of this session's engines."""
        self._other_usage = TokenUsage()
        """Tokens used by training and by ``ask`` in this session."""
        self._readings: deque[_Reading] = deque(maxlen=128)
        self._late_since: float | None = None
        self._stalls: deque[tuple[float, float]] = deque(maxlen=128)

    # --- the fold -----------------------------------------------------------------------------------------------------

    def see(self, event: Event, now: float) -> None:
        """Fold in ``event``; kinds that no view shows are ignored."""
        if self._began is None:
            self._began = now
        match event:
            case EpisodeFinished():
                self.batch.add(event.episode)
                self._counts(event.step).episodes += 1
            case RolloutSampled():
                self._sampled(event, now)
            case PipelineChanged():
                self.pipeline = event
            case GroupFinished():
                self._finished_group(event)
            case GroupDropped():
                self.dropped[event.reason[:80]] += 1
                self._counts(event.step).dropped += 1
            case MinibatchSubmitted():
                self._counts(event.step).trained += event.groups
            case MinibatchLearned():
                # Billed are an example's input tokens, which lack the last token.
                self._other_usage += TokenUsage(trained=max(0, event.tokens - event.datums))
            case BesideSampled(prompt, cached, sampled):
                self._other_usage += TokenUsage(prompt, cached, sampled)
            case StepFinished():
                self._finished_step(event, now)
            case _:
                self._see_rare(event, now)

    def _see_rare(self, event: Event, now: float) -> None:
        match event:
            case RunStarted():
                self.run = event
                self.step = max(self.step, event.step)
            case PhaseStarted() | PhaseAdvanced() | PhaseEnded():
                self._see_phase(event, now)
            case Notice():
                self._noticed(event, now)
            case BatchClosed():
                self.batch = OpenBatch()
            case WeightsPublished():
                self._published = max(self._published, event.step)
            case EvaluationFinished():
                self._evaluated(event)
            case RunPaused() | RunResumed() | ServiceSilent() | ServiceAnswers():
                self._pauses.see(event, [phase.estimate for phase in self.phases.values()], now)
            case RunEnded():
                self.end(event.reason, now)
            case _:
                pass

    def end(self, reason: str, now: float) -> None:
        """Mark the run as ended, for runs that never emit ``RunEnded``. Only the first call counts."""
        if self._ended_at is None:
            self._ended_at = now
            self.reason = reason
            self.phases.clear()

    def _see_phase(self, event: PhaseStarted | PhaseAdvanced | PhaseEnded, now: float) -> None:
        if isinstance(event, PhaseStarted):
            if event.phase not in self.phases and len(self.phases) >= _MOST_PHASES:
                self.phases.pop(next(iter(self.phases)))
            if event.phase == "train":  # evaluations during training leave the step counts alone
                self.counts.clear()
            estimate = Estimate(event.total, now, seconds_at_most=event.seconds_at_most)
            self._pauses.apply(estimate, now)
            self.phases[event.phase] = Phase(event, estimate)
        elif isinstance(event, PhaseEnded):
            self.phases.pop(event.phase, None)
        elif (phase := self.phases.get(event.phase)) is not None:
            phase.estimate.advance(event.done, now)
            if event.metrics:
                phase.metrics = dict(event.metrics)

    def _counts(self, step: int) -> StepCounts:
        if step not in self.counts:
            if len(self.counts) >= _MOST_OPEN_STEPS:
                self.counts.pop(min(self.counts))
            self.counts[step] = StepCounts()
        return self.counts[step]

    def _finished_group(self, event: GroupFinished) -> None:
        self.finished_groups += 1
        self._counts(event.step).groups += 1
        is_constant = event.group.is_constant and self.run.group_size > 1
        self.constant_groups_in_a_row = self.constant_groups_in_a_row + 1 if is_constant else 0

    def _sampled(self, event: RolloutSampled, now: float) -> None:
        self._rollout = event
        self._finished_episodes.see(event.finished_episodes)
        counts = (event.prompt_tokens, event.cached_prompt_tokens, event.sampled_tokens)
        for total, value in zip(self._tokens, counts, strict=True):
            total.see(value)
        queries, failed = _number(event.search, "search/queries"), _number(event.search, "search/failed")
        self._readings.append(_Reading(now, self.finished_episodes, queries, failed))
        if event.loop_lag_p50 < LATE_SECONDS:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        if event.loop_lag_max > 1.0:
            self._stalls.append((now, event.loop_lag_max))

    def _finished_step(self, event: StepFinished, now: float) -> None:
        self.steps.add(event.step, event.metrics)
        self.step = max(self.step, event.step)
        self.staleness = finite(event.metrics.get("env/all/staleness"))
        self.seconds_per_step = finite(event.metrics.get("time/total"))
        self.counts = {step: counts for step, counts in self.counts.items() if step >= event.step}
        phase = self.phases.get("train")
        if phase is not None and event.step > phase.estimate.done:
            phase.estimate.advance(event.step, now)

    def _evaluated(self, event: EvaluationFinished) -> None:
        value = finite(event.metrics.get("exact_match"))
        if value is None:
            return
        low, high = finite(event.metrics.get("exact_match_low")), finite(event.metrics.get("exact_match_high"))
        suites: dict[str, float] = {}
        for name, share in event.metrics.items():
            if name.startswith("exact_match/") and (known := finite(share)) is not None and len(suites) < 20:
                suites[name.removeprefix("exact_match/")[:80]] = known
        self.evaluated += 1
        low, high = value if low is None else low, value if high is None else high
        self.evaluations.append(EvaluationState(event.label[:80], event.step, value, low, high, suites))
        if len(self.evaluations) > MOST_EVALUATIONS:
            self.evaluations = [self.evaluations[0], *self.evaluations[1:-1:2], self.evaluations[-1]]

    def _noticed(self, event: Notice, now: float) -> None:
        text = event.text[:_LONGEST_TEXT]
        if not event.is_warning:
            self.last_notice = text
            return
        same = next((old for old in self.warnings if old.text == text), None)
        if same is not None:
            self.warnings.remove(same)
        self.warnings.append(Warned(text, now, 1 + (same.count if same else 0)))

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def has_started(self) -> bool:
        """``RunStarted`` has been seen."""
        return bool(self.run.model)

    @property
    def has_ended(self) -> bool:
        return self._ended_at is not None

    @property
    def standing(self) -> Standing:
        if self.has_ended:
            return "ended"
        if "pause" in self._pauses.reasons:
            return "paused"
        return "running" if self.has_started or self.phases or self._rollout else "starting"

    @property
    def is_resumed(self) -> bool:
        """Episode and token counts cover this session only."""
        return self.run.step > 0 and self.run.kind == "train"

    @property
    def rollout(self) -> RolloutSampled | None:
        """The last sample; None before the first and after the end."""
        return None if self.has_ended else self._rollout

    @property
    def finished_episodes(self) -> int:
        return self._finished_episodes.value

    @property
    def policy_version(self) -> int:
        return max(self._published, self.pipeline.policy_version if self.pipeline else 0, self.run.step)

    @property
    def latest(self) -> Mapping[str, float | None]:
        """Curve values of the last finished step."""
        rows = self.steps.rows(max(0, len(self.steps) - 1))
        return rows[-1] if rows else {}

    @property
    def used(self) -> TokenUsage:
        """Tokens billed by the service, earlier sessions included."""
        return self.run.used + self._session

    @property
    def cost(self) -> Cost:
        """Cost of :attr:`used`."""
        run = self.run
        if not run.model:
            return Billing(reason="not started").cost(self._session)
        billing = billing_of(run.model, is_embedded=run.is_embedded, is_tinker=run.is_tinker, price=run.price)
        dollars = billing.dollars(self._session)
        known = None if run.spent is None or dollars is None else run.spent + dollars
        return billing.cost_of(known, self.used)

    @property
    def _session(self) -> TokenUsage:
        return TokenUsage(*(total.value for total in self._tokens)) + self._other_usage

    def time(self, now: float) -> float:
        """``now``; the time of the end once the run has ended."""
        return now if self._ended_at is None else self._ended_at

    def seconds(self, now: float) -> float:
        """Since the first event; the clock stops at the end."""
        now = self.time(now)
        return max(0.0, now - (now if self._began is None else self._began))

    def episodes_per_second(self, now: float) -> float:
        since = self._since(now)
        return max(0, self.finished_episodes - since.episodes) / max(self.time(now) - since.time, 1.0)

    def late_for(self, now: float) -> float:
        """Seconds for which the event loop has been late without interruption."""
        return 0.0 if self._late_since is None or self.has_ended else now - self._late_since

    def longest_stall(self, now: float) -> float:
        """Longest event-loop stall of the last :data:`STALL_SECONDS`, in seconds."""
        return max((seconds for at, seconds in self._stalls if self.time(now) - at < STALL_SECONDS), default=0.0)

    @property
    def search(self) -> Mapping[str, float]:
        """The last sample's ``search/…`` metrics, totals of this session; empty before one."""
        found = self._rollout.search if self._rollout else {}
        return {name: finite(value) or 0.0 for name, value in found.items()}

    def queries_per_second(self, now: float) -> float:
        since = self._since(now)
        return max(0.0, _number(self.search, "search/queries") - since.queries) / max(self.time(now) - since.time, 1.0)

    def searches_failed_lately(self, now: float) -> int:
        """Failed calls within the last :data:`RATE_SECONDS`."""
        return int(max(0.0, _number(self.search, "search/failed") - self._since(now).failed))

    def _since(self, now: float) -> _Reading:
        """The oldest reading within :data:`RATE_SECONDS`, else the last."""
        for reading in self._readings:
            if self.time(now) - reading.time <= RATE_SECONDS:
                return reading
        return self._readings[-1] if self._readings else _Reading(now, self.finished_episodes, 0.0, 0.0)


def _number(metrics: Mapping[str, float], name: str) -> float:
    return finite(metrics.get(name)) or 0.0
