"""The learner against the embedded service, with a real model of 0.1 million weights."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import anyio
import numpy as np
import pytest
import tinker
from tinker import types as tinker_types

from searchr1_async.config import LearningSettings, LossName, SamplingSettings
from searchr1_async.episodes.types import Episode, Group, Question, StopReason, Turn
from searchr1_async.errors import ServiceError
from searchr1_async.events import Event, MinibatchSubmitted, Notice
from searchr1_async.rollout.player import TinkerPolicy
from searchr1_async.training.batches import without_sequence_ids
from searchr1_async.training.learner import FinishedStep, Learner
from tests.tiny_world import model_folder, shared_service

pytestmark = pytest.mark.anyio

VOCABULARY = 60
GROUPS: list[Group] = []
"""Created on first use: 10 groups of 4 episodes."""
RATE = 1e-3


class World:
    """A service, with groups that have log-probabilities of its model."""

    def __init__(self, service: tinker.ServiceClient, base: tinker.SamplingClient, groups: list[Group]) -> None:
        self.service, self.base, self.groups = service, base, groups

    async def learner(self, **settings: Any) -> tuple[Learner, list[Event]]:
        options = {name: settings.pop(name) for name in ("weights_in_flight", "base") if name in settings}
        client = await self.service.create_lora_training_client(str(model_folder()), rank=4, seed=7)
        events: list[Event] = []
        learning = LearningSettings(**{"learning_rate": RATE} | settings)
        return Learner(client, learning, events.append, **options), events

    async def logprobs(self, client: tinker.SamplingClient) -> np.ndarray:
        """Log-probabilities of all sampled tokens."""
        return np.concatenate(await all_logprobs(client, self.groups))


async def all_logprobs(client: tinker.SamplingClient, groups: Sequence[Group]) -> list[np.ndarray]:
    """Log-probabilities of the sampled tokens, per episode."""
    episodes = [episode for group in groups for episode in group.episodes]
    asked = [client.compute_logprobs(tinker_types.ModelInput.from_ints(list(one.tokens))) for one in episodes]
    return [
        np.array((await row)[1:])[sampled_mask(one)].astype(float) for row, one in zip(asked, episodes, strict=True)
    ]


def sampled_mask(episode: Episode) -> np.ndarray:
    """Bool [T] over the targets."""
    flags = [False] * len(episode.prompt_tokens)
    for turn in episode.turns:
        flags += [True] * len(turn.sampled_tokens) + [False] * len(turn.appended_tokens)
    return np.array(flags[1 : len(episode.tokens)])


def random_episode(chance: random.Random, question: Question, prompt: tuple[int, ...]) -> Episode:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(3, VOCABULARY) for _ in range(count))

    turns = []
    for last in (False, True)[chance.randrange(2) :]:
        sampled = tokens(chance.randint(2, 12))
        turns.append(Turn(sampled, (0.0,) * len(sampled), "x", appended_tokens=() if last else tokens(3)))
    return Episode(question, prompt, tuple(turns), StopReason.ANSWER, reward=float(chance.choice((0, 0, 1, -0.1))))


async def seen_by(client: tinker.SamplingClient, groups: Sequence[Group]) -> list[Group]:
    """The groups with log-probabilities of these weights, perturbed like a sampler with other numerics."""
    chance = np.random.default_rng(0)
    rows = iter(await all_logprobs(client, groups))

    def with_logprobs(episode: Episode) -> Episode:
        row = next(rows)
        values = iter((row + chance.normal(0, 0.15, len(row))).tolist())
        turns = [replace(turn, logprobs=tuple(itertools.islice(values, len(turn.logprobs)))) for turn in episode.turns]
        return replace(episode, turns=tuple(turns))

    return [Group(group.question, tuple(map(with_logprobs, group.episodes))) for group in groups]


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    served = shared_service()
    monkeypatch.setenv("TINKER_API_KEY", served.api_key)
    service = await anyio.to_thread.run_sync(lambda: tinker.ServiceClient(base_url=served.url))
    base = await service.create_sampling_client(base_model=str(model_folder()))
    if not GROUPS:
        chance = random.Random("groups")
        for number in range(10):
            question = Question(str(number), "?", ("a",))
            prompt = tuple(chance.randrange(3, VOCABULARY) for _ in range(chance.randint(3, 20)))
            GROUPS.append(Group(question, tuple(random_episode(chance, question, prompt) for _ in range(4))))
        GROUPS[:] = await seen_by(base, GROUPS)
    yield World(service, base, GROUPS)
    await anyio.to_thread.run_sync(service.close, "success")


async def learn(
    learner: Learner, minibatches: Sequence[Sequence[Group]], step: int = 1
) -> tuple[FinishedStep, tinker.SamplingClient]:
    for minibatch in minibatches:
        await learner.submit(minibatch, step)
    in_progress = await learner.finish_step(step, 4, f"test-{random.random():.9f}", keep=False)
    client = await in_progress.published()
    assert client is not None
    return await in_progress.finished(), client


def cut(groups: Sequence[Group], *sizes: int) -> list[Sequence[Group]]:
    rest = iter(groups)
    return [list(itertools.islice(rest, size)) for size in sizes]


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "gspo"])
async def test_minibatches_in_any_cut_and_order_move_the_weights_as_one_does(world: World, loss: LossName) -> None:
    before = await world.logprobs(world.base)
    shuffled = list(world.groups)
    random.Random(1).shuffle(shuffled)
    moved = []
    for minibatches in ([world.groups], cut(shuffled, 1, 4, 2, 1, 2)):
        learner, _ = await world.learner(loss=loss)
        finished, client = await learn(learner, minibatches)
        assert finished.metrics["optim/minibatches"] == len(minibatches)
        moved.append(await world.logprobs(client) - before)
    assert np.abs(moved[0]).mean() > 1e-3
    assert np.abs(moved[1] - moved[0]).max() < 0.01 * np.abs(moved[0]).max()


async def test_a_clipped_loss_goes_another_way_than_an_unclipped_one(world: World) -> None:
    """Shows that the test above exercises the clip."""
    moved = []
    for loss in ("importance_sampling", "ppo"):
        learner, _ = await world.learner(loss=loss)
        moved.append(await world.logprobs((await learn(learner, [world.groups]))[1]))
    assert np.abs(moved[0] - moved[1]).max() > 1e-4


async def test_figures_are_of_all_tokens_though_minibatches_are_unequal(world: World) -> None:
    learner, events = await world.learner(kl_coefficient=0.1, base=world.base)
    finished, _ = await learn(learner, cut(world.groups, 7, 1, 2))
    sampled = np.concatenate(
        [turn.logprobs for group in world.groups for episode in group.episodes for turn in episode.turns]
    )
    # The trainer's first weights are the base model's.
    base = await world.logprobs(world.base)
    metrics = finished.metrics
    assert metrics["optim/tokens"] == len(sampled)
    assert metrics["optim/datums"] == 40
    assert metrics["optim/entropy"] == pytest.approx(-sampled.mean())
    assert metrics["optim/kl_sample_train_v1"] == pytest.approx((sampled - base).mean(), abs=1e-5)
    assert metrics["optim/kl_sample_train_v2"] == pytest.approx(0.5 * np.square(sampled - base).mean(), abs=1e-5)
    assert metrics["optim/kl_base"] == pytest.approx((sampled - base).mean(), abs=1e-5)
    assert metrics["optim/lr"] == RATE
    assert metrics["optim/steps"] == 1
    sizes = [event.tokens for event in events if isinstance(event, MinibatchSubmitted)]
    assert [metrics[f"optim/tokens_per_minibatch_{end}"] for end in ("min", "max")] == [min(sizes), max(sizes)]
    assert sum(sizes) == sum(len(episode.tokens) for group in world.groups for episode in group.episodes)


async def test_a_penalty_pulls_back_to_the_base_model(world: World) -> None:
    """Two steps on the same groups, the second with or without a large penalty, which keeps the policy closer to the base model."""
    base = await world.logprobs(world.base)
    away = {}
    for coefficient in (0.0, 3.0):
        learner, _ = await world.learner(kl_coefficient=coefficient, base=world.base, learning_rate=3e-3)
        groups = world.groups
        for step in (1, 2):
            _, client = await learn(learner, [groups], step)
            groups = await seen_by(client, groups)
        away[coefficient] = np.square(await world.logprobs(client) - base).mean()
    assert away[3.0] < 0.7 * away[0.0]


async def test_parts_are_optimizer_steps_of_their_own(world: World) -> None:
    learner, _ = await world.learner(optimizer_steps=2, schedule="linear", loss="ppo")
    first, second, nothing = cut(world.groups, 4, 6, 0)
    await learner.submit(first, 2)
    learner.end_part(2, 4)
    learner.end_part(2, 4)  # nothing was submitted since
    await learner.submit(nothing, 2)
    finished, _ = await learn(learner, [second], step=2)
    assert finished.metrics["optim/steps"] == 2
    assert finished.metrics["optim/lr"] == pytest.approx(0.75 * RATE)
    assert finished.metrics["optim/optimizer_steps"] == 2
    # A second step, so different weights than after one step on everything.
    at_once, _ = await world.learner(optimizer_steps=2, schedule="linear", loss="ppo")
    whole, _ = await learn(at_once, [world.groups], step=2)
    assert whole.metrics["optim/weight_norm"] != finished.metrics["optim/weight_norm"]
    assert whole.metrics["optim/tokens"] == finished.metrics["optim/tokens"]


async def test_a_batch_with_nothing_to_learn_from_leaves_the_weights_and_says_so(world: World) -> None:
    learner, events = await world.learner()
    await learner.submit([], 3)
    in_progress = await learner.finish_step(3, 4, "nothing", keep=True)
    assert await in_progress.published() is None
    finished = await in_progress.finished()
    assert finished.metrics == {"optim/tokens": 0.0, "optim/lr": 0.0, "optim/steps": 0.0}
    assert finished.state_path.startswith("tinker://")
    assert finished.sampler_path is not None
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "step 3: no group to learn from, so the weights do not change"
    ]
    start = await learner.save("start", keep=False)
    assert start.sampler_path is None
    assert len(events) == 1, "no notice before the first batch"


async def test_the_next_batch_may_be_submitted_while_the_last_is_saved(world: World) -> None:
    learner, _ = await world.learner()
    one, two = cut(world.groups, 5, 5)
    await learner.submit(one, 1)
    first = await learner.finish_step(1, 4, "overlap-1", keep=False)
    await learner.submit(two, 2)
    second = await learner.finish_step(2, 4, "overlap-2", keep=True)
    ends = [await second.finished(), await first.finished()]
    assert [end.metrics["optim/optimizer_steps"] for end in ends] == [2, 1]
    assert ends[0].metrics["optim/datums"] == ends[1].metrics["optim/datums"] == 20
    assert ends[0].state_path != ends[1].state_path
    clients = [await first.published(), await second.published()]
    assert clients[0] is not None
    assert clients[1] is not None
    assert np.abs(await world.logprobs(clients[0]) - await world.logprobs(clients[1])).max() > 1e-4


async def test_it_tells_when_the_trainer_is_idle(world: World) -> None:
    learner, _ = await world.learner()
    assert learner.is_idle
    await learner.wait_idle()
    await learner.submit(world.groups * 8, 1)
    assert not learner.is_idle
    with anyio.move_on_after(0.001):
        await learner.wait_idle()
    await learner.wait_idle()
    assert learner.is_idle
    finished, _ = await learn(learner, [])
    assert finished.metrics["optim/datums"] == 320, "cancelling the wait cancelled no call"


async def test_a_refused_minibatch_surfaces_at_the_end_and_before_its_weights_are_used(world: World) -> None:
    # The service checks the configuration, so the call itself succeeds.
    learner, _ = await world.learner(loss="ppo", loss_config={"beta": 1.0})
    await learner.submit(world.groups, 1)
    await learner.wait_idle()
    in_progress = await learner.finish_step(1, 4, "refused", keep=False)
    with pytest.raises(ServiceError, match=r"an optimizer step failed at the Tinker service: .*'beta'"):
        await in_progress.published()
    with pytest.raises(ServiceError, match=r"an optimizer step failed at the Tinker service: .*'beta'"):
        await in_progress.finished()


async def sampled_groups(client: tinker.SamplingClient, groups: Sequence[Group]) -> list[Group]:
    """The groups with turns really sampled by this client, for the same prompts and appended tokens."""
    policy = TinkerPolicy(client, 0, SamplingSettings(seed=3))

    async def played(episode: Episode, prompt: tuple[int, ...]) -> Episode:
        turns: list[Turn] = []
        for number, turn in enumerate(episode.turns):
            one = await policy.sample(prompt, max_tokens=len(turn.sampled_tokens), stop=[], seed=number)
            turns.append(
                replace(turn, sampled_tokens=one.sampled_tokens, logprobs=one.logprobs, sequence_id=one.sequence_id)
            )
            prompt += one.sampled_tokens + turn.appended_tokens
        return replace(episode, turns=tuple(turns))

    return [
        replace(group, episodes=tuple([await played(one, one.prompt_tokens) for one in group.episodes]))
        for group in groups
    ]


@pytest.mark.parametrize(
    "settings", [{}, {"kl_coefficient": 0.1, "normalization": "sequence"}, {"loss_config": {"alpha": 0.5}}]
)
@pytest.mark.parametrize("weights_in_flight", ["snapshot", "inflight"])
async def test_stable_reinforce_learns_from_what_the_service_recorded(
    world: World, weights_in_flight: str, settings: dict[str, Any]
) -> None:
    """The service checks every span; training on other weights than those that sampled is the point of the loss."""
    base = {"base": world.base} if "kl_coefficient" in settings else {}
    learner, _ = await world.learner(loss="stable_reinforce", weights_in_flight=weights_in_flight, **settings, **base)
    sampler = await learner.publish()
    groups = await sampled_groups(sampler, world.groups)
    before = await world.logprobs(world.base)
    one, two = cut(groups, 4, 6)
    first, client = await learn(learner, [one])
    second, _ = await learn(learner, [two, one], step=2)
    assert np.abs(await world.logprobs(client) - before).mean() > 1e-4
    # An existing client switches to the newer weights, or keeps its own.
    has_moved = np.abs(await world.logprobs(sampler) - before).mean() > 1e-4
    assert has_moved == (weights_in_flight == "inflight")
    for finished in (first, second):
        assert np.isfinite(list(finished.metrics.values())).all()
        assert finished.metrics["optim/fallback_datums"] == 0
        assert ("optim/kl_base" in finished.metrics) == bool(base)
    assert second.metrics["optim/datums"] == 40


async def test_what_the_service_did_not_record_is_learned_with_the_clipped_loss(world: World) -> None:
    """Groups and single members of another session: their gradients add to those of the others."""
    learner, events = await world.learner(loss="stable_reinforce")
    groups = await sampled_groups(await learner.publish(), world.groups)
    partly = replace(groups[0], episodes=(groups[0].episodes[0], *without_sequence_ids(groups[0]).episodes[1:]))
    mixed = [partly, *groups[1:5], *map(without_sequence_ids, groups[5:])]
    finished, client = await learn(learner, cut(mixed, 1, 6, 3))
    assert finished.metrics["optim/datums"] == 40
    assert finished.metrics["optim/fallback_datums"] == 23
    assert finished.metrics["optim/minibatches"] == 5, "two requests if a minibatch contains both kinds"
    assert finished.metrics["optim/steps"] == 1
    assert [event.datums for event in events if isinstance(event, MinibatchSubmitted)] == [4, 24, 12]

    # On fresh samples all ratios are 1, so both losses have the REINFORCE gradient.
    plain, _ = await world.learner(loss="importance_sampling")
    _, other = await learn(plain, [mixed])
    before = await world.logprobs(world.base)
    moved = await world.logprobs(client) - before
    assert np.abs(moved).mean() > 1e-3
    assert np.abs(await world.logprobs(other) - before - moved).max() < 0.01 * np.abs(moved).max()


async def test_a_sequence_of_another_session_is_refused_by_the_service(world: World) -> None:
    """So groups restored by a resume lose their ids."""
    learner, _ = await world.learner(loss="stable_reinforce")
    foreign = [
        replace(
            group,
            episodes=tuple(
                replace(one, turns=tuple(replace(turn, sequence_id="elsewhere:0") for turn in one.turns))
                for one in group.episodes
            ),
        )
        for group in world.groups
    ]
    await learner.submit(foreign, 1)
    in_progress = await learner.finish_step(1, 4, "foreign", keep=False)
    with pytest.raises(ServiceError, match="'elsewhere:0' was not recorded"):
        await in_progress.finished()


async def test_demonstrations_are_learned(world: World) -> None:
    learner, _ = await world.learner()
    episodes = [episode for group in world.groups for episode in group.episodes]
    losses = [await learner.supervised_step(episodes, 5e-3) for _ in range(4)]
    assert losses[0] == pytest.approx(-(await world.logprobs(world.base)).mean(), abs=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    saved = await learner.save("kept", keep=True)
    assert "/weights/kept" in saved.state_path
    assert "/sampler_weights/kept" in str(saved.sampler_path)
