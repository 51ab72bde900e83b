"""The first turns of a group: one request for all members, or one each.

    python -m benchmarks first_turn

A scripted service in its own process answers through the real tinker SDK; episodes have 1 to 4 turns, all equally likely. Sample times
are lognormal with a median of 3 s: ``short`` has a spread of 0.1, ``heavy`` of 0.6 (the slowest of 8 then takes 2.5 times the median).
The two ways take turns within each round.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import polars as pl
import tinker

from benchmarks.shared.report import write_result
from searchr1_async import Episode, Passage, Question
from searchr1_async.config import EpisodeLimits, FirstTurn, SamplingSettings
from searchr1_async.episodes.formats import Dialect, FinalAnswer, Reading, SearchRequest
from searchr1_async.episodes.types import SearchCall
from searchr1_async.local.process import Scripted, local_service
from searchr1_async.rollout.event_loop import Pulse
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.player import GroupTask, LocalPlayer, TinkerPolicy

MEMBERS, PROMPT_TOKENS, PASSAGE_TOKENS, TURN_TOKENS, MOST_TURNS = 8, 300, 150, 40, 4
END, CALL, ANSWER, RESULT = 2, 3, 4, 5
SHAPES = {"short": 0.1, "heavy": 0.6}
SECONDS = 3.0
ARMS: tuple[FirstTurn, ...] = ("shared", "split")


def reply(prompt: list[int], chance: random.Random) -> list[int]:
    """One turn: an answer or a search, so that 1, 2, 3 and 4 turns are equally likely."""
    turn = prompt.count(RESULT)
    kind = ANSWER if chance.random() < 1 / (MOST_TURNS - turn) else CALL
    return [*(chance.randrange(100, 1000) for _ in range(TURN_TOKENS)), kind, END]


class NumberDialect(Dialect):
    """Turns of bare numbers: what is measured is the way to the service, not a tokenizer."""

    name = "numbers"
    stop: list[int] | list[str] = [END]  # noqa: RUF012

    def __init__(self) -> None:
        """Without a renderer and a tokenizer."""

    def start(self, question: Question, given: SearchCall | None = None) -> list[int]:
        return [100 + int(question.id)] * PROMPT_TOKENS

    def read(self, prompt_tokens: Sequence[int], sampled_tokens: Sequence[int]) -> tuple[str, Reading]:
        return "", SearchRequest(("query",)) if CALL in sampled_tokens else FinalAnswer("answer")

    def decode(self, tokens: Sequence[int]) -> str:
        return ""

    def extend(self, prompt_tokens: Any, sampled_tokens: Any, queries: Any, results: Any) -> list[int] | None:
        return [RESULT] + [99] * PASSAGE_TOKENS

    def _append(self, prompt_tokens: Any, sampled_tokens: Any, content: str) -> list[int] | None:
        raise NotImplementedError("every call is valid")

    def _written(self, answer: str) -> str:
        return answer

    def write_call(self, queries: Sequence[str]) -> list[int]:
        return [CALL, END]

    def write_answer(self, answer: str) -> list[int]:
        return [ANSWER, END]


async def instant_search(queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
    """Finds one passage, in no time."""
    return [[Passage("passage", "", "text")] for _ in queries]


@dataclass
class Played:
    """What one batch took."""

    wall: float = 0.0
    cpu: float = 0.0
    episodes: list[float] = field(default_factory=list)
    groups: list[float] = field(default_factory=list)
    """Seconds until each was complete, from the batch's begin: what streamed learning waits for."""


async def play(
    client: tinker.SamplingClient, gate: SampleGate, first_turn: FirstTurn, groups: int, seed: int
) -> Played:
    """A batch of groups, all at once."""
    limits = EpisodeLimits(max_turns=MOST_TURNS, max_tokens=64)
    player = LocalPlayer(NumberDialect(), instant_search, limits, gate, first_turn)
    policy = TinkerPolicy(client, 0, SamplingSettings())
    played = Played()

    async def finished(member: int, episode: Episode) -> None:
        if episode.failed:
            raise RuntimeError(f"an episode failed: {episode.error}")
        played.episodes.append(episode.seconds)

    async def group(place: int) -> None:
        question = Question(str(place), "question", ("answer",))
        task = GroupTask(place, question, tuple(range(MEMBERS)), seed=1_000_003 * seed + 1024 * place)
        await player.play(task, policy, finished)
        played.groups.append(time.monotonic() - began)

    cpu, began = time.process_time(), time.monotonic()
    async with Pulse(gate.client_is), anyio.create_task_group() as tasks:
        for place in range(groups):
            tasks.start_soon(group, place)
    played.wall, played.cpu = time.monotonic() - began, time.process_time() - cpu
    return played


async def measure(sizes: Sequence[int], rounds: int) -> pl.DataFrame:
    """One row a batch."""
    rows: list[dict[str, object]] = []
    for shape, jitter in reversed(SHAPES.items()):
        script = Scripted("benchmarks.first_turn.run:reply", latency={"floor": SECONDS, "jitter": jitter})
        with tempfile.TemporaryDirectory() as folder:
            async with local_service("scripted", folder=Path(folder), scripted=script) as service:
                client = await asyncio.to_thread(
                    lambda url=service.url, key=service.api_key: tinker.ServiceClient(base_url=url, api_key=key)
                )
                sampler = await client.create_sampling_client(base_model=service.model_name)
                await play(sampler, SampleGate(), "shared", 4, seed=0)  # connections
                for groups in sizes:
                    gates = {arm: SampleGate() for arm in ARMS}
                    for number in range(rounds):
                        for arm in ARMS:
                            played = await play(sampler, gates[arm], arm, groups, seed=number + 1)
                            rows.append(row(shape, groups, number, arm, played))
                            print(rows[-1], flush=True)
                await client.close("success")
    return pl.DataFrame(rows)


def row(shape: str, groups: int, number: int, arm: str, played: Played) -> dict[str, object]:
    episodes = len(played.episodes)
    assert episodes == groups * MEMBERS
    assert len(played.groups) == groups
    return {
        "tail": shape,
        "groups": groups,
        "round": number,
        "first turn": arm,
        "wall s": played.wall,
        "mean episode s": sum(played.episodes) / episodes,
        "mean group s": sum(played.groups) / groups,
        "CPU ms an episode": 1000 * played.cpu / episodes,
        "load": os.getloadavg()[0],
    }


def table(rows: pl.DataFrame) -> str:
    """Means over the rounds."""
    keys = ["tail", "groups", "first turn"]
    means = rows.group_by(keys, maintain_order=True).agg(
        pl.col("wall s", "mean episode s", "mean group s", "CPU ms an episode").mean(),
    )
    lines = [
        "| tail | groups x 8 | first turn | wall s | mean episode s | mean group s | CPU ms an episode |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tail, groups, arm, wall, episode, group, cpu in means.sort("tail", "groups").iter_rows():
        lines.append(f"| {tail} | {groups} | {arm} | {wall:.1f} | {episode:.2f} | {group:.2f} | {cpu:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = asyncio.run(measure(options.groups, options.rounds))
    about = (
        f"Median sample {SECONDS:g} s; prompts of {PROMPT_TOKENS} tokens and {PASSAGE_TOKENS + TURN_TOKENS} more a turn. "
        "Wall: until the last episode; it hangs on the one slowest sample of all, so the means are what compares. "
        "CPU: of this process, the SDK's thread included. Means over the rounds, in which the two take turns. "
        f"The machine is shared: its load average was {rows['load'].min():.1f} to {rows['load'].max():.1f} meanwhile."
    )
    write_result("first_turn", "The first turns of a group", [about, table(rows)], rows)
