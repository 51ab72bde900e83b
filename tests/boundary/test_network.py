"""Proxies of the environment, in real processes with a real proxy; loopback addresses; the health of a service."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.boundary import network
from searchr1_async.boundary.network import checked_url, is_loopback, long_wait_text, prepare_proxies, seconds_asked
from searchr1_async.errors import ConfigurationError
from tests import tiny_world
from tests.gateway import Gateway, gateway
from tests.local.serving import KEY, Served, service_thread

pytestmark = pytest.mark.anyio

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

CHILD = """
import asyncio, json, sys
from searchr1_async.config import LocalOptions
from searchr1_async.service.opening import check_service, open_service
from searchr1_async.errors import SearchR1Error
from pathlib import Path

async def main(url, tokenizer, folder):
    reported = []
    async with open_service(url, "scripted", folder=Path(folder), local=LocalOptions(), emit=reported.append, tokenizer=tokenizer) as service:
        await service.create_sampling_client()
try:
    asyncio.run(main(*sys.argv[1:]))
    print(json.dumps("opened"))
except (SearchR1Error, ExceptionGroup) as error:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def open_in_child(url: str, folder: Path, **environment: str) -> str:
    """Opens a service with the real SDK in a process of its own: what it came to."""
    from searchr1_async.testing import make_tiny_tokenizer

    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        make_tiny_tokenizer(tokenizer)
    inherited = {name: value for name, value in tiny_world.child_environment().items() if name.upper() not in PROXIES}
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, url, str(tokenizer), str(folder)],
        env=inherited | {"TINKER_API_KEY": KEY} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout, ended.stderr[-2000:]
    return json.loads(ended.stdout)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    from searchr1_async.local.scripted_backend import ScriptedBackend
    from tests.local.serving import successors

    with service_thread(tmp_path / "service", ScriptedBackend(successors, model_name="scripted")) as found:
        yield found


@pytest.fixture
def proxy() -> Iterator[Gateway]:
    with gateway() as found:
        yield found


@pytest.mark.parametrize(
    "excluded",
    ["10.0.0.0/8,other", *(pytest.param(one, marks=pytest.mark.slow) for one in ("", "localhost"))],
)
def test_a_loopback_service_is_never_reached_through_a_proxy(
    served: Served, proxy: Gateway, tmp_path: Path, excluded: str
) -> None:
    proxy.switch("fail")
    environment = {"HTTP_PROXY": proxy.url, "http_proxy": proxy.url, **({"NO_PROXY": excluded} if excluded else {})}
    assert open_in_child(served.url, tmp_path, **environment) == "opened"
    assert proxy.requests == []


def test_a_service_that_only_the_proxy_reaches_is_reached(served: Served, proxy: Gateway, tmp_path: Path) -> None:
    """A name that no resolver knows: the proxy does."""
    port = served.url.rpartition(":")[2]
    proxy.names["tinker.invalid"] = "127.0.0.1"
    assert open_in_child(f"http://tinker.invalid:{port}", tmp_path, HTTP_PROXY=proxy.url) == "opened"
    assert any("healthz" in line for line in proxy.requests)


def test_a_socks_proxy_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    with pytest.raises(ConfigurationError, match=r"^ALL_PROXY is not usable: .*pip install httpx\[socks\]"):
        prepare_proxies("http://127.0.0.1:8000")


@pytest.mark.slow
def test_a_socks_proxy_matters_only_if_it_is_used(served: Served, tmp_path: Path) -> None:
    outcome = open_in_child(served.url, tmp_path, ALL_PROXY="socks5://127.0.0.1:1080")
    assert outcome.startswith("ConfigurationError: ALL_PROXY is not usable")
    assert open_in_child(served.url, tmp_path, ALL_PROXY="socks5://127.0.0.1:1080", NO_PROXY="*") == "opened"


def test_an_invalid_proxy_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "ftp://user:secret@proxy:21")
    with pytest.raises(ConfigurationError, match="HTTP_PROXY") as caught:
        prepare_proxies("http://tinker.example")
    assert "secret" not in str(caught.value)


def test_settings_of_the_system_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of macOS and Windows: a NO_PROXY alone would make Python overlook them."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name.lower(), "")
        monkeypatch.delenv(name.lower())
    monkeypatch.setattr(network, "getproxies", lambda: {"http": "http://proxy:3128"})
    monkeypatch.setenv("NO_PROXY", "")
    prepare_proxies("http://127.0.0.1:8000")
    from urllib.request import getproxies

    assert getproxies() == {"http": "http://proxy:3128", "no": "127.0.0.1"}
    monkeypatch.setenv("http_proxy", "")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("127.0.0.1:8000", "use one such as http://127"),
        ("localhost", "not a valid URL"),
        ("ftp://host", "not a valid URL"),
        ("http://", "not a valid URL"),
        ("http://host:port", "not a valid URL"),
        ("http://host:0", "not a valid URL"),
        ("http://host:70000", "not a valid URL"),
        ("http://xn--a", "not a valid URL"),
        ("", "not a valid URL"),
    ],
)
def test_an_invalid_url_is_refused(url: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        checked_url(url, "service")


def test_a_url_loses_its_slash_and_its_spaces() -> None:
    assert checked_url(" https://host/path/ ", "service") == "https://host/path"


@given(st.ip_addresses(v=4))
def test_an_address_is_loopback_as_the_network_127_is(address: object) -> None:
    first = str(address).split(".")[0]
    assert is_loopback(str(address)) == (first == "127" or str(address) == "0.0.0.0")
    assert is_loopback(f"::ffff:{address}") == is_loopback(str(address))


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("localhost", True),
        ("a.localhost", True),
        ("[::1]", True),
        ("::1%lo", True),
        ("localhost.com", False),
        ("::2", False),
    ],
)
def test_names_of_this_machine(host: str, is_here: bool) -> None:
    assert is_loopback(host) == is_here


def test_a_too_long_wait_names_its_length_end_and_setting() -> None:
    text = long_wait_text("the hub", 86_399, 600, "longest_wait")
    tomorrow = datetime.now().astimezone() + timedelta(seconds=86_399)
    assert "the hub asks for a wait of 86,399 s" in text
    assert f"until {tomorrow:%Y-%m-%d}" in text
    assert "longest_wait=600 allows" in text


@pytest.mark.parametrize("seconds", [1e9, 999_999_999.0])
def test_an_absurd_wait_is_reported_too(seconds: float) -> None:
    assert f"{seconds:,.0f} s" in long_wait_text("the hub", seconds, 600, "longest_wait")


def test_the_header_is_seconds_or_a_date() -> None:
    now = datetime.fromisoformat("2026-11-30T04:00:00+00:00")
    assert seconds_asked("86399", now) == 86_399
    assert seconds_asked("Mon, 30 Nov 2026 05:00:00 GMT", now) == 3_600
    assert seconds_asked("soon", now) is None
