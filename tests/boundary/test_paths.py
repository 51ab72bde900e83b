"""Paths are made absolute where they come in; and the limit of open files, in processes that have their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import searchr1_async
from searchr1_async.boundary import paths
from searchr1_async.boundary.paths import OpenFiles, absolute_path, as_name_or_folder, cache_folder, is_same_place
from searchr1_async.errors import ConfigurationError
from tests import tiny_world
from tests.local.serving import KEY, service_thread


def test_a_later_chdir_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = absolute_path("runs/lr[1]")
    monkeypatch.chdir("/")
    assert path == tmp_path / "runs" / "lr[1]"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_path("~/run") == absolute_path(Path("~/run")) == tmp_path / "run"


def test_links_and_parents_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "runs")
    monkeypatch.chdir(tmp_path)
    assert absolute_path("link/../x").resolve() == tmp_path / "disk" / "x"


@pytest.mark.parametrize("given", [None, 3, b"runs", "", "  ", "a\0b", "half \ud83d", "~nobody-of-that-name/run"])
def test_a_value_that_is_no_path_is_refused_by_argument_name(given: object) -> None:
    with pytest.raises(ConfigurationError, match="out_dir"):
        absolute_path(given, "out_dir")  # pyright: ignore[reportArgumentType]


def test_a_deleted_current_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigurationError, match="full path"):
        absolute_path("run")
    assert absolute_path("/run") == Path("/run")


def test_the_cache_folder_follows_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "caches" / "searchr1_async"
    assert cache_folder().is_dir()


def test_a_name_that_is_a_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("org/tiny", "home/tiny", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    assert as_name_or_folder("model", "org/tiny") == str(tmp_path / "org" / "tiny")
    assert as_name_or_folder("model", "~/tiny") == str(tmp_path / "home" / "tiny")
    assert as_name_or_folder("model", Path("elsewhere")) == str(tmp_path / "elsewhere")
    for name in ("Qwen/Qwen3-8B", "SmolLM2-135M-Instruct", "x" * 5000):
        assert as_name_or_folder("model", name) == name
    for blank in ("", "  "):
        with pytest.raises(ConfigurationError, match="model is"):
            as_name_or_folder("model", blank)
    for missing in ("./tiny", "~/none", Path("none"), str(tmp_path / "none")):
        with pytest.raises(ConfigurationError, match=r"model is .* the folder .* does not exist"):
            as_name_or_folder("model", missing)
    assert is_same_place("org/tiny", str(tmp_path / "org" / "tiny"))
    assert not is_same_place("Qwen/Qwen3-8B", "Qwen/Qwen3-4B")


def test_a_cache_that_cannot_be_created_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="set XDG_CACHE_HOME to a folder that you can write to"):
        cache_folder()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "user_cache_dir", lambda *names, **options: "~no-such-user/.cache/searchr1_async")
    with pytest.raises(ConfigurationError, match="set XDG_CACHE_HOME"):  # a user without a home
        cache_folder()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_text_that_is_too_long_for_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a path was meant and a question, JSON or a prompt was given, or a name that was put together went on and on."""
    monkeypatch.chdir(tmp_path)
    for text in ("x" * 256, "runs/" + "é" * 128, json.dumps([{"question": "Which?", "answer": "A" * 300}])):
        for read in (
            searchr1_async.load_questions,
            searchr1_async.load_corpus,
            searchr1_async.evaluation.load_suites,
            absolute_path,
        ):
            with pytest.raises(ConfigurationError, match="longer than 255 bytes") as refusal:
                read(text)
            assert len(str(refusal.value)) < 250
    (tmp_path / ("x" * 255)).touch()
    assert absolute_path("x" * 255).is_file()


pytest.importorskip("resource")

RAISE = """
import json, resource
from searchr1_async.boundary.paths import raise_limit

def raised():
    found = raise_limit()
    return [resource.getrlimit(resource.RLIMIT_NOFILE), found.limit, found.used, found.requests]

first = raised()
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
print(json.dumps([first, raised()]))
"""

PLAY = """
import asyncio, json, sys
import searchr1_async as sr
from searchr1_async.events import Notice
from tests import tiny_world

async def main(url, tokenizer, folder, questions):
    reported = []
    search = tiny_world.make_search(folder)
    asked = [sr.Question(f"q{i}", f"Who wrote book {i}?", ("Austen",)) for i in range(int(questions))]
    groups = await sr.rollout(
        asked, search,
        sr.RolloutConfig(model="Qwen/Qwen3.5-4B", tokenizer=tokenizer, group_size=4, max_tokens=64),
        service=url, progress=False, on_event=reported.append,
    )
    warnings = [event.text for event in reported if isinstance(event, Notice) and event.is_warning]
    print(json.dumps([sum(len(group.episodes) for group in groups), sum(len(group.failed) for group in groups), warnings]))

asyncio.run(main(*sys.argv[1:]))
"""


def limited(soft: int, hard: int | str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with such limits of open files."""
    script = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$0" -c "$@"'
    return subprocess.run(
        ["bash", "-c", script, sys.executable, code, *arguments],
        env=tiny_world.child_environment() | {"TINKER_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_limit_is_raised_as_far_as_it_may_be_and_then_bounds_the_requests() -> None:
    first, second = json.loads(limited(256, 2048, RAISE).stdout)
    (soft, hard), limit, used, requests = first
    assert (soft, hard, limit) == (2048, 2048, 2048)
    assert 3 <= used < 100
    assert 1000 < requests < 2048 - used
    (soft, hard), limit, used, requests = second
    assert (soft, hard, limit) == (256, 256, 256)
    assert 2 * requests + used < 256


@pytest.mark.parametrize(("limit", "used"), [(64, 60), (256, 40), (1024, 60), (4096, 100), (65536, 100)])
def test_more_files_allow_more_requests_and_never_more_than_there_are(limit: int, used: int) -> None:
    requests = OpenFiles(limit, used).requests
    assert requests is not None
    assert 1 <= requests <= max(1, limit - used)
    assert requests <= (OpenFiles(limit + 100, used).requests or 0)
    assert (OpenFiles(limit, used).warning(1900) is None) == (requests >= 1900)


def play(tmp_path: Path, soft: int, hard: int, questions: int) -> tuple[int, int, list[str]]:
    """Episodes that were played, those that failed, and what was warned of, in a process with such a limit."""
    from searchr1_async.local.process import Latency
    from searchr1_async.local.scripted_backend import ScriptedBackend
    from tests.episodes.stand_in import stand_in
    from tests.service.test_reachability import MODEL, reply

    stand_in().save_pretrained(tmp_path / "tokenizer")
    backend = ScriptedBackend(
        reply, model_name=MODEL, tokenizer_path=str(tmp_path / "tokenizer"), latency=Latency(floor=1.0)
    )
    with service_thread(tmp_path / "service", backend) as served:
        ended = limited(
            soft, hard, PLAY, served.url, str(tmp_path / "tokenizer"), str(tmp_path / "index"), str(questions)
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


def test_hundreds_of_episodes_are_played_with_256_files(tmp_path: Path) -> None:
    played, failed, warnings = play(tmp_path, 256, 256, 60)
    assert (played, failed) == (240, 0)
    assert any("this process may open 256 files" in text and "ulimit -Hn" in text for text in warnings)


@pytest.mark.slow
@pytest.mark.parametrize(("soft", "hard"), [(256, 1024), (1024, 1024), (1024, 8192)])
def test_a_large_rollout_is_played_with_few_files(tmp_path: Path, soft: int, hard: int) -> None:
    played, failed, warnings = play(tmp_path, soft, hard, 300)
    assert (played, failed) == (1200, 0)
    assert bool(warnings) == (hard == 1024)
