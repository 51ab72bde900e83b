"""Choice of the service, in processes with their own home folder and environment, as the real SDK sees them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinker

import searchr1_async as sr
from searchr1_async.events import Event, Notice
from searchr1_async.service.availability import choose_model
from searchr1_async.service.connection import find_endpoint, is_embedded, is_tinker_cloud, wait_for
from tests import tiny_world
from tests.local.serving import KEY, sdk, service_thread

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of the machine that runs the test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL", "TINKER_CREDENTIAL_CMD"):
        monkeypatch.delenv(name, raising=False)


def log_in(home: Path) -> None:
    """As ``tinker auth login`` does, with the SDK's own store."""
    from tinker.lib.credentials import JsonCredentialStore, ManualKey

    store = JsonCredentialStore(home / ".tinker" / "credentials.json")
    store.add_key("one", ManualKey(key="tml-stored", name="one"))
    store.set_default("one")


def test_a_stored_login_is_detected(tmp_path: Path) -> None:
    assert is_embedded(None)
    assert "has no credentials" in find_endpoint(None).text
    log_in(tmp_path / "home")
    found = find_endpoint(None)
    assert (found.kind, is_tinker_cloud(None)) == ("cloud", True)
    assert found.text == "using Tinker's cloud: tinker auth login has stored a key, and no other service is named"
    assert is_embedded("embedded")


def test_a_credentials_command_is_detected_but_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"touch {tmp_path}/was-run; echo tml-made")
    assert find_endpoint(None).text.startswith("using Tinker's cloud: TINKER_CREDENTIAL_CMD is set")
    assert not (tmp_path / "was-run").exists()


def test_a_key_and_a_url_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-key")
    assert find_endpoint(None).text.startswith("using Tinker's cloud: TINKER_API_KEY is set")
    monkeypatch.setenv("TINKER_BASE_URL", "http://host:8000/")
    assert find_endpoint(None).text == "using the Tinker service at http://host:8000: TINKER_BASE_URL names it"
    assert not is_tinker_cloud(None)
    assert find_endpoint("http://other:1").url == "http://other:1"


def test_an_unreadable_login_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "home" / ".tinker" / "credentials.json"
    file.parent.mkdir(parents=True)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(sr.errors.ConfigurationError, match="tinker auth login"):
        find_endpoint(None)


def test_an_sdk_without_logins_knows_only_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log_in(tmp_path / "home")
    monkeypatch.setitem(sys.modules, "tinker.lib._auth_token_provider", None)
    assert is_embedded(None)
    monkeypatch.setenv("TINKER_API_KEY", "tml-key")
    assert not is_embedded(None)


@pytest.mark.parametrize(
    ("service", "key", "named"),
    [
        ("127.0.0.1:8000", "tml-key", "service is '127.0.0.1:8000'.*not a valid URL"),
        (8000, "tml-key", r"service is 8000 \(int\)"),
        ("", "", "service is ''.*not a valid URL"),
        ("http://host:1", "tml-secret\n", "TINKER_API_KEY contains"),
        ("http://host:1", "tml-sécret", "TINKER_API_KEY contains"),
    ],
)
async def test_an_invalid_service_is_refused_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Any, key: str, named: str
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", key)
    search = tiny_world.make_search(tmp_path / "index")
    question = sr.Question("q", "Who?", ("Austen",))
    with pytest.raises(sr.errors.ConfigurationError, match=named) as caught:
        sr.train(
            [question],
            search,
            out_dir=tmp_path / "run",
            service=service,
            config=sr.TrainConfig(groups_per_batch=1, minibatches=1),
        )
    assert "secret" not in str(caught.value)
    with pytest.raises(sr.errors.ConfigurationError, match=named):
        await sr.rollout([question], search, service=service, progress=False)
    assert not (tmp_path / "run").exists()


def test_the_only_offered_model_is_the_default() -> None:
    name, note = choose_model(None, ("HuggingFaceTB/SmolLM2-135M-Instruct",))
    assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert note is not None
    assert "offers only one" in note
    with pytest.raises(sr.errors.ModelError, match="choose one with model"):
        choose_model(None, ("some/model", "another/model"))


@pytest.mark.parametrize("way", ["TINKER_BASE_URL", "service"])
async def test_another_service_is_used_without_naming_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Like ``python -m searchr1_async.local``: a model of this machine, and no hub for its tokenizer."""
    from searchr1_async.local.scripted_backend import ScriptedBackend
    from tests.episodes.stand_in import stand_in

    folder = tmp_path / "model"
    stand_in().save_pretrained(folder)
    (folder / "config.json").write_text("{}", encoding="utf-8")

    def reply(prompt: list[int], chance: random.Random) -> str:
        return "Answer: Austen"

    backend = ScriptedBackend(reply, model_name=str(folder), tokenizer_path=str(folder))
    events: list[Event] = []
    with service_thread(tmp_path / "service", backend) as served:
        monkeypatch.setenv("TINKER_API_KEY", KEY)
        settings: dict[str, Any] = {"service": served.url}
        if way == "TINKER_BASE_URL":
            monkeypatch.setenv(way, served.url)
            settings = {}
        groups = await sr.rollout([sr.Question("q", "Who?", ("Austen",))], tiny_world.make_search(tmp_path / "index"), progress=False, on_event=events.append, **tiny_world.given(sr.RolloutConfig, settings, group_size=2, renderer="chatml", max_tokens=16))  # fmt: skip
    assert len(groups[0].episodes) == 2
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices[0].startswith(f"using the Tinker service at {served.url}")
    assert any("offers only one" in text for text in notices)


async def test_a_wrong_key_is_reported_soon_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from searchr1_async.local.scripted_backend import ScriptedBackend
    from tests.local.serving import successors

    monkeypatch.setenv("TINKER_API_KEY", "tml-wrong")
    with service_thread(tmp_path / "service", ScriptedBackend(successors)) as served:
        search = tiny_world.make_search(tmp_path / "index")
        with pytest.raises(
            sr.errors.ServiceError, match=r"refuses to list its models .*401 the API key is missing or wrong"
        ) as caught:
            await sr.rollout([sr.Question("q", "Who?", ("Austen",))], search, service=served.url, progress=False)
    assert "tml-wrong" not in str(caught.value)
    assert "Error code" not in str(caught.value)


async def test_a_closed_client_is_one_of_our_errors(tmp_path: Path) -> None:
    from searchr1_async.local.scripted_backend import ScriptedBackend
    from tests.local.serving import successors

    with service_thread(tmp_path / "service", ScriptedBackend(successors)) as served:
        async with sdk(served.url) as client:
            holder = client.holder
            rest = tinker.RestClient(holder)
        with pytest.raises(sr.errors.ServiceError, match="RuntimeError: Internal client holder is closed"):
            await wait_for("asking", rest.get_server_capabilities)


def test_the_first_line_of_a_run_says_which_service_it_uses(tmp_path: Path) -> None:
    """Only a stored login, in a separate process: the cloud is chosen and no local model starts."""
    log_in(tmp_path / "home")
    code = (
        "import asyncio, os, sys\n"
        "import searchr1_async as sr\n"
        "from searchr1_async.events import Notice\n"
        "from tests import tiny_world\n"
        "def first(event):\n"
        "    if isinstance(event, Notice):\n"
        "        print(event.text, flush=True)\n"
        "        os._exit(0)\n"
        "async def main():\n"
        "    search = tiny_world.make_search(sys.argv[1] + '/index')\n"
        "    await sr.train([sr.Question('q', 'Who?', ('A',))], search, sys.argv[1] + '/run',\n"
        "                   sr.TrainConfig(groups_per_batch=1, minibatches=1), progress=False, on_event=first)\n"
        "asyncio.run(main())\n"
    )
    # No proxy listens there, so the cloud is never reached.
    closed = "http://127.0.0.1:9"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment
        | {"PYTHONPATH": str(Path(sr.__file__).parents[1]), "HTTPS_PROXY": closed, "HTTP_PROXY": closed}
        | {"HOME": str(tmp_path / "home"), "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    first = "using Tinker's cloud: tinker auth login has stored a key, and no other service is named\n"
    assert ended.stdout == first, ended.stderr[-2000:]
