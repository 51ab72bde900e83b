"""Runs on services with different model lists: today's, spring's, none. Real SDK, local service."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tinker
from aiohttp import web

import searchr1_async as sr
from searchr1_async.errors import ModelError, ServiceError, ServiceUnavailableError
from searchr1_async.events import Event, Notice, RunStarted
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.local.server import Service
from searchr1_async.models import known_models
from searchr1_async.service.availability import ask_offered, choose_model
from searchr1_async.service.connection import is_tinker_cloud
from searchr1_async.watch.state import RunState
from tests import tiny_world
from tests.episodes.stand_in import stand_in
from tests.local.serving import KEY, sdk, service_thread

pytestmark = pytest.mark.anyio

TODAY = tuple(model.name + suffix for model in known_models() if model.is_offered for suffix in ("", *model.variants))
SPRING = tuple(model.name for model in known_models() if model.retired and model.retired >= "2026-06-12")


@dataclass
class StandIn:
    """A service with another one's model list; it has one model and records its requests."""

    url: str
    tokenizer: str
    prompts: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]

    @property
    def started(self) -> RunStarted:
        return next(event for event in self.events if isinstance(event, RunStarted))


@contextmanager
def stand_in_service(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, listed: tuple[str, ...]
) -> Iterator[StandIn]:
    """Reached like the cloud, by a key and a base URL in the environment."""
    tokenizer = folder / "tokenizer"
    stand_in().save_pretrained(tokenizer)
    prompts: list[str] = []

    def reply(prompt: list[int], chance: random.Random) -> str:
        prompts.append(stand_in().decode(prompt))
        return chance.choice(["Answer: Austen", "Answer: Dickens"])

    backend = ScriptedBackend(reply, model_name=model, tokenizer_path=str(tokenizer))
    with service_thread(folder / "service", backend, listed=listed) as served:
        monkeypatch.setenv("TINKER_API_KEY", KEY)
        monkeypatch.setenv("TINKER_BASE_URL", served.url)
        yield StandIn(served.url, str(tokenizer), prompts)


def train(service: StandIn, folder: Path, **changes: Any) -> sr.Run:
    settings: dict[str, Any] = {
        "tokenizer": service.tokenizer, "steps": 1, "group_size": 8, "groups_per_batch": 2, "minibatches": 1,
        "drop_constant_groups": False, "max_tokens": 64, "progress": False, "on_event": service.events.append,
    }  # fmt: skip
    questions = [sr.Question(f"q{i}", f"Who wrote book {i}?", ("Austen",)) for i in range(2)]
    search = tiny_world.make_search(folder / "index")
    return sr.train(questions, search, out_dir=folder / "run", **tiny_world.given(sr.TrainConfig, settings | changes))


async def test_with_only_a_key_a_run_uses_todays_default_without_thinking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in_service(tmp_path, monkeypatch, "Qwen/Qwen3.5-4B", TODAY) as service:
        result = await train(service, tmp_path)
    assert result.steps == 1
    assert service.started.model == "Qwen/Qwen3.5-4B"
    assert not any("offer" in text for text in service.notices)
    for prompt in service.prompts:
        assert prompt.startswith("<|im_start|>system\n# Tools\n\nYou have access to the following functions:")
        assert prompt.endswith("?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


async def test_on_springs_list_the_nearest_of_the_family_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in_service(tmp_path, monkeypatch, "Qwen/Qwen3-4B-Instruct-2507", SPRING) as service:
        result = await train(service, tmp_path)
        assert result.steps == 1
        told = [text for text in service.notices if "offer" in text]
        assert told == [
            "the service does not offer the default model, Qwen/Qwen3.5-4B: using Qwen/Qwen3-4B-Instruct-2507, the nearest of its family"
        ]
        assert service.started.model == "Qwen/Qwen3-4B-Instruct-2507"
        assert all(prompt.endswith("?<|im_end|>\n<|im_start|>assistant\n") for prompt in service.prompts)
        assert '{"type": "function", "function": {"name": "search"' in service.prompts[0]
        # The run continues with its own model, not with another default.
        service.events.clear()
        assert (await train(service, tmp_path, steps=2, resume=True)).steps == 2
        assert service.started.model == "Qwen/Qwen3-4B-Instruct-2507"
        assert not any("offer" in text for text in service.notices)
        # With nothing left to do, the estimate is of its model too.
        state = RunState()
        again = await train(service, tmp_path, steps=2, resume=True, on_event=lambda event: state.see(event, 0.0))
        assert again.estimated_cost is not None
        assert "the price of Qwen/Qwen3-4B-Instruct-2507 on this server" in again.estimated_cost.text
        assert "Qwen/Qwen3-4B-Instruct-2507 on this server" in state.cost.note
    # It is refused with the replacement's name where that model is gone.
    with (
        stand_in_service(tmp_path / "later", monkeypatch, "Qwen/Qwen3.5-4B", TODAY) as service,
        pytest.raises(ModelError, match=r"retired it on 2026-06-12 and recommends Qwen/Qwen3\.5-4B \(thinking off\)"),
    ):
        await train(service, tmp_path, steps=3, resume=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Qwen/Qwen3.5-4b", "does not offer 'Qwen/Qwen3.5-4b'. The nearest models it offers: Qwen/Qwen3.5-4B"),
        ("Qwen/Qwen3.5-27B", "retired it on 2026-06-12 and recommends Qwen/Qwen3.8-27B"),
        ("Qwen/Qwen3.8-27B:peft:1", "The nearest models it offers: Qwen/Qwen3.8-27B, Qwen/Qwen3.8-27B:peft:262144"),
        ("acme/model", "does not offer 'acme/model'. The nearest models it offers: "),
    ],
)
async def test_an_unoffered_model_is_refused_with_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    with stand_in_service(tmp_path, monkeypatch, "Qwen/Qwen3.5-4B", TODAY) as service:
        with pytest.raises(ModelError) as caught:
            await train(service, tmp_path, model=model)
        assert message in str(caught.value)
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "index").exists()
        with pytest.raises(ModelError, match="does not offer"):
            await sr.evaluate(
                [sr.Question("q", "Who?", ("A",))],
                tiny_world.make_search(tmp_path / "index"),
                progress=False,
                config=sr.EvalConfig(model=model),
            )
        with pytest.raises(ModelError, match="does not offer"):
            await sr.rollout(
                [sr.Question("q", "Who?", ("A",))],
                tiny_world.make_search(tmp_path / "index"),
                progress=False,
                config=sr.RolloutConfig(model=model),
            )


async def test_a_variant_keeps_its_name_and_renders_like_the_plain_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "Qwen/Qwen3.8-27B:peft:262144"
    with stand_in_service(tmp_path, monkeypatch, name, TODAY) as service:
        assert (await train(service, tmp_path, model=name, thinking="low")).steps == 1
        assert service.started.model == name
        assert all("Reasoning effort is set to low." in prompt for prompt in service.prompts)
        with pytest.raises(
            ModelError, match=r"does not have thinking='max'. It has: False, True, 'low', 'medium', 'xhigh'"
        ):
            train(service, tmp_path / "other", model=name, thinking="max")
        with pytest.raises(sr.errors.RunFolderError, match="thinking: 'low' then, True now"):
            await train(service, tmp_path, model=name, thinking=True, steps=2, resume=True)


async def test_an_old_run_keeps_its_templates_thinking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_service(tmp_path, monkeypatch, "Qwen/Qwen3-8B", TODAY) as service:
        await train(service, tmp_path, model="Qwen/Qwen3-8B", thinking="template")
        path = tmp_path / "run" / "state.json"
        state = json.loads(path.read_text())
        del state["settings"]["thinking"]
        path.write_text(json.dumps(state))
        service.prompts.clear()
        assert (await train(service, tmp_path, model="Qwen/Qwen3-8B", steps=2, resume=True)).steps == 2
        assert service.prompts
        assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in service.prompts)


async def test_evaluation_and_rollout_use_the_trained_thinking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions, run = [sr.Question("q", "Who wrote it?", ("Austen",))], tmp_path / "run"
    on, off = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    with stand_in_service(tmp_path, monkeypatch, "Qwen/Qwen3.5-4B", TODAY) as service:
        await train(service, tmp_path, thinking=True)
        search = tiny_world.make_search(tmp_path / "index")
        settings: dict[str, Any] = {
            "tokenizer": service.tokenizer,
            "progress": False,
            "on_event": service.events.append,
        }

        async def ends(suites: Any, **options: Any) -> list[bool]:
            """For each prompt, in order: whether it lets the model think."""
            service.prompts.clear()
            await sr.evaluate(suites, search, **tiny_world.given(sr.EvalConfig, settings | options))
            assert all(prompt.endswith((on, off)) for prompt in service.prompts)
            return [prompt.endswith(on) for prompt in service.prompts]

        systems: dict[str, Any] = {"trained": run, "base": None}
        assert await ends(questions, systems=systems, out_dir=tmp_path / "e") == [True, True], (
            "the base model beside it too"
        )
        service.events.clear()
        assert await ends(tmp_path / "e") == [True, True], "a repetition is played as the evaluation was"
        assert await ends(questions, systems=systems, thinking=False) == [False, False]
        assert await ends(questions, systems={"trained": sr.System(run, thinking=False)}) == [False]
        assert (
            "'trained' is evaluated with other settings than in training: thinking False (trained with True)"
            in service.notices
        )
        service.prompts.clear()
        await sr.rollout(
            questions, search, checkpoint=run, **tiny_world.given(sr.RolloutConfig, settings, group_size=1)
        )
        assert all(prompt.endswith(on) for prompt in service.prompts)
        assert service.prompts
        # A run started before ``thinking`` existed left it to the template.
        state = json.loads((run / "state.json").read_text())
        del state["settings"]["thinking"]
        (run / "state.json").write_text(json.dumps(state))
        assert await ends(questions, systems=run) == [True], "as the template of Qwen3.5 has it"


async def test_evaluations_and_given_clients_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [sr.Question("q", "Who wrote it?", ("Austen",))]
    with stand_in_service(tmp_path, monkeypatch, "Qwen/Qwen3-4B-Instruct-2507", SPRING) as service:
        search = tiny_world.make_search(tmp_path / "index")
        settings: dict[str, Any] = {
            "tokenizer": service.tokenizer,
            "progress": False,
            "on_event": service.events.append,
        }
        report = await sr.evaluate(
            questions, search, out_dir=tmp_path / "evaluation", **tiny_world.given(sr.EvalConfig, settings)
        )
        assert report.manifest is not None
        assert [record.model for record in report.manifest.systems] == ["Qwen/Qwen3-4B-Instruct-2507"]
        assert sum(", the nearest of its family" in text for text in service.notices) == 1
        assert report.manifest.service["tinker"] is False
        assert report.costs()["dollars"].null_count() == 1, "a server of one's own has its own prices"
        again = await sr.evaluate(
            questions, search, out_dir=tmp_path / "evaluation", resume=True, **tiny_world.given(sr.EvalConfig, settings)
        )
        assert again.manifest == report.manifest
        async with sdk(service.url) as client:
            monkeypatch.delenv("TINKER_BASE_URL")
            assert not is_tinker_cloud(client)
            assert is_tinker_cloud(None)
            groups = await sr.rollout(
                questions, search, service=client, **tiny_world.given(sr.RolloutConfig, settings, group_size=2)
            )
            assert len(groups) == 1
            with pytest.raises(ModelError, match="does not offer 'openai/gpt-oss-20b'"):
                await sr.rollout(
                    questions,
                    search,
                    service=client,
                    **tiny_world.given(sr.RolloutConfig, settings, model="openai/gpt-oss-20b"),
                )


async def test_a_service_without_the_family_needs_a_named_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        stand_in_service(tmp_path, monkeypatch, "acme/one", ("acme/one", "acme/two")) as service,
        pytest.raises(ModelError, match=r"choose one with model=…\. It offers acme/one, acme/two"),
    ):
        await train(service, tmp_path)


@contextmanager
def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes) -> Iterator[str]:
    """A service that gives this answer when asked for its models."""

    async def answer(self: Service, request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, content_type="application/json")

    monkeypatch.setattr(Service, "get_server_capabilities", answer)
    with service_thread(folder) as served:
        yield served.url


@pytest.mark.parametrize(
    ("status", "body"),
    [(404, b"{}"), (405, b"{}"), (200, b'{"supported_models": []}'), (200, b"{}")],
)
async def test_a_service_without_a_list_is_assumed_to_have_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes
) -> None:
    with answering(tmp_path, monkeypatch, status, body) as url:
        assert await ask_offered(lambda: tinker.RestClient(base_url=url, api_key=KEY)) is None
    assert choose_model("acme/x", None) == (
        "acme/x",
        "the service does not list its models: assuming that it has acme/x",
    )
    assert choose_model(None, None)[0] == "Qwen/Qwen3.5-4B"


async def test_a_refusal_is_an_error_and_shows_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(tmp_path, monkeypatch, 403, b'{"detail": "no"}') as url, pytest.raises(ServiceError) as caught:
        await ask_offered(lambda: tinker.RestClient(base_url=url, api_key=KEY))
    assert KEY not in str(caught.value)


async def test_a_service_that_does_not_list_models_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("searchr1_async.service.availability.ASK_DEADLINE", 0.5)
    with (
        answering(tmp_path, monkeypatch, 503, b"{}") as url,
        pytest.raises(ServiceUnavailableError, match="did not list"),
    ):
        await ask_offered(lambda: tinker.RestClient(base_url=url, api_key=KEY))


async def test_sampling_only_models_are_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"supported_models": [{"model_name": "a", "trainable": false}, {"model_name": "b"}, {"model_name": null}]}'
    with answering(tmp_path, monkeypatch, 200, body) as url:
        connect = lambda: tinker.RestClient(base_url=url, api_key=KEY)  # noqa: E731
        assert await ask_offered(connect) == ("a", "b")
        assert await ask_offered(connect, trains=True) == ("b",)
    body = b'{"supported_models": [{"model_name": "a", "trainable": false}]}'
    with answering(tmp_path, monkeypatch, 200, body) as url:
        connect = lambda: tinker.RestClient(base_url=url, api_key=KEY)  # noqa: E731
        with pytest.raises(ModelError, match=r"offers no model that can be trained, only a$"):
            await ask_offered(connect, trains=True)
