"""How services are reached: URLs, the proxies of the environment, loopback addresses and ``Retry-After``."""

from __future__ import annotations

import ipaddress
import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, getproxies_environment, proxy_bypass

import httpx

from searchr1_async.boundary.settings import shown
from searchr1_async.boundary.waits import clock_time
from searchr1_async.errors import ConfigurationError

_SCHEMES = ("http", "https", "all")


def checked_url(url: str, name: str) -> str:
    """A service's base URL, without trailing slash. Raises ConfigurationError, naming ``name``, unless it is an HTTP URL with a host."""
    text = url.strip().rstrip("/")
    with suppress(httpx.InvalidURL, ValueError):  # a host that is no domain name is a ValueError
        found = httpx.URL(text)
        if found.scheme in ("http", "https") and found.host and (found.port is None or 0 < found.port < 65_536):
            return text
    raise ConfigurationError(f"{name} is {shown(url)}, which is not a valid URL: use one such as http://127.0.0.1:8000")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def prepare_proxies(url: str) -> None:
    """Makes the SDK's clients, here and in child processes, reach a loopback host directly: adds it to ``NO_PROXY`` by name.

    Call it before creating a client. Networks in ``NO_PROXY`` (``10.0.0.0/8``) are not understood by all of the SDK's clients.

    Raises:
        ConfigurationError: a proxy is unusable: not a URL, or a SOCKS proxy without its library.
    """
    found = getproxies()
    used = {scheme: found[scheme] for scheme in _SCHEMES if found.get(scheme)}
    excluded = [entry.strip() for entry in found.get("no", "").split(",")]
    host = urlsplit(url).hostname or ""
    if not used or "*" in excluded:
        return
    try:
        httpx.Client().close()
    except (ValueError, httpx.InvalidURL, ImportError) as error:
        names = " or ".join(f"{scheme.upper()}_PROXY" for scheme in used)
        raise ConfigurationError(f"{names} is not usable: {error}: use http://host:port, or unset it") from None
    if is_loopback(host) and host not in excluded:
        if not any(getproxies_environment().get(scheme) for scheme in _SCHEMES):
            # Set in the system (macOS, Windows): a single variable would make Python ignore all of them.
            os.environ.update({f"{scheme}_proxy": proxy for scheme, proxy in used.items()})
        # httpx and reqwest each read a different spelling, if both are set.
        names = ("no_proxy", "NO_PROXY")
        os.environ |= dict.fromkeys(names, ",".join(filter(None, (*map(os.environ.get, names), host))))


def proxy_for(url: str) -> str | None:
    """The environment's proxy for a URL; None if there is none, or for loopback hosts.

    For clients without SOCKS support (aiohttp): SOCKS proxies count as none.
    """
    found, parts = getproxies(), urlsplit(url)
    proxy, host = found.get(parts.scheme) or found.get("all"), parts.hostname or ""
    if not proxy or proxy.lower().startswith("socks") or is_loopback(host) or proxy_bypass(host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def seconds_asked(retry_after: str, now: datetime) -> float | None:
    """Seconds to wait by a ``Retry-After`` header (RFC 9110, 10.2.3), at a time with zone; 0 for a past date, None if invalid."""
    value = retry_after.strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value, re.ASCII):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())


def long_wait_text(name: str, seconds: float, longest: float, setting: str) -> str:
    """The message for a service that asks for a longer wait (seconds) than its ``setting`` allows."""
    end = clock_time(min(seconds, 10 * 365 * 86_400))  # a date beyond the calendar's end would fail
    return (
        f"{name} asks for a wait of {seconds:,.0f} s, until {end} (a quota?), which is longer than "
        f"{setting}={longest:g} allows: progress is kept, so run the same command again after that, or raise {setting}"
    )
