"""Real worker processes and SDK, with a scripted service in this process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest

import searchr1_async as sr
from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.formats import make_dialect
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.types import Episode, Passage, Question, StopReason
from searchr1_async.errors import ConfigurationError, EmbeddingError, SearchError, ServiceError, StoreError
from searchr1_async.events import Notice
from searchr1_async.local.backend import SampleRequest, SampleResult, Snapshot
from searchr1_async.local.process import Latency
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.messages import WorkerSpec
from searchr1_async.rollout.player import GroupPlayer, GroupTask, LocalPlayer, TinkerPolicy
from searchr1_async.rollout.worker_pool import DeathRecord, WorkerPool, worker_processes
from searchr1_async.testing import DictSearch, ScriptedPolicy, make_tiny_tokenizer
from tests import tiny_world
from tests.local.serving import KEY, raw, sdk, service_thread, until

pytestmark = pytest.mark.anyio

LIMITS = EpisodeLimits(max_turns=4, max_tokens=64, max_trajectory_tokens=2000)
INSTRUCTIONS = "search then answer"
METADATA = {"not": lambda: "picklable"}
SLOW = "slowly"
"""Sampling takes a minute for questions with this word."""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    return folder


class Backend(ScriptedBackend):
    """Randomly searches for the question, then answers with it; records samples in progress."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        super().__init__(self._write, tokenizer_path=str(folder), latency=Latency(floor=0.02))
        self.futures: list[Future[SampleResult]] = []
        self._text = tokenizer
        self._slow = Latency(floor=60.0)
        self._fast = self._latency

    def sample(self, snapshot: Snapshot | None, request: SampleRequest) -> Future[SampleResult]:
        future = super().sample(snapshot, request)
        self.futures.append(future)
        return future

    def _write(self, prompt: list[int], chance: random.Random) -> str:
        text = self._text.decode(prompt)
        name = text.partition("Question ")[2].partition("?")[0]
        self._latency = self._slow if SLOW in name else self._fast
        searches = text.count("<information>") - 1  # the instructions may name it
        if "All about" in text and (searches > 2 or chance.random() < 0.5):
            return f"<answer>{name}</answer>"
        return f"<search>{name} {chance.randrange(1000)}</search>"


@dataclass
class World:
    backend: Backend
    url: str
    tokenizer: Any
    dialect: Any
    spec: WorkerSpec

    def local(self, search: SearchTool) -> LocalPlayer:
        return LocalPlayer(self.dialect, search, LIMITS, SampleGate(), "shared")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Iterator[World]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    backend = Backend(tokenizer, tokenizer_folder)
    dialect = make_dialect("tags", "scripted", tokenizer, instructions=INSTRUCTIONS)
    spec = WorkerSpec("tags", "scripted", str(tokenizer_folder), LIMITS, None, INSTRUCTIONS, "shared")
    with service_thread(tmp_path_factory.mktemp("service"), backend) as served:
        yield World(backend, served.url, tokenizer, dialect, spec)


@asynccontextmanager
async def policies(world: World, *versions: int) -> AsyncIterator[list[TinkerPolicy]]:
    async with sdk(world.url) as client:
        settings = SamplingSettings(seed=1, deadline=60.0)
        clients = [await client.create_sampling_client(base_model="scripted") for _ in versions]
        yield [TinkerPolicy(client, version, settings) for client, version in zip(clients, versions, strict=True)]


def task(place: int, *, name: str | None = None, members: int = 4) -> GroupTask:
    question = Question(f"q{place}", f"Question {name or place}?", ("yes",), metadata=METADATA)
    return GroupTask(place, question, tuple(range(members)), seed=1000 + place)


Played = dict[tuple[int, int], Episode]


async def play_all(
    player: GroupPlayer, policy: Any, tasks: Sequence[GroupTask], heard: Callable[[], Awaitable[None]] | None = None
) -> Played:
    played: Played = {}

    async def one(task: GroupTask) -> None:
        async def finished(member: int, episode: Episode) -> None:
            assert (task.place, member) not in played, "reported twice"
            played[task.place, member] = episode
            if heard is not None:
                await heard()

        await player.play(task, policy, finished)
        assert {member for place, member in played if place == task.place} == set(task.members)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for item in tasks:
                group.start_soon(one, item)
    return played


def leaves(error: BaseException, kind: type[Exception]) -> list[BaseException]:
    """Leaf exceptions of nested groups; all must be of one kind."""
    found = (
        [leaf for inner in error.exceptions for leaf in leaves(inner, kind)]
        if isinstance(error, BaseExceptionGroup)
        else [error]
    )
    assert all(isinstance(leaf, kind) for leaf in found), found
    return found


def timeless(episode: Episode) -> Episode:
    """Drops timings, sequence ids and cache hits, which vary between runs."""
    assert all(turn.sequence_id for turn in episode.turns), "a turn lost its sequence id"
    turns = [
        replace(
            turn,
            seconds=0.0,
            sequence_id=None,
            cached_prompt_tokens=0,
            call=None if turn.call is None else replace(turn.call, seconds=0.0),
        )
        for turn in episode.turns
    ]
    given = None if episode.given is None else replace(episode.given, seconds=0.0)
    return replace(episode, seconds=0.0, turns=tuple(turns), given=given)


@dataclass
class WatchedSearch(DictSearch):
    """Fails for marked questions, and calls back before answering."""

    errors: dict[str, SearchError] = field(default_factory=dict)
    on_search: Callable[[str], None] = lambda query: None

    def __post_init__(self) -> None:
        super().__init__()

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        self.on_search(queries[0])
        for word, error in self.errors.items():
            if word in queries[0]:
                raise error
        return await super().search(queries)


class OtherStoreError(StoreError):
    """A user's class, unknown to workers."""


async def test_what_workers_play_is_what_this_process_would_play(world: World) -> None:
    search = WatchedSearch()
    async with policies(world, 3) as (policy,):
        here = await play_all(world.local(search), policy, [task(place) for place in range(12)])
        assert {len(episode.turns) for episode in here.values()} >= {2, 3}
        asked_here, search.asked = len(search.asked), []

        samples = Slow(world)
        async with anyio.create_task_group() as abandoned, WorkerPool(world.spec, search, count=2) as pool:
            there = await play_all(pool, policy, [task(place) for place in range(12)])
            assert {key: timeless(episode) for key, episode in there.items()} == {
                key: timeless(episode) for key, episode in here.items()
            }
            assert len(search.asked) == asked_here, "every search ran in the pool's process"
            for place in range(12):
                assert len({id(there[place, member].prompt_tokens) for member in range(4)}) == 1
                assert there[place, 0].question.metadata["not"]() == "picklable"

            await _searches_that_fail(pool, policy, search)
            await _cancelling(world, pool, policy)
            await _pausing(world, pool, policy)
            await _statistics(pool)
            async with raw(world.url) as client:
                listed = await client.ok("sessions", method="GET")
                assert len(listed["sessions"]) == 1, "workers share the session"
            samples.begin()
            abandoned.start_soon(_play_until_closed, pool, policy, samples)
            await _until_known(pool, policy, samples)
        # Samples in progress are cancelled at the service before the workers exit.
        assert await samples.are_cancelled()


async def test_workers_retrieve_for_the_question_through_the_search_of_the_pool(world: World) -> None:
    search = WatchedSearch(errors={"shaky": EmbeddingError("the embedder is down")})
    dialect = make_dialect("tags", "scripted", world.tokenizer, method="rag")
    spec = replace(world.spec, method="rag", instructions=None)
    tasks = [*(task(place) for place in range(6)), task(6, name="shaky")]
    async with policies(world, 3) as (policy,), WorkerPool(spec, search, count=1) as pool:
        here = await play_all(LocalPlayer(dialect, search, LIMITS, SampleGate(), "shared", "rag"), policy, tasks)
        there = await play_all(pool, policy, tasks)
    assert {key: timeless(episode) for key, episode in there.items()} == {
        key: timeless(episode) for key, episode in here.items()
    }
    assert sorted(search.asked) == sorted([(f"Question {place}?",) for place in range(6)] * 2), "one per group"
    given = [there[0, member].given for member in range(4)]
    assert all(call is not None and call.results[0][0].text == "All about Question 0?." for call in given)
    assert {there[6, member].error for member in range(4)} == {"EmbeddingError: the embedder is down"}
    assert {len(episode.turns) for (place, _), episode in there.items() if place < 6} == {1}


async def _searches_that_fail(pool: WorkerPool, policy: TinkerPolicy, search: WatchedSearch) -> None:
    search.errors = {"shaky": EmbeddingError("the embedder is down"), "odd": OtherStoreError("the store is odd")}
    played = await play_all(pool, policy, [task(20, name="shaky"), task(21, name="odd"), task(22, name="fine")])
    assert {played[20, member].error for member in range(4)} == {"EmbeddingError: the embedder is down"}
    assert {played[21, member].error for member in range(4)} == {"StoreError: the store is odd"}
    assert {played[22, member].stop_reason for member in range(4)} <= {StopReason.ANSWER, StopReason.MAX_TURNS}

    search.errors = {"fatal": StoreError("the collection is gone", is_fatal=True)}
    with pytest.raises(ExceptionGroup) as caught:
        await play_all(pool, policy, [task(23, name="fatal")])
    assert {str(error) for error in leaves(caught.value, StoreError)} == {"the collection is gone"}
    search.errors = {}


async def _pausing(world: World, pool: WorkerPool, policy: TinkerPolicy) -> None:
    pool.pause(True)
    asked = len(world.backend.futures)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(play_all, pool, policy, [task(40), task(41)])

        async def all_wait() -> bool:
            return sum(gate.waiting for gate in pool.gates) == 8

        await until(all_wait, 30)
        assert all(gate.is_paused for gate in pool.gates)
        assert len(world.backend.futures) == asked, "nothing was sampled"
        pool.pause(False)
    assert len(world.backend.futures) > asked


@dataclass
class Slow:
    """Samples for a minute."""

    world: World
    groups: int = 6

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._before = len(self.world.backend.futures)

    @property
    def _futures(self) -> list[Future[SampleResult]]:
        return self.world.backend.futures[self._before :][: self.groups]

    async def are_under_way(self) -> bool:
        return len(self._futures) == self.groups

    async def are_cancelled(self) -> bool:
        return all(future.cancelled() for future in self._futures)

    def tasks(self) -> list[GroupTask]:
        return [task(40 + place, name=SLOW) for place in range(self.groups)]


async def _until_known(pool: WorkerPool, policy: TinkerPolicy, samples: Slow) -> None:
    """Waits until the SDK knows the sample ids, which it needs to cancel them.

    Answers to later samples arrive after those with the ids.
    """
    await until(samples.are_under_way)
    await play_all(pool, policy, [task(60), task(61)])


async def _cancelling(world: World, pool: WorkerPool, policy: TinkerPolicy) -> None:
    samples = Slow(world)
    async with anyio.create_task_group() as group:
        group.start_soon(play_all, pool, policy, samples.tasks())
        await _until_known(pool, policy, samples)
        assert sorted(worker.groups for worker in pool.statistics.workers) == [3, 3], "shared evenly"
        group.cancel_scope.cancel()
    assert sum(worker.members for worker in pool.statistics.workers) == 0
    await until(samples.are_cancelled)


async def _play_until_closed(pool: WorkerPool, policy: TinkerPolicy, samples: Slow) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await play_all(pool, policy, samples.tasks())
    assert all("closed" in str(error) for error in leaves(caught.value, ServiceError))


async def _statistics(pool: WorkerPool) -> None:
    async def told() -> bool:
        return all(worker.load is not None for worker in pool.statistics.workers)

    await until(told)
    statistics = pool.statistics
    assert (statistics.deaths, statistics.replayed) == (0, 0)
    metrics = pool.metrics()
    assert metrics["rollout/processes"] == 2
    assert metrics["rollout/worker_deaths"] == 0
    for worker in statistics.workers:
        assert worker.load is not None
        assert worker.load.cpu_seconds > 0.5, "importing the SDK alone takes this long"
        assert worker.load.gate.samples > 0


async def test_a_dead_worker_loses_nothing_but_its_episodes_under_way(world: World) -> None:
    search = DictSearch()
    deaths = DeathRecord(most=1)
    async with policies(world, 0) as (policy,), WorkerPool(world.spec, search, count=2, deaths=deaths) as pool:
        first = pool.statistics.workers[0].pid
        told = 0

        async def kill_in_the_middle() -> None:
            nonlocal told
            told += 1
            if told == 8:
                assert pool.statistics.workers[0].members > 0
                os.kill(first, signal.SIGKILL)

        played = await play_all(pool, policy, [task(place) for place in range(12)], kill_in_the_middle)
        assert len(played) == 48
        assert all(episode.is_complete for episode in played.values())
        assert pool.statistics.deaths == 1
        assert 0 < pool.statistics.replayed < 48

        async def replaced() -> bool:
            return len(pool.statistics.workers) == 2

        await until(replaced)
        pids = [worker.pid for worker in pool.statistics.workers]
        assert first not in pids
        assert len(await play_all(pool, policy, [task(place) for place in range(4)])) == 16

        async with anyio.create_task_group() as group:

            async def play_on_and_fail() -> None:
                with pytest.raises(ExceptionGroup) as caught:
                    await play_all(pool, policy, [task(50, name=SLOW)])
                (error,) = leaves(caught.value, ServiceError)
                assert "died more than 1 times" in str(error)

            group.start_soon(play_on_and_fail)

            async def under_way() -> bool:
                return sum(worker.members for worker in pool.statistics.workers) > 0

            await until(under_way)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)


@contextmanager
def parent(tokenizer_folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("parent.py")), str(tokenizer_folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=tiny_world.child_environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_workers_end_with_a_parent_that_is_killed(tokenizer_folder: Path) -> None:
    with parent(tokenizer_folder) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1
        assert all(tiny_world.is_running(pid) for pid in pids)
        process.kill()
        assert process.stdout.read() == "", "nothing else on standard output"
        deadline = time.monotonic() + 20
        while any(tiny_world.is_running(pid) for pid in pids):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)


async def test_a_worker_that_cannot_play_says_why(tmp_path: Path) -> None:
    spec = WorkerSpec("tags", "scripted", str(tmp_path / "nothing"), LIMITS)
    with pytest.raises(ServiceError, match=r"no tokenizer could be loaded from .*nothing"):
        async with WorkerPool(spec, DictSearch(), count=1):
            raise AssertionError("it came up")


async def test_a_policy_of_no_service_is_refused(world: World) -> None:
    pool = WorkerPool(world.spec, DictSearch())
    with pytest.raises(ConfigurationError, match="ScriptedPolicy cannot be sent"):
        await pool.play(task(0), ScriptedPolicy(lambda prompt: ()), unheard)


@pytest.mark.parametrize(
    ("workers", "episodes", "cores", "count"),
    [
        (1, 4096, 8, 0),
        (3, 8, 2, 3),
        ("auto", 511, 8, 0),
        ("auto", 512, 1, 1),
        ("auto", 2047, 8, 1),
        ("auto", 4096, 2, 1),
        ("auto", 4096, 8, 4),
        ("auto", 4096, 4, 3),
    ],
)
def test_workers_by_episodes_in_flight(workers: int | Literal["auto"], episodes: int, cores: int, count: int) -> None:
    assert worker_processes(workers, episodes, cores) == count


async def unheard(member: int, episode: Episode) -> None: ...


def test_deaths_are_too_many_within_a_time_only() -> None:
    record = DeathRecord(most=2, seconds=10.0)
    assert [record.is_too_many(now) for now in (0.0, 1.0, 2.0)] == [False, False, True]
    slow = DeathRecord(most=2, seconds=10.0)
    assert not any(slow.is_too_many(now) for now in range(0, 600, 6))
    assert slow.count == 100


async def test_a_large_rollout_leaves_this_process_and_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    questions = [Question(f"q{number}", f"Question {number}?", ("yes",)) for number in range(8)]
    events: list[Any] = []
    groups = await sr.rollout(
        questions,
        tiny_world.make_search(tmp_path / "index"),
        sr.RolloutConfig(model="scripted", tokenizer=world.spec.tokenizer, format="tags", group_size=64, max_turns=1),
        service=world.url,
        progress=False,
        on_event=events.append,
    )
    assert [len(group.episodes) for group in groups] == [64] * 8
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert "rollout in 1 worker process, for up to 512 episodes at once (workers=1: in this process)" in notices
