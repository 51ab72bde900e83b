"""Run state folded from events; the source of every live view. Pure: the caller passes the time in."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

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
from searchr1_async.watch.console import Estimate, Pauses
from searchr1_async.watch.snapshot import (
    RATE_SECONDS,
    EvaluationState,
    NoticeState,
    OpenBatch,
    PhaseState,
    SearchState,
    Series,
    Snapshot,
    Standing,
    finite,
)

LATE_SECONDS = 0.02
"""Median lag from which the event loop counts as late; an idle loop is under 1 ms."""
MOST_EVALUATIONS = 200
_MOST_NOTICES = 6
_LONGEST_TEXT = 500
"""Maximum characters kept of a notice or an error: a service's error response can be a whole page."""


@dataclass(slots=True)
class _Tally:
    """Sums over the episodes of the open batch."""

    episodes: int = 0
    failed: int = 0
    complete: int = 0
    calls: int = 0
    valid: int = 0
    error: str = ""
    sums: list[float] = field(default_factory=lambda: [0.0] * 6)
    """Sums of reward, exact match and turns, then of their squares."""

    def add(self, episode: Episode) -> None:
        self.episodes += 1
        if not episode.is_complete:
            self.failed += episode.failed
            if episode.error:
                self.error = episode.error[:_LONGEST_TEXT]
            return
        self.complete += 1
        turns = float(len(episode.turns))
        for turn in episode.turns:
            if turn.call is not None:
                self.calls += 1
                self.valid += turn.call.problem is None
        correct = finite(episode.reward_parts.get("correct")) or 0.0
        reward = finite(episode.reward) or 0.0
        sums = self.sums
        for at, value in enumerate((reward, correct, turns)):
            sums[at] += value
            sums[at + 3] += value * value

    def frozen(self) -> OpenBatch:
        values: dict[str, float] = {}
        spread: dict[str, float] = {}
        if self.complete:
            for at, name in enumerate(("reward", "exact_match", "turns")):
                mean = self.sums[at] / self.complete
                values[name] = mean
                spread[name] = math.sqrt(max(0.0, self.sums[at + 3] / self.complete - mean * mean))
        if self.calls:
            values["valid_calls"] = share = self.valid / self.calls
            spread["valid_calls"] = math.sqrt(share * (1 - share))
        return OpenBatch(self.episodes, self.failed, self.error, values, spread)


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


@dataclass(slots=True)
class _Phase:
    event: PhaseStarted
    estimate: Estimate
    metrics: Mapping[str, float] = field(default_factory=dict)


class RunState:
    """Folds a run's events with bounded memory; :meth:`see` takes microseconds."""

    def __init__(self) -> None:
        self.steps = Series()
        self.evaluations: list[EvaluationState] = []
        """Held-out evaluations; past :data:`MOST_EVALUATIONS`, every second one between the first and the last is dropped."""
        self.evaluated = 0
        """Total evaluations seen."""
        self._began: float | None = None
        self._ended_at: float | None = None
        self._reason = ""
        self._run = RunStarted("train", "", False, "")
        self._step = 0
        self._pauses = Pauses()
        self._phases: dict[str, _Phase] = {}
        self._tally = _Tally()
        self._rollout: RolloutSampled | None = None
        self._pipeline: PipelineChanged | None = None
        self._published = 0
        self._dropped: Counter[str] = Counter()
        self._finished_groups = 0
        self._constant_in_a_row = 0
        self._finished_episodes = _Total()
        self._tokens = (_Total(), _Total(), _Total())
        """Prompt, cached prompt and sampled tokens of this session's engines."""
        self._other_usage = TokenUsage()
        """Tokens used by training and by ``ask`` in this session."""
        self._readings: deque[tuple[float, int, float, float]] = deque(maxlen=128)
        """Time, episodes, queries and failed calls: the readings from which rates are computed."""
        self._late_since: float | None = None
        self._stalls: deque[tuple[float, float]] = deque(maxlen=128)
        self._warnings: deque[tuple[str, float, int]] = deque(maxlen=_MOST_NOTICES)
        """Text, time of the last occurrence, count."""
        self._last_notice = ""
        self._staleness: float | None = None
        self._seconds_per_step: float | None = None

    @property
    def kind(self) -> str:
        return self._run.kind

    @property
    def total_steps(self) -> int | None:
        return self._run.total_steps

    @property
    def has_started(self) -> bool:
        """``RunStarted`` has been seen."""
        return bool(self._run.model)

    @property
    def first_step(self) -> int:
        """Steps done by earlier sessions; 0 for a new run."""
        return self._run.step

    @property
    def has_ended(self) -> bool:
        return self._ended_at is not None

    def end(self, reason: str, now: float) -> None:
        """Mark the run as ended, for runs that never emit ``RunEnded``. Only the first call counts."""
        if self._ended_at is None:
            self._ended_at = now
            self._reason = reason
            self._phases.clear()

    def see(self, event: Event, now: float) -> None:
        """Fold in ``event``; kinds that no view shows are ignored."""
        if self._began is None:
            self._began = now
        match event:
            case EpisodeFinished():
                self._tally.add(event.episode)
            case RolloutSampled():
                self._sampled(event, now)
            case PipelineChanged():
                self._pipeline = event
            case GroupFinished():
                self._finished_groups += 1
                if event.group.is_constant and self._run.group_size > 1:
                    self._constant_in_a_row += 1
                else:
                    self._constant_in_a_row = 0
            case GroupDropped():
                self._dropped[event.reason[:80]] += 1
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
                self._run = event
                self._step = max(self._step, event.step)
            case PhaseStarted() | PhaseAdvanced() | PhaseEnded():
                self._see_phase(event, now)
            case Notice():
                self._noticed(event, now)
            case BatchClosed():
                self._tally = _Tally()
            case WeightsPublished():
                self._published = max(self._published, event.step)
            case EvaluationFinished():
                self._evaluated(event)
            case RunPaused() | RunResumed() | ServiceSilent() | ServiceAnswers():
                self._pauses.see(event, [phase.estimate for phase in self._phases.values()], now)
            case RunEnded():
                self.end(event.reason, now)
            case _:
                pass

    def _see_phase(self, event: PhaseStarted | PhaseAdvanced | PhaseEnded, now: float) -> None:
        if isinstance(event, PhaseStarted):
            if event.phase not in self._phases and len(self._phases) >= 8:
                self._phases.pop(next(iter(self._phases)))
            estimate = Estimate(event.total, now, seconds_at_most=event.seconds_at_most)
            self._pauses.apply(estimate, now)
            self._phases[event.phase] = _Phase(event, estimate)
        elif isinstance(event, PhaseEnded):
            self._phases.pop(event.phase, None)
        elif (phase := self._phases.get(event.phase)) is not None:
            phase.estimate.advance(event.done, now)
            if event.metrics:
                phase.metrics = dict(event.metrics)

    def _sampled(self, event: RolloutSampled, now: float) -> None:
        self._rollout = event
        self._finished_episodes.see(event.finished_episodes)
        counts = (event.prompt_tokens, event.cached_prompt_tokens, event.sampled_tokens)
        for total, value in zip(self._tokens, counts, strict=True):
            total.see(value)
        queries, failed = _number(event.search, "search/queries"), _number(event.search, "search/failed")
        self._readings.append((now, self._finished_episodes.value, queries, failed))
        if event.loop_lag_p50 < LATE_SECONDS:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        if event.loop_lag_max > 1.0:
            self._stalls.append((now, event.loop_lag_max))

    def _finished_step(self, event: StepFinished, now: float) -> None:
        self.steps.add(event.step, event.metrics)
        self._step = max(self._step, event.step)
        self._staleness = finite(event.metrics.get("env/all/staleness"))
        self._seconds_per_step = finite(event.metrics.get("time/total"))
        phase = self._phases.get("train")
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
        self.evaluations.append(
            EvaluationState(
                event.label[:80],
                event.step,
                value,
                value if low is None else low,
                value if high is None else high,
                suites,
            )
        )
        if len(self.evaluations) > MOST_EVALUATIONS:
            self.evaluations = [self.evaluations[0], *self.evaluations[1:-1:2], self.evaluations[-1]]

    def _noticed(self, event: Notice, now: float) -> None:
        text = event.text[:_LONGEST_TEXT]
        if not event.is_warning:
            self._last_notice = text
            return
        count = 1
        for old in self._warnings:
            if old[0] == text:
                count += old[2]
                self._warnings.remove(old)
                break
        self._warnings.append((text, now, count))

    def snapshot(self, now: float) -> Snapshot:
        """State at ``now``; once ended, the state at the end."""
        if self._ended_at is not None:
            now = self._ended_at
        run, pipeline = self._run, self._pipeline
        rollout = self._rollout if self._ended_at is None else None
        began = now if self._began is None else self._began
        since, episodes_then, *_ = self._since(now)
        session = TokenUsage(*(total.value for total in self._tokens)) + self._other_usage
        return Snapshot(
            standing=self._standing(),
            reason=self._reason,
            seconds=max(0.0, now - began),
            kind=run.kind,
            model=run.model[:200],
            is_resumed=run.step > 0 and run.kind == "train",
            out_dir=run.out_dir,
            step=self._step,
            total_steps=run.total_steps,
            phases=tuple(self._phase(phase, now) for phase in self._phases.values()),
            episodes=rollout.episodes if rollout else 0,
            sampling=rollout.sampling if rollout else 0,
            queued=rollout.queued if rollout else 0,
            searching=rollout.searching if rollout else 0,
            groups=rollout.groups if rollout else 0,
            finished_episodes=self._finished_episodes.value,
            episodes_per_second=max(0, self._finished_episodes.value - episodes_then) / max(now - since, 1.0),
            limited_by=rollout.limited_by if rollout else "",
            batch=self._tally.frozen(),
            step_of_batch=pipeline.step if pipeline else 0,
            batch_groups=pipeline.batch_groups if pipeline else run.groups_per_batch or 0,
            taken_groups=pipeline.taken_groups if pipeline else 0,
            waiting_groups=pipeline.waiting_groups if pipeline else 0,
            trainer=pipeline.trainer if pipeline else "",
            policy_version=max(self._published, pipeline.policy_version if pipeline else 0, run.step),
            staleness=self._staleness,
            dropped=dict(self._dropped),
            finished_groups=self._finished_groups,
            constant_groups_in_a_row=self._constant_in_a_row,
            search=self._search(now),
            used=run.used + session,
            cost=self._cost(session),
            loop_lag_p50=rollout.loop_lag_p50 if rollout else 0.0,
            loop_lag_p99=rollout.loop_lag_p99 if rollout else 0.0,
            late_for=0.0 if self._late_since is None or rollout is None else now - self._late_since,
            longest_stall=max((seconds for at, seconds in self._stalls if now - at < 30), default=0.0),
            cpu=rollout.cpu if rollout else None,
            evaluations=tuple(self.evaluations[-6:]),
            warnings=tuple(NoticeState(text, max(0.0, now - at), count) for text, at, count in self._warnings),
            last_notice=self._last_notice,
            seconds_per_step=self._seconds_per_step,
            latest=rows[-1] if (rows := self.steps.rows(max(0, len(self.steps) - 1))) else {},
        )

    def _standing(self) -> Standing:
        if self._ended_at is not None:
            return "ended"
        if "pause" in self._pauses.reasons:
            return "paused"
        return "running" if self._run.model or self._phases or self._rollout else "starting"

    @staticmethod
    def _phase(phase: _Phase, now: float) -> PhaseState:
        event, estimate = phase.event, phase.estimate
        return PhaseState(
            name=event.phase[:80],
            label=event.label[:80],
            done=estimate.done,
            total=estimate.total,
            unit=event.unit[:40],
            seconds_left=estimate.seconds_left(now),
            metrics=phase.metrics,
        )

    def _since(self, now: float) -> tuple[float, int, float, float]:
        """The oldest reading within :data:`RATE_SECONDS`."""
        for reading in self._readings:
            if now - reading[0] <= RATE_SECONDS:
                return reading
        return self._readings[-1] if self._readings else (now, self._finished_episodes.value, 0.0, 0.0)

    def _cost(self, session: TokenUsage) -> Cost:
        """Cost of the run so far, earlier sessions included."""
        run = self._run
        if not run.model:
            return Billing(reason="not started").cost(session)
        billing = billing_of(run.model, is_embedded=run.is_embedded, is_tinker=run.is_tinker, price=run.price)
        dollars = billing.dollars(session)
        known = None if run.spent is None or dollars is None else run.spent + dollars
        return billing.cost_of(known, run.used + session)

    def _search(self, now: float) -> SearchState | None:
        if self._rollout is None or not self._rollout.search:
            return None
        found = self._rollout.search
        since, _, queries_then, failed_then = self._since(now)
        queries, failed = _number(found, "search/queries"), _number(found, "search/failed")
        services = ("embedding", "store")
        return SearchState(
            queries_per_second=max(0.0, queries - queries_then) / max(now - since, 1.0),
            cache_hit_rate=_number(found, "search/cache_hit_rate"),
            p50=_number(found, "search/p50"),
            p99=_number(found, "search/p99"),
            faults=int(sum(_number(found, f"search/{name}/faults") for name in services)),
            failed=int(failed),
            failed_lately=int(max(0.0, failed - failed_then)),
            seconds_down=max(_number(found, f"search/{name}/seconds_down") for name in services),
        )


def _number(metrics: Mapping[str, float], name: str) -> float:
    return finite(metrics.get(name)) or 0.0
