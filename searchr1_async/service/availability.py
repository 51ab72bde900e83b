"""What a Tinker service offers now: whether it answers, and which models it has.

The SDK silently retries a service that is down for minutes or forever. So after some seconds without an answer its health is
checked. An outage is reported once, within 15 seconds, with the time at which the run gives up. Until then the run is paused: it sends
no new requests, and its time limits stand still.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import tinker

from searchr1_async.boundary.compat import extend_retries
from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text, health_client, health_problem
from searchr1_async.boundary.waits import PausableDeadlines, clock_time
from searchr1_async.config import MAX_SERVICE_OUTAGE
from searchr1_async.errors import ConfigurationError, ModelError, ServiceError, ServiceUnavailableError
from searchr1_async.events import (
    Emit,
    Event,
    MinibatchLearned,
    Notice,
    RolloutSampled,
    ServiceAnswers,
    ServiceSilent,
    StepFinished,
    WeightsPublished,
)
from searchr1_async.models import default_cloud_model, find_model, nearest_names, nearest_of_family, replacements_for

logger = logging.getLogger(__name__)

CHECK_EVERY = 2.25
"""Seconds without an answer before a health check, and between checks."""
CHECK_TIMEOUT = 4.0
"""Seconds per health check."""
SILENT_AFTER = 5.0
"""Seconds without an answer, and with two failed checks, after which the service is down: reported within 15 s of its last answer."""
LATE = 2.0
"""Seconds a check may overrun its timeout; beyond that this process was busy or the machine asleep, and it does not count."""
AFTERWARDS = 60.0
"""Seconds after an outage in which the SDK may still give up on a call it started during the outage."""
ASK_DEADLINE = 30.0
"""Seconds a service has to list its models; the SDK alone would retry for minutes."""
_SHOWN = 8
"""Names shown in a message."""

Offered = tuple[str, ...] | None
"""Model names; None if the service has no list."""


class Outage:
    """State machine of a service's outages. Has no clock or task; the caller passes the time (seconds of a monotonic clock)."""

    def __init__(self, now: float) -> None:
        self.heard_at = now
        """Time of the last answer."""
        self.since: float | None = None
        """Time of the last answer before the outage; None if there is no outage."""
        self.ended_at: float | None = None
        """End of the last outage."""
        self.problem = ""
        """Why the last check failed."""
        self._failures = 0

    def heard(self, now: float) -> bool:
        """The service answered. Returns whether this ends an outage."""
        was_down = self.since is not None
        self.heard_at, self.since, self._failures = now, None, 0
        if was_down:
            self.ended_at = now
        return was_down

    def failed(self, now: float, problem: str) -> bool:
        """A health check failed. Returns whether this starts an outage."""
        self._failures += 1
        self.problem = problem
        if self.since is not None or self._failures < 2 or now - self.heard_at < SILENT_AFTER:
            return False
        self.since = self.heard_at
        return True


class ServiceWatch:
    """Watches one service for a run.

    Args:
        url: its base URL.
        max_outage: seconds the run waits for it.
        emit: receives the events of outages.
        then: what the run does afterwards, for messages.
    """

    def __init__(self, url: str, max_outage: float, emit: Emit, then: str = "the run ends, resumable") -> None:
        self._url, self._max_outage, self._emit, self._then = url, max_outage, emit, then
        self._outage = Outage(0.0)
        self.deadlines = PausableDeadlines()
        """Paused during an outage."""
        self._holds: list[Callable[[bool], None]] = [self.deadlines.pause]
        self._sampled: int | None = None
        self._answers = 0

    @property
    def is_silent(self) -> bool:
        """The service is down."""
        return self._outage.since is not None

    def hearing(self, emit: Emit) -> Emit:
        """Wraps ``emit`` to count the events that only an answering service makes possible."""

        def hear(event: Event) -> None:
            is_answer = isinstance(event, MinibatchLearned | WeightsPublished | StepFinished)
            if isinstance(event, RolloutSampled):
                is_answer = self._sampled is not None and event.sampled_tokens != self._sampled
                self._sampled = event.sampled_tokens
            self._answers += is_answer  # may be called outside any task; the watching task acts on it
            emit(event)

        return hear

    @contextmanager
    def holding(self, hold: Callable[[bool], None]) -> Iterator[None]:
        """During the block, ``hold`` is called with True when an outage starts and with False when it ends."""
        self._holds.append(hold)
        try:
            if self.is_silent:
                hold(True)
            yield
        finally:
            self._holds.remove(hold)

    async def run(self) -> None:
        """Watches until cancelled, or until an outage exceeds the limit. Needs a working health check at the start."""
        async with health_client() as client:
            if problem := await health_problem(self._url, 3 * CHECK_TIMEOUT, client):
                logger.info("the Tinker service at %s %s: it is not watched", self._url, problem)
                return
            self._outage.heard(anyio.current_time())
            answers = self._answers
            while True:
                await anyio.sleep(CHECK_EVERY)
                problem, began = None, anyio.current_time()
                if self._answers == answers:
                    problem = await health_problem(self._url, CHECK_TIMEOUT, client)
                if self._answers != answers:
                    answers, problem = self._answers, None
                if problem is None or anyio.current_time() - began <= CHECK_TIMEOUT + LATE:
                    self._see(problem)

    def _see(self, problem: str | None) -> None:
        """What a check found."""
        now, since = anyio.current_time(), self._outage.since
        if problem is None:
            if self._outage.heard(now) and since is not None:
                text = f"the Tinker service answers again after {now - since:.0f} s: the run continues"
                self._tell(Notice(text), ServiceAnswers(), is_down=False)
        elif self._outage.failed(now, problem):
            self._tell(self._warning(now - self._outage.heard_at), ServiceSilent(), is_down=True)
        elif since is not None and (down := now - since) > self._max_outage:
            raise ServiceUnavailableError(
                f"the Tinker service at {self._url} has been down for {down:.0f} s (it {problem}): restore it "
                "and resume, or let runs wait longer (max_service_outage)"
            )

    def may_wait(self) -> bool:
        """Whether to retry a call that the SDK gives up on: the service is down, or was until just now."""
        ended = self._outage.ended_at
        return self.is_silent or (ended is not None and self._outage.heard_at - ended < AFTERWARDS)

    def _tell(self, *events: Event, is_down: bool) -> None:
        for event in events:
            self._emit(event)
        for hold in self._holds:
            hold(is_down)

    def _warning(self, passed: float) -> Notice:
        return Notice(
            f"the Tinker service at {self._url} has not answered since {clock_time(-passed)}: it {self._outage.problem}. "
            f"The run waits for it until {clock_time(self._max_outage - passed)} "
            f"(max_service_outage={self._max_outage:g} s); then {self._then}",
            is_warning=True,
        )


@asynccontextmanager
async def watching_service(
    client: Any, url: str, emit: Emit, max_outage: float = MAX_SERVICE_OUTAGE, then: str = "the run ends, resumable"
) -> AsyncIterator[ServiceWatch]:
    """Watches a service during the block, and retries the calls of its client for as long as the run waits.

    Raises, within an exception group:
        ServiceUnavailableError: it was down for longer than ``max_outage``.
    """
    watch = ServiceWatch(url, max_outage, emit, then)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch.run)
        tasks.start_soon(extend_retries, client, watch.may_wait)
        yield watch
        tasks.cancel_scope.cancel()


async def ask_offered(connect: Callable[[], tinker.RestClient], *, trains: bool = False) -> Offered:
    """The models a service lists: the trainable ones, or those that can be sampled from. None if it has no such list.

    Args:
        connect: makes the client; called in a worker thread, since it may block.

    Raises:
        ServiceUnavailableError, ServiceError, ModelError: no answer within 30 s; a refusal; none of its models can be used this way.
        ConfigurationError: no client can be created, for example with an invalid key.
    """
    try:
        with anyio.fail_after(ASK_DEADLINE):
            future = await anyio.to_thread.run_sync(lambda: connect().get_server_capabilities(), abandon_on_cancel=True)
            answer = await future
    except TimeoutError:
        raise ServiceUnavailableError(f"the Tinker service did not list its models within {ASK_DEADLINE:g} s") from None
    except tinker.APIResponseValidationError:
        return None
    except tinker.APIStatusError as error:
        if error.status_code in (404, 405):
            return None
        hint = ": set TINKER_API_KEY to a key of this service" if error.status_code in (401, 403) else ""
        raise ServiceError(f"the Tinker service refuses to list its models ({fault_text(error)}){hint}") from error
    except tinker.APIError as error:
        raise ServiceUnavailableError(
            f"asking the Tinker service for its models failed: {fault_text(error)}"
        ) from error
    except SDK_FAULTS as error:
        raise client_refused(error) from error
    listed = [model for model in getattr(answer, "supported_models", None) or () if model.model_name]
    names = [model.model_name for model in listed if (model.trainable if trains else model.sampleable) is not False]
    if listed and not names:
        use = "trained" if trains else "sampled from"
        raise ModelError(
            f"the service offers no model that can be {use}, only {_list([model.model_name for model in listed])}"
        )
    return tuple(dict.fromkeys(names)) or None


def client_refused(error: BaseException) -> ConfigurationError:
    """Why the SDK could not create a client."""
    return ConfigurationError(f"creating a Tinker client failed (is TINKER_API_KEY right?): {fault_text(error)}")


def choose_model(named: str | None, offered: Offered) -> tuple[str, str | None]:
    """The model to use on a service other than the embedded one, and a note on the choice, if any.

    Without a name: the default, else the nearest offered model, else the only offered one. Raises ModelError, listing alternatives.
    """
    wanted = named or default_cloud_model()
    if offered is None:
        return wanted, f"the service does not list its models: assuming that it has {wanted}"
    if wanted in offered:
        return wanted, None
    if named is not None:
        raise ModelError(_refusal(named, offered))
    if (nearest := nearest_of_family(wanted, offered)) is not None:
        return (
            nearest,
            f"the service does not offer the default model, {wanted}: using {nearest}, the nearest of its family",
        )
    if len(offered) == 1:
        return offered[0], f"no model was named, and the service offers only one: using {offered[0]}"
    raise ModelError(
        f"no model was named, and the service offers neither the default, {wanted}, nor a suitable model of its "
        f"family: choose one with model=…. It offers {_list(offered)}"
    )


def _refusal(named: str, offered: Sequence[str]) -> str:
    model, text = find_model(named), f"the service does not offer {named!r}"
    if model is not None and model.retired is not None:
        note = f" ({model.replacement_note})" if model.replacement_note else ""
        here = replacements_for(named, offered)
        text += f": Tinker retired it on {model.retired} and recommends {' or '.join(here or replacements_for(named))}{note}"
        if here:
            return f"{text} instead, which the service offers"
        text += ", which this service does not offer either"
    return f"{text}. The nearest models it offers: {_list(nearest_names(named, offered))}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else "")
