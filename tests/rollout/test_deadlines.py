"""Deadlines in virtual time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anyio
import pytest

from searchr1_async.boundary.waits import PausableDeadlines
from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.formats import TagsDialect
from searchr1_async.episodes.rendering import ChatMLRenderer
from searchr1_async.episodes.types import Episode, Question, StopReason
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.player import GroupTask, LocalPlayer
from searchr1_async.testing import DictSearch, ScriptedPolicy, make_tiny_tokenizer
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_limit_counts_only_the_time_in_which_nothing_was_held() -> None:
    deadlines, began, ended = PausableDeadlines(), now(), {}

    async def work(name: str, seconds: float | None, takes: float) -> None:
        with deadlines.limit(seconds) as scope:
            await anyio.sleep(takes)
        ended[name] = (round(now() - began), scope.cancelled_caught)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work, "cut before", 2, 1000)
        tasks.start_soon(work, "cut after", 10, 1000)
        tasks.start_soon(work, "done meanwhile", 10, 50)
        tasks.start_soon(work, "never cut", None, 200)
        await anyio.sleep(5)
        deadlines.pause(True)
        deadlines.pause(True)
        tasks.start_soon(work, "begun meanwhile", 3, 1000)
        await anyio.sleep(100)
        assert deadlines.paused_seconds == pytest.approx(100)
        deadlines.pause(False)
        deadlines.pause(False)
    assert ended == {
        "cut before": (2, True),
        "done meanwhile": (50, False),
        "begun meanwhile": (108, True),
        "cut after": (110, True),
        "never cut": (200, False),
    }
    assert deadlines.paused_seconds == pytest.approx(100)


@pytest.mark.parametrize("first_turn", ["shared", "split"])
async def test_a_pause_cuts_no_episode(tmp_path: Path, first_turn: Any) -> None:
    tokenizer = make_tiny_tokenizer(tmp_path)
    dialect = TagsDialect(ChatMLRenderer(tokenizer), tokenizer)
    limits = EpisodeLimits(max_turns=3, max_tokens=100, max_trajectory_tokens=2000, max_seconds=5)
    player = LocalPlayer(dialect, DictSearch(), limits, SampleGate(clock=now), first_turn)
    call, answer = dialect.write_call(["x"]), dialect.write_answer("yes")
    policy = ScriptedPolicy(lambda prompt: answer if "All about" in dialect.decode(prompt) else call)
    played: list[Episode] = []

    async def finished(member: int, episode: Episode) -> None:
        played.append(episode)

    player.pause(True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(player.play, GroupTask(0, Question("1", "Question 1?", ("yes",)), (0, 1)), policy, finished)
        await anyio.sleep(3600)
        assert played == []
        player.pause(False)
    assert [episode.stop_reason for episode in played] == [StopReason.ANSWER] * 2
