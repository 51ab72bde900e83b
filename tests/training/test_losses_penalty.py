"""KL penalty and normalizations, against hand-computed gradients of a one-parameter model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.billing import TokenUsage, total_usage
from searchr1_async.config import LearningSettings
from searchr1_async.episodes.types import Episode, Group, Question, StopReason, Turn
from searchr1_async.errors import ServiceError
from searchr1_async.events import emit_nothing
from searchr1_async.local.scripted_backend import scale_free
from searchr1_async.service.connection import TrainingCalls
from searchr1_async.training.batches import NOMINAL_TOKENS, kl_penalties
from searchr1_async.training.learner import Learner
from searchr1_async.training.losses import base_logprobs
from tests.local.serving import KEY, Served, service_thread

pytestmark = pytest.mark.anyio


def make_groups() -> list[Group]:
    chance = random.Random(5)

    def episode(question: Question) -> Episode:
        turns = []
        for last in (False, True):
            tokens = tuple(chance.randrange(1000) for _ in range(chance.randint(1, 30)))
            logprobs = tuple(-chance.uniform(0.2, 2.0) for _ in tokens)
            turns.append(Turn(tokens, logprobs, "x", appended_tokens=() if last else (5, 6, 7)))
        return Episode(question, (1, 2, 3), tuple(turns), StopReason.ANSWER, reward=chance.random())

    questions = [Question(str(number), "?", ("a",)) for number in range(3)]
    return [Group(question, tuple(episode(question) for _ in range(4))) for question in questions]


GROUPS = make_groups()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with service_thread(tmp_path_factory.mktemp("service")) as served:
        yield served


@pytest.fixture
async def service(served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    client = await anyio.to_thread.run_sync(lambda: tinker.ServiceClient(base_url=served.url))
    yield client
    await anyio.to_thread.run_sync(client.close, "success")


def sampled(episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the sampled tokens, from the sampler and from the untrained model."""
    tokens = np.array([token for turn in episode.turns for token in turn.sampled_tokens])
    return np.array([value for turn in episode.turns for value in turn.logprobs]), scale_free(tokens)


def gradient_by_hand(normalization: str, coefficient: float) -> float:
    """Gradient of importance sampling by the model's bias, where lp = scale_free(token) · exp(-bias): d lp / d bias = -lp."""
    total = 0.0
    for group in GROUPS:
        mean_reward = np.mean([episode.reward for episode in group.episodes])
        pairs = [sampled(episode) for episode in group.episodes]
        mean_kl = np.concatenate([q - lp for q, lp in pairs]).mean()
        for episode, (q, lp) in zip(group.episodes, pairs, strict=True):
            advantage = episode.reward - mean_reward + coefficient * (mean_kl - (q - lp))
            weight = 1.0 if normalization == "token" else NOMINAL_TOKENS / len(q)
            total += float(np.sum(weight * advantage * np.exp(lp - q) * lp))
    return total


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("coefficient", [0.0, 0.5])
@pytest.mark.parametrize("cuts", [(3,), (1, 2)])
async def test_the_gradient_is_the_one_computed_by_hand(
    service: tinker.ServiceClient, normalization: Any, coefficient: float, cuts: tuple[int, ...]
) -> None:
    client = await service.create_lora_training_client("scripted", rank=4)
    base = await service.create_sampling_client(base_model="scripted")
    settings = LearningSettings(normalization=normalization, kl_coefficient=coefficient)
    learner = Learner(client, settings, emit_nothing, base=base)
    rest = list(GROUPS)
    for size in cuts:
        await learner.submit(rest[:size], 1)
        del rest[:size]
    finished = await (await learner.finish_step(1, 1, f"by-hand-{random.random()}", keep=False)).finished()
    expected = gradient_by_hand(normalization, coefficient)
    assert finished.metrics["optim/unclipped_grad_l2"] == pytest.approx(abs(expected), rel=1e-5)


async def test_base_logprobs_are_those_of_the_sampled_tokens(service: tinker.ServiceClient) -> None:
    base = await service.create_sampling_client(base_model="scripted")
    unplayed = Episode(GROUPS[0].question, (1,), (), StopReason.MAX_TRAJECTORY_TOKENS)
    episodes = [*GROUPS[0].episodes, unplayed, *GROUPS[1].episodes]
    used: list[TokenUsage] = []
    found = await base_logprobs(base, episodes, TrainingCalls(30), count=used.append)
    assert len(found[4]) == 0
    total = total_usage(used)
    assert total == TokenUsage(sum(len(one.tokens) for one in episodes if one.turns), total.cached, 8)
    for values_A, episode in zip(found, episodes, strict=True):
        if episode.turns:
            np.testing.assert_allclose(values_A, sampled(episode)[1], rtol=1e-6)


async def test_a_service_that_refuses_or_hangs_is_named(service: tinker.ServiceClient) -> None:
    base = await service.create_sampling_client(base_model="scripted")
    long = Episode(GROUPS[0].question, (1,) * 40_000, GROUPS[0].episodes[0].turns, StopReason.ANSWER)
    with pytest.raises(ServiceError, match=r"no log-probabilities of the base model: .*exceed"):
        await base_logprobs(base, [*GROUPS[0].episodes, long], TrainingCalls(30))
    with pytest.raises(ServiceError, match="took over 0 s"):
        await base_logprobs(base, GROUPS[0].episodes, TrainingCalls(0))


@given(st.lists(st.lists(st.floats(-5, 5), max_size=20), min_size=1, max_size=8), st.floats(0, 2))
def test_a_groups_penalties_sum_to_nothing_and_fall_with_the_distance(
    differences: list[list[float]], coefficient: float
) -> None:
    arrays = [np.array(values, dtype=np.float64) for values in differences]
    penalties = kl_penalties(arrays, coefficient)
    assert [len(values) for values in penalties] == [len(values) for values in arrays]
    together, distance = np.concatenate(penalties), np.concatenate(arrays)
    assert together.sum() == pytest.approx(0, abs=1e-9)
    if len(distance):
        np.testing.assert_allclose(together, -coefficient * (distance - distance.mean()), atol=1e-9)
