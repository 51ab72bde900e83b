"""Answers over HTTP: JSON bodies, the check of the API key, and every error as JSON with a sentence in ``detail``."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from searchr1_async.errors import CheckpointError
from searchr1_async.local.backend import UserFault
from searchr1_async.local.checkpoints import NoSuchCheckpoint
from searchr1_async.local.protocol import MalformedRequest

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SIGNED_ROUTE = "signed"
"""Name of the one route besides ``healthz`` that is served without the API key."""
_WITHOUT_KEY = {"healthz", SIGNED_ROUTE}
"""Names of the routes that ask for no API key."""


class NotFound(LookupError):
    """No such session, model, sampler or promise; its message goes out with 404."""


class Gone(LookupError):
    """It existed and is over; its message goes out with 410."""


class TooManySamples(Exception):
    """The queue is full: the client should wait and submit again (429)."""


def json_answer(status: int = 200, /, **fields: Any) -> web.Response:
    """A JSON object as the answer to a request."""
    return web.Response(status=status, body=json.dumps(fields).encode(), content_type="application/json")


def key_check(api_key: str) -> Any:
    """A middleware that answers 401 to requests without this key, but for the routes that need none."""
    expected = api_key.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-API-Key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        is_open = request.match_info.route.name in _WITHOUT_KEY
        if not is_open and not hmac.compare_digest(given.encode("utf-8", "replace"), expected):
            refusal = json_answer(
                401, detail="the API key is missing or wrong: this service was started with another one"
            )
            refusal.force_close()
            return refusal
        return await handler(request)

    return check


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A middleware that answers every error as JSON, with the status that fits its kind."""
    try:
        return await handler(request)
    except MalformedRequest as error:
        return json_answer(error.status, detail=str(error))
    except NoSuchCheckpoint as error:
        return json_answer(404, detail=str(error))
    except UserFault as error:
        return json_answer(400, detail=str(error))
    except NotFound as error:
        return json_answer(404, detail=str(error))
    except Gone as error:
        return json_answer(410, detail=str(error))
    except CheckpointError as error:
        # Not 5xx: clients would submit it again for minutes.
        return json_answer(422, detail=str(error))
    except TooManySamples:
        return json_answer(429, detail="too many samples are queued")
    except web.HTTPNotFound:
        return json_answer(404, detail=f"the embedded service does not offer {request.method} {request.path}")
    except web.HTTPException as error:
        return json_answer(error.status, detail=error.reason)
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        return json_answer(500, detail=f"{type(error).__name__}: {error}")
