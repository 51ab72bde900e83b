"""Which Tinker service a call means, and why: the one named, else the one for which the SDK has credentials, else the embedded one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import tinker

from searchr1_async.billing import is_tinker_host
from searchr1_async.boundary.network import checked_url, prepare_proxies
from searchr1_async.boundary.values import shown
from searchr1_async.errors import ConfigurationError

EMBEDDED = "embedded"
"""As ``service=…``: the embedded service, whatever credentials there are."""

ServiceName = str | tinker.ServiceClient | None
"""What the argument ``service`` may be: a base URL, ``"embedded"``, a client, or None for what the environment says."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A Tinker service, not opened."""

    kind: Literal["embedded", "url", "cloud", "client"]
    reason: str
    """Why it is this one, in words."""
    url: str | None = None
    """Its base URL; None of the embedded service and of the cloud, whose URL the SDK knows."""

    @property
    def text(self) -> str:
        """For the first line of a run."""
        where = {
            "embedded": "the embedded Tinker service on this machine",
            "cloud": "Tinker's cloud",
            "url": f"the Tinker service at {self.url}",
            "client": "the Tinker service of the client that was given" + (f", {self.url}" if self.url else ""),
        }[self.kind]
        return f"using {where}: {self.reason}"


def find_endpoint(service: ServiceName) -> Endpoint:
    """What the argument ``service`` means in this environment. Opens nothing.

    Raises:
        ConfigurationError: no service, no URL, a key that cannot be sent, or credentials of the SDK that cannot be read.
    """
    if isinstance(service, tinker.ServiceClient):
        return Endpoint("client", "service=… gives it", getattr(service, "_base_url", None) or _resolved(None))
    if service is not None and not isinstance(service, str):
        raise ConfigurationError(
            f"service is {shown(service)} ({type(service).__name__}): give a URL, {EMBEDDED!r} or a tinker.ServiceClient"
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
    """Where the SDK finds its credentials, in words; None where it has none.

    Raises:
        ConfigurationError: it has some that it cannot read.
    """
    if os.environ.get("TINKER_API_KEY"):
        return "TINKER_API_KEY is set"
    try:
        from tinker.lib._auth_token_provider import resolve_auth_provider
    except ImportError:  # an SDK that knows only the key
        return None
    try:
        resolve_auth_provider(None, enforce_cmd=False)
    except tinker.TinkerError:
        return None
    except (TypeError, RuntimeError):  # another SDK's arguments; no home folder
        return None
    except (ValueError, OSError) as error:
        raise ConfigurationError(
            f"the credentials that `tinker auth login` stored cannot be read ({type(error).__name__}): log in again, set "
            f"TINKER_API_KEY, or pass service={EMBEDDED!r} for the embedded service"
        ) from error
    if os.environ.get("TINKER_CREDENTIAL_CMD"):
        return "TINKER_CREDENTIAL_CMD is set"
    return "tinker auth login has stored a key"


def is_embedded(service: ServiceName) -> bool:
    """Whether the embedded service would be started."""
    return find_endpoint(service).kind == "embedded"


def is_tinker_cloud(service: ServiceName) -> bool:
    """Whether a service that is not the embedded one is Tinker's cloud, as far as its address tells."""
    endpoint = find_endpoint(service)
    return endpoint.kind == "cloud" or (endpoint.url is not None and is_tinker_host(_host(endpoint.url)))


def prepare(service: ServiceName) -> Endpoint:
    """The endpoint, with the environment's proxies made ready for it.

    Raises:
        ConfigurationError: as :func:`find_endpoint` and :func:`~searchr1_async.boundary.network.prepare_proxies`.
    """
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
    """A key with such characters can be sent in no header: the SDK would try for a minute."""
    key = os.environ.get("TINKER_API_KEY", "")
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise ConfigurationError(
            "TINKER_API_KEY holds a space, a line break or a letter that no key has: set it to the key alone"
        )
