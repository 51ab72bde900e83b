"""What a Tinker service offers now: whether it answers, and which models it has.

The SDK silently retries a service that is down for minutes or forever. So after some seconds without an answer its health is
checked, through the SDK's proxies. An outage is reported once, within 15 seconds, with the time at which the run gives up. Until then
the run is paused: it sends no new requests, and its time limits stand still.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import tinker

from searchr1_async.boundary.network import PASSING_FAULTS, SDK_FAULTS, fault_text, health_client, health_problem
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

CHECK_EVERY = 3.0
"""Seconds without an answer before a health check, and between successful checks."""
CHECK_TIMEOUT = 4.0
"""Seconds per health check."""
CHECK_AGAIN = 1.0
"""Seconds between a failed check and the next."""
SILENT_AFTER = 6.0
"""Seconds without an answer, and with two failed checks, after which the service is down. Detection takes 6 s if connections are
refused, 12 s if nothing comes back."""
LATE = 2.0
"""Seconds a check may overrun its timeout; beyond that this process was busy or the machine asleep, and it does not count."""
AFTERWARDS = 60.0
"""Seconds after an outage in which the SDK may still give up on a call it started during the outage."""
_RETRIES = "execute_with_retries"
ASK_DEADLINE = 30.0
"""Seconds a service has to list its models; the SDK alone would retry for minutes."""
_SHOWN = 8
"""Names shown in a message."""

Offered = tuple[str, ...] | None
"""Model names; None if the service has no list."""


class Outage:
    """State machine of a service's outages. Has no clock or task; the caller passes the time.

    Args:
        now: seconds of a monotonic clock, at which the service answers.
    """

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

    def failed(self, began: float, now: float, problem: str) -> bool:
        """A health check failed. Returns whether this starts an outage."""
        if now - began > CHECK_TIMEOUT + LATE or self.heard_at > began:
            return False
        self._failures += 1
        self.problem = problem
        if self.since is not None or self._failures < 2 or now - self.heard_at < SILENT_AFTER:
            return False
        self.since = self.heard_at
        return True

    def pause(self) -> float:
        """Seconds until the next check."""
        return CHECK_AGAIN if self._failures and self.since is None else CHECK_EVERY


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
        self._last_counts: tuple[int, int] | None = None
        self._answers = 0

    @property
    def is_silent(self) -> bool:
        """The service is down."""
        return self._outage.since is not None

    def hearing(self, emit: Emit) -> Emit:
        """Wraps ``emit`` to count the events that only an answering service makes possible."""

        def hear(event: Event) -> None:
            if isinstance(event, RolloutSampled):
                counts = (event.sampled_tokens, event.finished_episodes)
                is_answer, self._last_counts = (
                    self._last_counts is not None and counts[0] != self._last_counts[0],
                    counts,
                )
            else:
                is_answer = isinstance(event, MinibatchLearned | WeightsPublished | StepFinished)
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
            answers, began = self._answers, 0.0
            while True:
                await anyio.sleep(self._outage.pause())
                if self._answers == answers:
                    began = anyio.current_time()
                    problem = await health_problem(self._url, CHECK_TIMEOUT, client)
                if self._answers != answers or problem is None:
                    answers = self._answers
                    self._heard()
                elif self._outage.failed(began, anyio.current_time(), problem):
                    self._begin()
                self._give_up_when_due()

    def may_wait(self) -> bool:
        """Whether to retry a call that the SDK gives up on: the service is down, or was until just now."""
        ended = self._outage.ended_at
        return self.is_silent or (ended is not None and self._outage.heard_at - ended < AFTERWARDS)

    def _heard(self) -> None:
        now, since = anyio.current_time(), self._outage.since
        if self._outage.heard(now) and since is not None:
            self._emit(Notice(f"the Tinker service answers again after {now - since:.0f} s: the run continues"))
            self._emit(ServiceAnswers())
            for hold in self._holds:
                hold(False)

    def _begin(self) -> None:
        now, since = anyio.current_time(), self._outage.since
        assert since is not None
        self._emit(
            Notice(
                f"the Tinker service at {self._url} has not answered since {clock_time(since - now)}: it "
                f"{self._outage.problem}. The run waits for it until {clock_time(since + self._max_outage - now)} "
                f"(max_service_outage={self._max_outage:g} s); then {self._then}",
                is_warning=True,
            )
        )
        self._emit(ServiceSilent())
        for hold in self._holds:
            hold(True)

    def _give_up_when_due(self) -> None:
        if self._outage.since is None:
            return
        down = anyio.current_time() - self._outage.since
        if down > self._max_outage:
            raise ServiceUnavailableError(
                f"the Tinker service at {self._url} has been down for {down:.0f} s (it {self._outage.problem}): restore it "
                "and resume, or let runs wait longer (max_service_outage)"
            )


@asynccontextmanager
async def watching_service(
    client: Any, url: str, emit: Emit, max_outage: float = MAX_SERVICE_OUTAGE, then: str = "the run ends, resumable"
) -> AsyncIterator[ServiceWatch]:
    """Watches a service during the block; arguments as of :class:`ServiceWatch`.

    Args:
        client: the SDK's service client, whose calls are retried for as long as the run waits.

    Raises, within an exception group:
        ServiceUnavailableError: it was down for longer than ``max_outage``.
    """
    watch = ServiceWatch(url, max_outage, emit, then)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch.run)
        tasks.start_soon(_extend_retries, client, watch)
        yield watch
        tasks.cancel_scope.cancel()


async def _extend_retries(client: Any, watch: ServiceWatch) -> None:
    """Makes the SDK retry calls for as long as the run waits, instead of its own 5 minutes. No effect if the SDK's internals differ."""
    try:
        holder = await anyio.to_thread.run_sync(lambda: getattr(client, "holder", None), abandon_on_cancel=True)
    except SDK_FAULTS:  # the first call raises it again
        return
    original = getattr(holder, _RETRIES, None)
    if holder is None or original is None or _RETRIES in vars(holder):
        return

    async def retrying(
        given: Callable[..., Awaitable[Any]], func: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
    ) -> Any:
        while True:
            try:
                return await given(func, *args, **kwargs)
            except PASSING_FAULTS:
                if not watch.may_wait():
                    raise

    vars(holder)[_RETRIES] = functools.partial(retrying, original)
    try:
        await anyio.sleep_forever()
    finally:
        vars(holder).pop(_RETRIES, None)  # the client may be the user's, and outlive the run


async def ask_offered(connect: Callable[[], tinker.RestClient], *, trains: bool = False) -> Offered:
    """The models a service lists.

    Args:
        connect: makes the client; called in a worker thread, since it may block.
        trains: list only trainable models, else only those that can be sampled from.

    Returns:
        None if the service has no such list (an older one, or another implementation).

    Raises:
        ServiceUnavailableError: no answer within :data:`ASK_DEADLINE` seconds.
        ServiceError: it refused to answer.
        ModelError: none of its models can be used this way.
        ConfigurationError: no client can be created, for example with an invalid key.
    """
    try:
        with anyio.fail_after(ASK_DEADLINE):
            future = await anyio.to_thread.run_sync(lambda: connect().get_server_capabilities(), abandon_on_cancel=True)
            answer = await future
    except TimeoutError:
        raise ServiceUnavailableError(f"the Tinker service did not list its models within {ASK_DEADLINE:g} s") from None
    except (tinker.NotFoundError, tinker.APIResponseValidationError) as error:
        logger.info("the service does not list its models: %s", type(error).__name__)
        return None
    except (tinker.AuthenticationError, tinker.PermissionDeniedError) as error:
        raise ServiceError(
            f"the Tinker service refuses the key ({fault_text(error)}): set TINKER_API_KEY to a key of this service"
        ) from error
    except tinker.APIStatusError as error:
        if error.status_code == 405:
            return None
        raise ServiceError(f"the Tinker service refused to list its models: {fault_text(error)}") from error
    except tinker.APIError as error:
        raise ServiceUnavailableError(
            f"asking the Tinker service for its models failed: {fault_text(error)}"
        ) from error
    except SDK_FAULTS as error:
        raise ConfigurationError(
            f"creating a Tinker client failed (is TINKER_API_KEY right?): {fault_text(error)}"
        ) from error
    listed = [model for model in getattr(answer, "supported_models", None) or () if model.model_name]
    names = [model.model_name for model in listed if (model.trainable if trains else model.sampleable) is not False]
    if listed and not names:
        use = "trained" if trains else "sampled from"
        raise ModelError(
            f"the service offers no model that can be {use}, only {_list([model.model_name for model in listed])}"
        )
    return tuple(dict.fromkeys(names)) or None


def choose_model(named: str | None, offered: Offered) -> tuple[str, str | None]:
    """The model to use on a service other than the embedded one, and a note on the choice, if any.

    Args:
        named: by the user or the resumed run. None: the default, else the nearest offered model, else the only offered one.
        offered: by the service.

    Raises:
        ModelError: the service does not offer it; the message lists alternatives.
    """
    wanted = named or default_cloud_model()
    if offered is None:
        return wanted, f"the service does not list its models: assuming that it has {wanted}"
    if wanted in offered:
        return wanted, None
    if named is not None:
        raise ModelError(_refusal(named, offered))
    nearest = nearest_of_family(wanted, offered)
    if nearest is None and len(offered) == 1:
        return offered[0], f"no model was named, and the service offers only one: using {offered[0]}"
    if nearest is None:
        raise ModelError(
            f"no model was named, and the service offers neither the default, {wanted}, nor a suitable model of its "
            f"family: choose one with model=…. It offers {_list(offered)}"
        )
    return (
        nearest,
        f"the service does not offer the default model, {wanted}: using {nearest}, the nearest of its family",
    )


def _refusal(named: str, offered: Sequence[str]) -> str:
    model = find_model(named)
    near = _list(nearest_names(named, offered), len(offered))
    if model is None or model.retired is None:
        return f"the service does not offer {named!r}. The nearest models it offers: {near}"
    note = f" ({model.replacement_note})" if model.replacement_note else ""
    retired = f"the service does not offer {named!r}: Tinker retired it on {model.retired}"
    if here := replacements_for(named, offered):
        return f"{retired} and recommends {' or '.join(here)}{note} instead, which the service offers"
    return (
        f"{retired} and recommends {' or '.join(replacements_for(named))}{note}, which this service does not offer either. "
        f"The nearest models it offers: {near}"
    )


def _list(names: Sequence[str], total: int | None = None) -> str:
    total = len(names) if total is None else total
    more = total - len(names[:_SHOWN])
    return ", ".join(names[:_SHOWN]) + (f" (and {more} more)" if more > 0 else "")
