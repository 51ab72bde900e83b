"""Private interfaces of libraries that the search uses, with what to do where a version lacks them.

Checked with google-genai 3.4 to 3.6. ``tests/search/test_compat.py`` fails if a new version differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.genai import Client

Post = Callable[[str, Mapping[str, Any]], Awaitable[bytes | str]]
"""Sends a body to a path of the service; returns the answer's body."""


def genai_transport(client: Client) -> Post | None:
    """The transport of Google's client, at a quarter of the CPU of its public calls; None if this version has another.

    The public ``embed_content`` builds pydantic models, which blocks the event loop up to 45 ms per 100 texts.
    """
    request: Any = getattr(getattr(client.aio, "_api_client", None), "async_request", None)
    try:
        inspect.signature(request).bind("post", "path", {}, None)
    except TypeError:  # missing, or with other arguments
        return None

    async def post(path: str, body: Mapping[str, Any]) -> bytes | str:
        return (await request("post", path, body, None)).body or ""

    return post
