"""Which models a service offers, and which one to use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import anyio
import tinker

from searchr1_async.boundary.network import SDK_FAULTS, fault_text
from searchr1_async.errors import ConfigurationError, ModelError, ServiceError, ServiceUnavailableError
from searchr1_async.models import (
    default_cloud_model,
    find_model,
    nearest_names,
    nearest_of_family,
    replacements_for,
)

logger = logging.getLogger(__name__)

ASK_DEADLINE = 30.0
"""Seconds a service has to list its models; the SDK alone would retry for minutes."""
_SHOWN = 8
"""Names shown in a message."""

Offered = tuple[str, ...] | None
"""Model names; None if the service has no list."""


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
