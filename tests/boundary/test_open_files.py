"""The limit of open files, in processes that have their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from searchr1_async.boundary.paths import OpenFiles
from tests import tiny_world
from tests.local.serving import KEY, service_thread

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
    told = []
    search = tiny_world.make_search(folder)
    asked = [sr.Question(f"q{i}", f"Who wrote book {i}?", ("Austen",)) for i in range(int(questions))]
    groups = await sr.rollout(
        asked, search,
        sr.RolloutConfig(model="Qwen/Qwen3.5-4B", tokenizer=tokenizer, group_size=4, max_tokens=64),
        service=url, progress=False, on_event=told.append,
    )
    warnings = [event.text for event in told if isinstance(event, Notice) and event.is_warning]
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
    from searchr1_async.local.scripted import Latency, ScriptedBackend
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
