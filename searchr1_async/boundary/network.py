"""How services are reached: the proxies of the environment, loopback addresses, health, ``Retry-After``, and the SDK's exceptions.

The SDK has two HTTP clients, httpx and reqwest. Both read ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``, but
they read ``NO_PROXY`` differently: httpx does not support networks (``127.0.0.0/8``), and reqwest does not apply ``*`` to addresses.
Hosts that the SDK should reach directly are therefore added to ``NO_PROXY`` by name, which both understand.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, getproxies_environment, proxy_bypass

import anyio
import httpx
import tinker

from searchr1_async.boundary.settings import shown
from searchr1_async.boundary.waits import clock_time
from searchr1_async.errors import ConfigurationError, ServiceUnavailableError

_SCHEMES = ("http", "https", "all")
_NOT_HEALTHY = "answers, but not as a Tinker service"

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


def checked_url(url: str, name: str) -> str:
    """A service's base URL, without trailing slash.

    Args:
        name: argument or variable of the URL, for messages.

    Raises:
        ConfigurationError: not an ``http://`` or ``https://`` URL with a host.
    """
    text = url.strip()
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(text)
    except (ValueError, httpx.InvalidURL):  # a port that is not a number, an unclosed IPv6 address
        parts, is_good = SplitResult("", "", "", "", ""), False
    if is_good:
        return text.rstrip("/")
    hint = f": did you mean {f'http://{text}'!r}?" if text and "://" not in text else ""
    raise ConfigurationError(
        f"{name} is {shown(url)}, which is not a valid URL{hint or ': use one such as http://127.0.0.1:8000'}"
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def prepare_proxies(url: str) -> None:
    """Makes the SDK's clients, here and in child processes, reach ``url`` as the environment's proxy settings intend.

    Adds a loopback host, or a host within a network of ``NO_PROXY``, to ``NO_PROXY`` by name. Call it before creating a client.

    Raises:
        ConfigurationError: a proxy is unusable: not a URL, or a SOCKS proxy without its library.
    """
    found = getproxies()
    used = {scheme: found[scheme] for scheme in _SCHEMES if found.get(scheme)}
    excluded = _entries(found.get("no", ""))
    if not used:
        return
    is_everything = "*" in excluded
    for scheme, proxy in () if is_everything else used.items():
        _check_proxy(f"{scheme.upper()}_PROXY", proxy)
    host = urlsplit(url).hostname or ""
    is_direct = is_everything or is_loopback(host) or any(_is_within(host, entry) for entry in excluded)
    if is_direct and host not in excluded:
        if not any(getproxies_environment().get(scheme) for scheme in _SCHEMES):
            # Set in the system (macOS, Windows): a single variable would make Python ignore all of them.
            os.environ.update({f"{scheme}_proxy": proxy for scheme, proxy in used.items()})
        _exclude(host)


def proxy_for(url: str) -> str | None:
    """The environment's proxy for a URL; None if there is none, or for loopback hosts.

    For clients without SOCKS support (aiohttp): SOCKS proxies count as none.
    """
    found, parts = getproxies(), urlsplit(url)
    proxy, host = found.get(parts.scheme) or found.get("all"), parts.hostname or ""
    if not proxy or proxy.lower().startswith("socks") or is_loopback(host) or proxy_bypass(host):
        return None
    if any(_is_within(host, entry) for entry in _entries(found.get("no", ""))):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


async def probe(url: str, timeout: float = 10.0) -> None:
    """Checks that a Tinker service responds, using the SDK's route. A response that demands an API key counts.

    Args:
        timeout: seconds.

    Raises:
        ServiceUnavailableError: a timeout, an error, or not a Tinker service; the message names the URL.
        ConfigurationError: see :func:`prepare_proxies`.
    """
    if (problem := await health_problem(url, timeout)) is not None:
        raise ServiceUnavailableError(f"the Tinker service at {url} {problem}{_way(url)}")


def health_client() -> httpx.AsyncClient:
    """A reusable client for repeated calls of :func:`health_problem`. Use it as a context manager."""
    return httpx.AsyncClient(timeout=None, follow_redirects=True)


async def health_problem(url: str, timeout: float, client: httpx.AsyncClient | None = None) -> str | None:
    """What is wrong with a Tinker service, as a predicate after "the service at …"; None if healthy.

    Args:
        timeout: seconds.
        client: from :func:`health_client`; None creates one.

    Raises:
        ConfigurationError: see :func:`prepare_proxies`.
    """
    if client is None:
        prepare_proxies(url)
        async with health_client() as client:
            return await health_problem(url, timeout, client)
    address = f"{url.rstrip('/')}/api/v1/healthz"
    try:
        with anyio.fail_after(timeout):
            response = await client.get(address)
    except TimeoutError:
        return f"did not answer within {timeout:g} s"
    except (httpx.HTTPError, OSError) as error:
        return f"cannot be reached: {type(error).__name__}: {str(error) or repr(error.__cause__)}"
    if response.status_code in (401, 403, 429):
        return None
    status = f"GET {address}: {response.status_code} {response.reason_phrase}".rstrip()
    if response.status_code >= 500:
        return f"responds with an error ({status}): the service, or a proxy in front of it, is down"
    try:
        answer = json.loads(response.content)
    except ValueError:
        return f"{_NOT_HEALTHY}: something else is running there ({status}, not JSON)"
    if not isinstance(answer, dict) or answer.get("status") != "ok":
        return f"{_NOT_HEALTHY}: something else is running there ({status})"
    return None


def _check_proxy(name: str, proxy: str) -> None:
    try:
        httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")
    except (ValueError, httpx.InvalidURL):
        raise ConfigurationError(
            f"{name} is set, but is not a usable proxy: use http://host:port, or unset it"
        ) from None
    if proxy.lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ConfigurationError(
            f"{name} is a SOCKS proxy, and its library is not installed, so the Tinker SDK cannot create a client: "
            f'pip install "httpx[socks]", or unset {name}'
        )


def _is_within(host: str, network: str) -> bool:
    try:
        return "/" in network and ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _exclude(host: str) -> None:
    # If both spellings are set, httpx and reqwest each read a different one.
    for name in [name for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)] or ["NO_PROXY"]:
        entries = _entries(os.environ.get(name, ""))
        os.environ[name] = ",".join(entries if host in entries else [*entries, host])


def _entries(no_proxy: str) -> list[str]:
    return [entry.strip() for entry in no_proxy.split(",") if entry.strip()]


def _way(url: str) -> str:
    """The proxy in use, for messages, without credentials."""
    if (proxy := proxy_for(url)) is None:
        return ""
    through = urlsplit(proxy)
    return f" (through the environment's proxy {through.hostname}:{through.port or 80})"


def seconds_asked(retry_after: str, now: datetime) -> float | None:
    """Seconds to wait by a ``Retry-After`` header (RFC 9110, 10.2.3): seconds or an HTTP date; 0 for a past date.

    Args:
        retry_after: the header's value.
        now: current time, with time zone.

    Returns:
        Seconds; None for an invalid value.
    """
    value = retry_after.strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value, re.ASCII):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())


def long_wait_text(name: str, seconds: float, longest: float, setting: str) -> str:
    """The message for a service that asks for a longer wait than allowed.

    Args:
        name: the service.
        seconds: the wait it asks for.
        longest: the longest wait allowed, in seconds.
        setting: the setting of ``longest``, as its user writes it.
    """
    end = clock_time(min(seconds, 10 * 365 * 86_400))
    return (
        f"{name} asks for a wait of {seconds:,.0f} s, until {end} (a quota?), which is longer than "
        f"{setting}={longest:g} allows: progress is kept, so run the same command again after that, or raise {setting}"
    )


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
