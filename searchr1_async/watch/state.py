"""State of a run, folded from its events: the one fold behind console, live view and final picture.

Pure: the caller passes the time in. :meth:`RunState.see` takes microseconds, and memory grows by a row per step and evaluation alone.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
from searchr1_async.records.metrics import CURVES, EpisodeMeans
from searchr1_async.watch.markup import shown
from searchr1_async.watch.progress import Phase, WorkClock

RATE_SECONDS = 10.0
"""Window for rates."""
ALL_SUITES = "all suites"
BLOCKED = "The event loop was blocked for over a second, for example by another running cell; the run made no progress meanwhile."
_MOST_NOTICES = 6
_LONGEST_TEXT = 500
"""Maximum characters kept of a notice or an error: a service's error response can be a whole page."""

Standing = Literal["starting", "running", "paused", "ended"]
Row = dict[str, float | None]
"""``step`` and a value per curve, by the metric's name; None where the step has none."""


@dataclass(slots=True)
class OpenBatch:
    """Episodes finished since the last batch was closed: complete and failed ones, the last error, and means over complete ones."""

    episodes: int = 0
    failed: int = 0
    error: str = ""
    means: EpisodeMeans = field(default_factory=EpisodeMeans)

    def add(self, episode: Episode) -> None:
        self.episodes += 1
        if episode.is_complete:
            self.means.add(episode)
        else:
            self.failed += episode.failed
            self.error = (episode.error or self.error)[:_LONGEST_TEXT]

    @property
    def values(self) -> dict[str, float]:
        """The known curves' means by name."""
        means = self.means.metrics()
        return {curve.name: value for curve in CURVES if (value := finite(means.get(curve.name))) is not None}


class RunState:
    """Folds a run's events. Attributes are for reading; those that depend on the time are methods."""

    def __init__(self) -> None:
        self.run = RunStarted("train", "", False, "")
        """How the run started; without a model until then."""
        self.reason = ""
        """Why the run ended; empty before."""
        self.step = 0
        """Optimizer steps finished."""
        self.steps: list[Row] = []
        """One per finished step, ascending."""
        self.metrics: Mapping[str, float] = {}
        """Of the last finished step."""
        self.evaluations: list[dict[str, Any]] = []
        """Exact match of held-out evaluations, as chart rows: one for all questions, and one per suite if there are several."""
        self.work = WorkClock()
        """Phases are timed by it."""
        self.phases: dict[str, Phase] = {}
        """Active phases by name, in start order."""
        self.batch = OpenBatch()
        self.pipeline: PipelineChanged | None = None
        self.policy_version = 0
        self.training_episodes = 0
        """Finished in this session."""
        self.dropped: Counter[str] = Counter()
        """Groups not trained on, by reason."""
        self.constant_groups_in_a_row = 0
        """Consecutive groups whose rewards are all equal; always 0 for a group size of 1."""
        self.warnings: dict[str, float] = {}
        """Recent warnings, newest last, with the time of their last occurrence."""
        self.last_notice = ""
        self._began: float | None = None
        self._ended_at: float | None = None
        self._rollout: RolloutSampled | None = None
        self._earlier_episodes, self._earlier_usage = 0, TokenUsage()
        """Of this session's closed engines, each of which counts from 0."""
        self._other_usage = TokenUsage()
        """Tokens used by training and by ``ask`` in this session."""
        self._readings: deque[tuple[float, int, float]] = deque(maxlen=128)
        """Time, episodes and queries, from which rates are computed."""

    # --- the fold -----------------------------------------------------------------------------------------------------

    def see(self, event: Event, now: float) -> None:
        """Fold in ``event``; kinds that no view shows are ignored."""
        self._began = now if self._began is None else self._began
        match event:
            case EpisodeFinished():
                self.training_episodes += 1
                self.batch.add(event.episode)
            case RolloutSampled():
                self._sampled(event, now)
            case PipelineChanged():
                self.pipeline = event
                self.policy_version = max(self.policy_version, event.policy_version)
            case GroupFinished():
                is_constant = event.group.is_constant and self.run.group_size > 1
                self.constant_groups_in_a_row = self.constant_groups_in_a_row + 1 if is_constant else 0
            case GroupDropped():
                self.dropped[event.reason[:80]] += 1
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
                self.step, self.policy_version = max(self.step, event.step), max(self.policy_version, event.step)
            case PhaseStarted():
                self.phases[event.phase] = Phase(event, self.work.time(now))
            case PhaseAdvanced() if (phase := self.phases.get(event.phase)) is not None:
                phase.advance(event.done, self.work.time(now))
                phase.metrics = event.metrics or phase.metrics
            case PhaseEnded():
                self.phases.pop(event.phase, None)
            case Notice(text, is_warning):
                if is_warning:
                    self._warned(text[:_LONGEST_TEXT], now)
                else:
                    self.last_notice = text[:_LONGEST_TEXT]
            case BatchClosed():
                self.batch = OpenBatch()
            case WeightsPublished():
                self.policy_version = max(self.policy_version, event.step)
            case EvaluationFinished():
                self._evaluated(event)
            case RunPaused() | RunResumed() | ServiceSilent() | ServiceAnswers():
                self.work.see(event, now)
            case RunEnded():
                self.end(event.reason, now)
            case _:
                pass

    def end(self, reason: str, now: float) -> None:
        """Mark the run as ended, for runs that never emit ``RunEnded``. Only the first call counts."""
        if self._ended_at is None:
            self._ended_at, self.reason = now, reason
            self.phases.clear()

    def _sampled(self, event: RolloutSampled, now: float) -> None:
        last, self._rollout = self._rollout, event
        if last is not None and event.prompt_tokens < last.prompt_tokens:
            self._earlier_episodes += last.finished_episodes
            self._earlier_usage += _usage(last)
        self._readings.append((now, self.finished_episodes, self.search.get("search/queries", 0.0)))
        if event.loop_lag_max > 1.0:
            self._warned(BLOCKED, now)

    def _warned(self, text: str, now: float) -> None:
        self.warnings.pop(text, None)
        self.warnings[text] = now
        if len(self.warnings) > _MOST_NOTICES:
            del self.warnings[next(iter(self.warnings))]

    def _finished_step(self, event: StepFinished, now: float) -> None:
        if not self.steps or event.step > (self.steps[-1]["step"] or 0.0):
            values = {curve.name: finite(event.metrics.get(curve.column)) for curve in CURVES}
            self.steps.append({"step": float(event.step)} | values)
        self.step, self.metrics = max(self.step, event.step), event.metrics
        phase = self.phases.get("train")
        if phase is not None and event.step > phase.done:
            phase.advance(event.step, self.work.time(now))

    def _evaluated(self, event: EvaluationFinished) -> None:
        known = {name: value for name, each in event.metrics.items() if (value := finite(each)) is not None}
        if (mean := known.get("exact_match")) is None:
            return
        order = self.evaluations[-1]["order"] + 1 if self.evaluations else 0
        own: dict[str, Any] = {"order": order, "label": shown(event.label, 60), "step": event.step}
        low, high = (known.get(f"exact_match_{end}", mean) for end in ("low", "high"))
        self.evaluations.append(own | {"suite": ALL_SUITES, "mean": mean, "low": low, "high": high})
        suites = {name.partition("/")[2]: value for name, value in known.items() if name.startswith("exact_match/")}
        if len(suites) > 1:
            no_interval = {"low": None, "high": None}
            self.evaluations += [
                own | {"suite": shown(suite, 40), "mean": value} | no_interval for suite, value in suites.items()
            ]

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
        if self.work.is_paused:
            return "paused"
        return "running" if self.has_started or self.phases or self._rollout else "starting"

    @property
    def main_phase(self) -> Phase | None:
        """The training phase if there is one, else the first."""
        return self.phases.get("train") or next(iter(self.phases.values()), None)

    @property
    def rollout(self) -> RolloutSampled | None:
        """The last sample; None before the first and after the end."""
        return None if self.has_ended else self._rollout

    @property
    def finished_episodes(self) -> int:
        """In this session, evaluations included."""
        return self._earlier_episodes + (self._rollout.finished_episodes if self._rollout else 0)

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
        rollout = TokenUsage() if self._rollout is None else _usage(self._rollout)
        return self._earlier_usage + rollout + self._other_usage

    @property
    def search(self) -> Mapping[str, float]:
        """The last sample's ``search/…`` metrics, totals of this session; empty before one."""
        found = self._rollout.search if self._rollout else {}
        return {name: finite(value) or 0.0 for name, value in found.items()}

    def seconds(self, now: float) -> float:
        """Since the first event; the clock stops at the end."""
        now = now if self._ended_at is None else self._ended_at
        return max(0.0, now - (now if self._began is None else self._began))

    def rates(self, now: float) -> tuple[float, float]:
        """Episodes and queries per second, over the last :data:`RATE_SECONDS`."""
        recent = [reading for reading in self._readings if now - reading[0] <= RATE_SECONDS]
        if not recent:
            return 0.0, 0.0
        (then, episodes, queries), (_, last_episodes, last_queries) = recent[0], recent[-1]
        seconds = max(now - then, 1.0)
        return max(0, last_episodes - episodes) / seconds, max(0.0, last_queries - queries) / seconds


def _usage(sample: RolloutSampled) -> TokenUsage:
    return TokenUsage(sample.prompt_tokens, sample.cached_prompt_tokens, sample.sampled_tokens)


def finite(value: object) -> float | None:
    """``value`` as a float; None unless it is a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
