"""Checks a service's abilities before work starts: servers that lack a loss, a client kind or a route."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tinker

from searchr1_async.config import LearningSettings, PipelineSettings
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Event, Notice
from searchr1_async.local.backend import SampleRequest, SampleResult, Snapshot, UserFault
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.local.sessions import Sampling
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.service.opening import Service
from searchr1_async.training.losses import choose_loss, preferred_losses
from tests.local.serving import sdk, service_thread, successors

pytestmark = pytest.mark.anyio


class Lacking(ScriptedBackend):
    """Another server of the protocol: refuses some losses and counts requests."""

    def __init__(self, *refused: str, scores: bool = True) -> None:
        super().__init__(successors)
        self.refused, self.scores = refused, scores
        self.asked: list[tuple[str, bool]] = []

    def forward_backward(
        self, adapter: Any, data: Any, loss_fn: str, loss_config: Any, forward_only: bool = False
    ) -> Any:
        self.asked.append((loss_fn, forward_only))
        if loss_fn in self.refused:
            raise UserFault(f"this server knows no {loss_fn}")
        return super().forward_backward(adapter, data, loss_fn, loss_config, forward_only)

    def sample(self, snapshot: Snapshot | None, request: SampleRequest) -> Future[SampleResult]:
        if request.prompt_logprobs and not self.scores:
            raise UserFault("prompts are not scored here")
        return super().sample(snapshot, request)


@dataclass
class World:
    service: Service
    client: tinker.TrainingClient

    async def choose(
        self,
        *,
        point: ResumePoint | None = None,
        weights_in_flight: Any = "snapshot",
        max_staleness: int = 0,
        **settings: Any,
    ) -> tuple[str, list[str]]:
        """The loss, and the notices."""
        told: list[Event] = []
        learning = LearningSettings(**settings)
        pipeline = PipelineSettings(max_staleness=max_staleness, weights_in_flight=weights_in_flight)
        loss = await choose_loss(self.service, self.client, learning, pipeline, point=point, emit=told.append)
        return loss, [event.text for event in told if isinstance(event, Notice)]


@asynccontextmanager
async def world(folder: Path, backend: ScriptedBackend, **known: Any) -> AsyncIterator[World]:
    with service_thread(folder, backend) as served:
        async with sdk(served.url) as client:
            training = await client.create_lora_training_client("scripted", rank=4)
            yield World(Service(client, "scripted", None, **known), training)


async def test_a_full_service_uses_the_off_policy_loss(tmp_path: Path) -> None:
    backend = Lacking()
    async with world(tmp_path, backend) as tried:
        assert await tried.choose() == ("importance_sampling", [])
        assert backend.asked == [], "a plain run has nothing tried"
        for settings in ({"max_staleness": 1}, {"weights_in_flight": "inflight"}):
            loss, notices = await tried.choose(**settings)
            assert loss == "stable_reinforce"
            assert notices == ["the loss is stable_reinforce, because groups may be sampled from older weights"]
        assert set(backend.asked) == {("stable_reinforce", True), ("ppo", True)}, "no gradient is touched"
        backend.asked.clear()
        assert await tried.choose(optimizer_steps=2) == ("ppo", [])
        assert await tried.choose(max_staleness=1, loss_config={"clip_high_threshold": 1.1}) == ("ppo", [])
        assert await tried.choose(loss="stable_reinforce", kl_coefficient=0.1) == ("stable_reinforce", [])


async def test_falls_back_to_the_clipped_loss_with_a_reason(tmp_path: Path) -> None:
    async with world(tmp_path, Lacking("stable_reinforce")) as tried:
        loss, (notice,) = await tried.choose(max_staleness=2)
        assert loss == "ppo"
        assert "the loss is ppo, because groups may be sampled from older weights" in notice
        assert "this server knows no stable_reinforce" in notice


async def test_a_missing_named_loss_is_refused_with_alternatives(tmp_path: Path) -> None:
    async with world(tmp_path, Lacking("stable_reinforce", "gspo", "dro")) as tried:
        with pytest.raises(ConfigurationError) as caught:
            await tried.choose(loss="stable_reinforce")
        assert "this server knows no stable_reinforce" in str(caught.value)
        assert "it has importance_sampling, ppo, cispo: choose one with loss=" in str(caught.value)
        with pytest.raises(
            ConfigurationError, match=r"'beta'.*clip_high_threshold\.\); it has importance_sampling, ppo:"
        ):
            await tried.choose(loss="cispo", loss_config={"beta": 1.0})


async def test_without_an_off_policy_loss_nothing_starts(tmp_path: Path) -> None:
    async with world(tmp_path, Lacking("stable_reinforce", "ppo")) as tried:
        with pytest.raises(
            ConfigurationError, match=r"no stable_reinforce; ppo: .*no ppo\); it has importance_sampling"
        ):
            await tried.choose(max_staleness=1)


async def test_a_missing_client_kind_and_route_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Sampling.publish

    def snapshots_only(self: Any, id: str, session_id: str, model_id: str, kind: str, snapshot: Any) -> str:
        if kind != "snapshot":
            raise UserFault(f"there are no samplers of kind {kind}")
        return publish(self, id, session_id, model_id, kind, snapshot)

    monkeypatch.setattr(Sampling, "publish", snapshots_only)
    async with world(tmp_path, Lacking(scores=False)) as tried:
        with pytest.raises(
            ConfigurationError, match=r'no samplers of kind inflight.*choose weights_in_flight="snapshot"'
        ):
            await tried.choose(max_staleness=1, weights_in_flight="inflight")
        with pytest.raises(ConfigurationError, match=r"prompts are not scored here.*choose kl_coefficient=0"):
            await tried.choose(kl_coefficient=0.1)
        # The refusals have not broken the client.
        assert (await tried.choose(max_staleness=1))[0] == "stable_reinforce"


async def test_known_services_are_not_probed(tmp_path: Path) -> None:
    backend = Lacking("stable_reinforce")
    for known in ({"model_folder": tmp_path}, {"is_tinker": True}):
        async with world(tmp_path / next(iter(known)), Lacking(), **known) as tried:
            assert (await tried.choose(max_staleness=1))[0] == "stable_reinforce"
    assert backend.asked == []


async def test_a_resumed_run_keeps_its_loss(tmp_path: Path) -> None:
    def point(loss: Any) -> ResumePoint:
        return ResumePoint(1, 0, "", "", "", loss=loss)

    async with world(tmp_path, Lacking()) as tried:
        assert await tried.choose(point=point("ppo"), max_staleness=1) == ("ppo", [])
        assert await tried.choose(point=point("stable_reinforce"), max_staleness=1) == ("stable_reinforce", [])
        # As an earlier version chose, whose files do not record the loss.
        assert await tried.choose(point=point(None), max_staleness=1) == ("ppo", [])
        assert await tried.choose(point=point(None), optimizer_steps=2) == ("ppo", [])
        assert await tried.choose(point=point(None)) == ("importance_sampling", [])
        assert await tried.choose(point=point(None), loss="cispo") == ("cispo", [])


def test_a_named_loss_is_the_only_candidate() -> None:
    assert preferred_losses(LearningSettings(loss="cispo"), PipelineSettings(max_staleness=3)) == ("cispo",)
