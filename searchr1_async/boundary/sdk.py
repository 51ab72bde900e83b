"""What the ``tinker`` SDK raises, and how it is put into words: the one list of it."""

from __future__ import annotations

import re
from typing import Any

import httpx
import tinker

SDK_FAULTS: tuple[type[Exception], ...] = (
    tinker.TinkerError,
    httpx.HTTPError,
    # A client that was closed meanwhile, and any other state that it is not prepared for.
    RuntimeError,
    AssertionError,
    ValueError,
    KeyError,
    # No file is left for a connection or a certificate; a credential file that cannot be read.
    OSError,
)
"""What a call of the SDK may raise besides a :class:`TimeoutError`, which is an ``OSError`` too: catch that one before."""

PASSING_FAULTS: tuple[type[Exception], ...] = (
    tinker.APIConnectionError,
    tinker.InternalServerError,
    tinker.RateLimitError,
    TimeoutError,
)
"""Those that a service which is away for a time gives rise to."""

_LONGEST = 600
"""Characters: an answer may be a page."""


def fault_text(error: BaseException) -> str:
    """An error of the SDK in one line: its kind, what the service said, and its cause where it only says "connection error"."""
    said = _said(error)
    cause: BaseException | None = error.__cause__
    while isinstance(error, tinker.APIConnectionError) and cause is not None:
        said, cause = f"{said} ({type(cause).__name__}: {_said(cause)})" if _said(cause) else said, cause.__cause__
        if "os error" in said or "rrno" in said:
            break
    text = " ".join(f"{type(error).__name__}: {said}".split())
    if _is_out_of_files(error, text):
        text += "; no file was left to open: raise the limit of open files (ulimit -n)"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def fault_words(error: BaseException) -> str:
    """What the service said, without what the SDK puts around it: ``… for self.request_id='…' and expected type …``."""
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
