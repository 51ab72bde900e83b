"""Resolves the ``service`` argument: the named service, else one the SDK has credentials for, else the embedded one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import tinker

from searchr1_async.billing import is_tinker_host
from searchr1_async.boundary.network import checked_url, prepare_proxies
from searchr1_async.boundary.settings import shown
from searchr1_async.errors import ConfigurationError

EMBEDDED = "embedded"
"""Value of ``service=`` for the embedded service, regardless of credentials."""

ServiceName = str | tinker.ServiceClient | None
"""The argument ``service``: a base URL, ``"embedded"``, a client, or None to use the environment."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A Tinker service, not yet opened."""

    kind: Literal["embedded", "url", "cloud", "client"]
    reason: str
    """Why it was chosen, as text."""
    url: str | None = None
    """Base URL; None for the embedded service and for the cloud, whose URL the SDK knows."""

    @property
    def text(self) -> str:
        """First line of a run."""
        where = {
            "embedded": "the embedded Tinker service on this machine",
            "cloud": "Tinker's cloud",
            "url": f"the Tinker service at {self.url}",
            "client": "the Tinker service of the given client" + (f", {self.url}" if self.url else ""),
        }[self.kind]
        return f"using {where}: {self.reason}"


def find_endpoint(service: ServiceName) -> Endpoint:
    """Resolves the argument ``service`` in this environment. Opens nothing.

    Raises:
        ConfigurationError: no service, an invalid URL or key, or unreadable SDK credentials.
    """
    if isinstance(service, tinker.ServiceClient):
        return Endpoint("client", "service=… gives it", getattr(service, "_base_url", None) or _resolved(None))
    if service is not None and not isinstance(service, str):
        raise ConfigurationError(
            f"service is {shown(service)} ({type(service).__name__}): pass a URL, {EMBEDDED!r} or a tinker.ServiceClient"
        )
    if service == EMBEDDED:
        return Endpoint("embedded", f"service={EMBEDDED!r} names it")
    if service is not None:
        _check_key()
        return Endpoint("url", "service=… names it", checked_url(service, "service"))
    if base_url := os.environ.get("TINKER_BASE_URL"):
        _check_key()
        return Endpoint("url", "TINKER_BASE_URL names it", checked_url(base_url, "TINKER_BASE_URL"))
    if (source := credentials_source()) is not None:
        _check_key()
        return Endpoint("cloud", f"{source}, and no other service is named")
    return Endpoint(
        "embedded",
        "no service is named, and the Tinker SDK has no credentials (TINKER_API_KEY, TINKER_CREDENTIAL_CMD or tinker auth login)",
    )


def credentials_source() -> str | None:
    """Where the SDK finds its credentials, as text; None if it has none. Refuses unreadable credentials."""
    if os.environ.get("TINKER_API_KEY"):
        return "TINKER_API_KEY is set"
    try:
        from tinker.lib._auth_token_provider import resolve_auth_provider
    except ImportError:  # an SDK with API keys only
        return None
    try:
        resolve_auth_provider(None, enforce_cmd=False)
    except tinker.TinkerError:
        return None
    except (TypeError, RuntimeError):  # a different SDK signature; no home folder
        return None
    except (ValueError, OSError) as error:
        raise ConfigurationError(
            f"cannot read the credentials stored by `tinker auth login` ({type(error).__name__}): log in again, set "
            f"TINKER_API_KEY, or pass service={EMBEDDED!r} for the embedded service"
        ) from error
    if os.environ.get("TINKER_CREDENTIAL_CMD"):
        return "TINKER_CREDENTIAL_CMD is set"
    return "tinker auth login has stored a key"


def is_embedded(service: ServiceName) -> bool:
    """Whether this is the embedded service."""
    return find_endpoint(service).kind == "embedded"


def is_tinker_cloud(service: ServiceName) -> bool:
    """Whether a service is Tinker's cloud, judging by its address."""
    endpoint = find_endpoint(service)
    return endpoint.kind == "cloud" or (endpoint.url is not None and is_tinker_host(_host(endpoint.url)))


def prepare(service: ServiceName) -> Endpoint:
    """Resolves the endpoint and prepares the environment's proxies for it."""
    endpoint = find_endpoint(service)
    prepare_proxies(endpoint.url or ("http://127.0.0.1" if endpoint.kind == "embedded" else _resolved(None)))
    return endpoint


def address_of(client: tinker.ServiceClient) -> str:
    """The base URL of a client."""
    return _resolved(getattr(client, "_base_url", None))


def _resolved(url: Any) -> str:
    try:
        from tinker.lib.base_url import resolve_base_url
    except ImportError:
        return str(url or os.environ.get("TINKER_BASE_URL") or "https://tinker.thinkingmachines.dev")
    return resolve_base_url(url)


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname or ""


def _check_key() -> None:
    """Refuses a key that cannot be sent in an HTTP header, which the SDK would retry for a minute."""
    key = os.environ.get("TINKER_API_KEY", "")
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise ConfigurationError(
            "TINKER_API_KEY contains a space, a line break or a character that keys never have: set it to the key alone"
        )
