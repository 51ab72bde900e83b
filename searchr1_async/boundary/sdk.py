"""The exceptions of the ``tinker`` SDK, and their messages."""

from __future__ import annotations

import re
from typing import Any

import httpx
import tinker

SDK_FAULTS: tuple[type[Exception], ...] = (
    tinker.TinkerError,
    httpx.HTTPError,
    # A client closed meanwhile, and other states that the SDK does not expect.
    RuntimeError,
    AssertionError,
    ValueError,
    KeyError,
    # Out of file descriptors, or an unreadable credential file.
    OSError,
)
"""What an SDK call may raise. Catch :class:`TimeoutError`, also an ``OSError``, before."""

PASSING_FAULTS: tuple[type[Exception], ...] = (
    tinker.APIConnectionError,
    tinker.InternalServerError,
    tinker.RateLimitError,
    TimeoutError,
)
"""Raised while a service is temporarily unavailable."""

_LONGEST = 600
"""Maximum characters of a message: a response body may be a whole page."""


def fault_text(error: BaseException) -> str:
    """An SDK error in one line: type, the service's message, and the cause of a bare "connection error"."""
    said = _said(error)
    cause: BaseException | None = error.__cause__
    while isinstance(error, tinker.APIConnectionError) and cause is not None:
        said, cause = f"{said} ({type(cause).__name__}: {_said(cause)})" if _said(cause) else said, cause.__cause__
        if "os error" in said or "rrno" in said:
            break
    text = " ".join(f"{type(error).__name__}: {said}".split())
    if _is_out_of_files(error, text):
        text += "; out of file descriptors: raise the limit of open files (ulimit -n)"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def fault_words(error: BaseException) -> str:
    """The service's message without the SDK's wrapping: ``… for self.request_id='…' and expected type …``."""
    return str(error).removeprefix("Request failed: ").partition(" for self.request_id=")[0]


def _said(error: BaseException) -> str:
    if isinstance(error, tinker.APIStatusError):
        return f"{error.status_code} {_detail(error.body)}".rstrip() if _detail(error.body) else str(error)
    return fault_words(error)


def _detail(body: Any) -> str:
    if isinstance(body, dict):
        for name in ("detail", "message", "error"):
            if isinstance(value := body.get(name), str) and value:
                return value
    return ""


def _is_out_of_files(error: BaseException, text: str) -> bool:
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (23, 24):
            return True
        found = found.__cause__ or found.__context__
    return re.search(r"[Tt]oo many open files", text) is not None
