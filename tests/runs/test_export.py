"""Exports of whole runs: transformers loads them and agrees with the service token by token."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import tinker
import torch
from safetensors.numpy import load_file
from tinker import types
from transformers import AutoModelForCausalLM, AutoTokenizer

import searchr1_async as sr
from searchr1_async.cli import main
from searchr1_async.events import Event, Notice, StepFinished
from searchr1_async.runs.resume import KeptCheckpoint, ResumePoint
from tests import tiny_world

pytestmark = pytest.mark.anyio

TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
    monkeypatch.setenv("TINKER_BASE_URL", tiny_world.shared_service().url)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sr.runs.RecordedRun]:
    """A run of three kept steps on a service that outlives it."""
    folder = tmp_path_factory.mktemp("finished")
    train, held_out = tiny_world.make_questions()

    async def work() -> None:
        settings = tiny_world.served_settings(
            steps=3, checkpoint_every=2, warm_up=tiny_world.WARM_UP, held_out=held_out[:4], evaluate_every=1
        )
        await sr.train(
            train,
            tiny_world.make_search(folder / "index"),
            out_dir=folder / "run",
            **tiny_world.given(sr.TrainConfig, settings, keep_best=True),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_API_KEY", tiny_world.shared_service().api_key)
        asyncio.run(work())
        yield sr.open_run(folder / "run")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def service_logprobs(kept: KeptCheckpoint, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    service = await anyio.to_thread.run_sync(lambda: tinker.ServiceClient(base_url=tiny_world.shared_service().url))
    try:
        client = await anyio.to_thread.run_sync(lambda: service.create_sampling_client(model_path=kept.sampler_path))
        found = [await (await client).compute_logprobs(types.ModelInput.from_ints(list(text))) for text in texts]
        return [[value for value in values if value is not None] for values in found]
    finally:
        await service.close("success")


def transformers_logprobs(model: Any, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    out: list[list[float]] = []
    for text in texts:
        tokens_T = torch.tensor(list(text))
        with torch.no_grad():
            logprobs_TV = model(input_ids=tokens_T[None]).logits[0].float().log_softmax(-1)
        out.append(logprobs_TV[:-1].gather(1, tokens_T[1:, None])[:, 0].tolist())
    return out


def largest_difference(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def played(run: sr.runs.RecordedRun, step: int, count: int = 12) -> list[list[int]]:
    """Tokens of episodes of a step."""
    groups = run.episodes().filter(step=step).select("group", "member").unique().sort("group", "member").collect()
    return [list(run.episode(step, *row).tokens) for row in groups.head(count).iter_rows()]


async def test_merged_weights_say_what_the_service_says(finished: sr.runs.RecordedRun, tmp_path: Path) -> None:
    """A tied head that the adapter changes is untied; the embedding is unchanged."""
    folder = await finished.export(tmp_path / "merged", format="merged")
    texts = played(finished, 3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = await service_logprobs(finished.checkpoints[-1], texts)
    assert largest_difference(transformers_logprobs(model, texts), expected) < TOLERANCE
    base = AutoModelForCausalLM.from_pretrained(tiny_world.model_folder(), dtype=torch.float32)
    assert base.config.tie_word_embeddings
    assert largest_difference(transformers_logprobs(base, texts), expected) > 0.1, "the weights were trained"
    assert not model.config.tie_word_embeddings
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044, "a server of another user can read it"
    torch.testing.assert_close(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(folder).encode("answer") == AutoTokenizer.from_pretrained(
        tiny_world.model_folder()
    ).encode("answer")


async def test_peft_over_the_adapter_says_what_the_service_says(finished: sr.runs.RecordedRun, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is no dependency: pip install --no-deps peft accelerate")
    folder = await finished.export(tmp_path / "adapter")
    texts = played(finished, 3)
    base = AutoModelForCausalLM.from_pretrained(tiny_world.model_folder(), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the adapted tied head, correct while unmerged
        model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    expected = await service_logprobs(finished.checkpoints[-1], texts)
    assert largest_difference(transformers_logprobs(model, texts), expected) < TOLERANCE


async def test_the_cookbooks_weight_tools_work_on_it(finished: sr.runs.RecordedRun, tmp_path: Path) -> None:
    weights = pytest.importorskip("tinker_cookbook.weights", reason="needs tinker-cookbook 0.6 and pyrage")
    state = finished.checkpoints[-1].state_path
    service = await anyio.to_thread.run_sync(tinker.ServiceClient)
    trainer = await anyio.to_thread.run_sync(lambda: service.create_training_client_from_state(state).result())
    path = (await trainer.save_weights_external("cookbook")).path
    adapter, built = tmp_path / "adapter", tmp_path / "built"
    await anyio.to_thread.run_sync(lambda: weights.download(tinker_path=path, output_dir=str(adapter)))
    await anyio.to_thread.run_sync(
        lambda: weights.build_lora_adapter(
            base_model=str(tiny_world.model_folder()), adapter_path=str(adapter), output_path=str(built)
        )
    )
    client = await anyio.to_thread.run_sync(lambda: tinker.RestClient(service.holder))
    await client.delete_checkpoint_from_tinker_path(path)
    await service.close("success")
    own = await finished.export(tmp_path / "own")
    found, expected = (load_file(one / "adapter_model.safetensors") for one in (adapter, own))
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
    assert (built / "adapter_config.json").is_file()


@pytest.mark.parametrize("step", ["last", "best", 2])
async def test_an_adapter_of_a_step_is_a_peft_folder(finished: sr.runs.RecordedRun, tmp_path: Path, step: Any) -> None:
    folder = await sr.export(finished.out_dir, tmp_path / "adapter", step=step)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (32, 32, "LORA")
    assert config["base_model_name_or_path"] == tiny_world.model_folder().name
    wanted = {"tokenizer.json", "tokenizer_config.json", "README.md", "adapter_model.safetensors"}
    assert wanted <= set(names(folder))
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * (2 * 7 + 1)
    card = (folder / "README.md").read_text()
    wanted = {"last": finished.checkpoints[-1].step, "best": finished.best and finished.best.step}.get(step, step)
    assert f"on demonstrations, then {wanted} optimizer steps of reinforcement learning" in card
    assert "<|im_start|>system\nsearch then answer<|im_end|>" in card, "the run's own instructions"
    assert re.search(r"<search>.+</search>\n<information>.+</information>\n<answer>.+</answer>\n````", card)
    assert re.search(r"A query returns the closest passage of the \d+ in `passages`, embedded by `", card)
    assert "| learning.loss | importance_sampling |" in card, "the one that was chosen"
    assert "| world | 36 |" in card
    assert "learning.learning_rate | 0.001" in card
    assert f"| after RL | {finished.step} | world | 4 |" in card
    assert str(tiny_world.model_folder().parent) not in card, "no path of this machine"
    assert names(tmp_path) == ["adapter"], "nothing is left beside it"


async def test_nothing_temporary_stays_at_the_service(finished: sr.runs.RecordedRun, tmp_path: Path) -> None:
    await finished.export(tmp_path / "adapter")
    client = await anyio.to_thread.run_sync(lambda: tinker.RestClient(base_url=tiny_world.shared_service().url))
    found = (await client.list_user_checkpoints(limit=1000)).checkpoints
    assert [one.tinker_path for one in found if one.checkpoint_type == "external"] == []


async def test_a_path_of_the_service_is_exported_without_its_run(finished: sr.runs.RecordedRun, tmp_path: Path) -> None:
    state = finished.checkpoints[-1].state_path
    assert state is not None
    model = str(tiny_world.model_folder())
    with pytest.raises(sr.errors.ConfigurationError, match="no training state"):
        await sr.export(finished.checkpoints[-1].sampler_path, tmp_path / "none")
    local = tmp_path / "local"
    folder = await sr.export(state, local, base_model=model, format="merged")
    whole = await finished.export(tmp_path / "whole", format="merged")
    assert load_file(folder / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


async def test_bad_input_is_refused_before_any_work(finished: sr.runs.RecordedRun, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(sr.errors.ConfigurationError, match="not empty"):
        await finished.export(tmp_path / "full")
    with pytest.raises(sr.errors.ConfigurationError, match="should be 'peft' or 'merged'"):
        await finished.export(tmp_path / "new", format="gguf")
    with pytest.raises(sr.errors.ConfigurationError, match="push_to_hub"):
        await finished.export(tmp_path / "new", push_to_hub="a/b/c")
    with pytest.raises(sr.errors.RunFolderError, match=r"no weights of step 77; kept: 0, 2, 3|kept: 0, 1, 2, 3"):
        await finished.export(tmp_path / "new", step=77)
    with pytest.raises(sr.errors.RunFolderError, match="holds no run"):
        await sr.export(tmp_path / "nothing", tmp_path / "new")
    with pytest.raises(sr.errors.ServiceError, match="does not exist"):
        await sr.export("tinker://nobody/weights/none", tmp_path / "new", base_model=str(tiny_world.model_folder()))
    assert not (tmp_path / "new").exists()


async def test_a_resume_point_that_is_replaced_meanwhile_is_followed(
    finished: sr.runs.RecordedRun, tmp_path: Path
) -> None:
    """Like a live run, which deletes the previous state after each step."""
    run = tmp_path / "run"
    shutil.copytree(finished.out_dir, run)
    (run / "checkpoints.json").unlink()
    point = ResumePoint.load(run)
    assert point is not None
    newer = replace(point, sampler_path=None, sampler_step=None)
    replace(newer, step=2, state_path="tinker://gone/weights/step-000002").save(run)

    def emit(event: Event) -> None:
        if isinstance(event, Notice) and event.text.endswith("gone/weights/step-000002"):
            newer.save(run)

    folder = await sr.export(run, tmp_path / "new", on_event=emit)
    assert "3 optimizer steps of reinforcement learning" in (folder / "README.md").read_text()
    replace(newer, state_path="tinker://gone/weights/step-000003").save(run)
    with pytest.raises(sr.errors.ServiceError, match="gone/weights/step-000003"):
        await sr.export(run, tmp_path / "another")


async def test_a_base_of_another_shape_is_refused(finished: sr.runs.RecordedRun, tmp_path: Path) -> None:
    from searchr1_async.testing import make_tiny_model

    other = await anyio.to_thread.run_sync(lambda: make_tiny_model(tmp_path / "other", num_hidden_layers=2))
    with pytest.raises(sr.errors.ExportError, match="it is a different model"):
        await finished.export(tmp_path / "new", format="merged", base_model=str(other))
    assert names(tmp_path) == ["other"]


@pytest.mark.slow
async def test_a_run_of_the_embedded_service_while_it_trains_and_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_API_KEY")
    monkeypatch.delenv("TINKER_BASE_URL")
    settings = tiny_world.SETTINGS | {"group_size": 4, "groups_per_batch": 6, "minibatches": 2}
    train = tiny_world.make_questions()[0]
    search = tiny_world.make_search(tmp_path / "index")
    model = str(tiny_world.model_folder())
    settings |= {"steps": 2, "checkpoint_every": 1, "warm_up": tiny_world.WARM_UP}
    run = sr.train(train, search, out_dir=tmp_path / "run", **tiny_world.given(sr.TrainConfig, settings, model=model))
    early: Path | None = None
    async for event in run:
        if isinstance(event, StepFinished) and event.step == 1:
            early = await run.export(tmp_path / "early", step=1)
    await run
    assert early is not None
    again = await sr.export(tmp_path / "run", tmp_path / "late", step=1, local=settings["local"])
    assert (early / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()
    merged = await sr.export(tmp_path / "run", tmp_path / "merged", format="merged", local=settings["local"])
    assert (merged / "model.safetensors").is_file()


async def test_the_command(finished: sr.runs.RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(finished.out_dir), str(tmp_path / "adapter"), "--step", "2"]
    assert await anyio.to_thread.run_sync(main, command) == 0
    assert "README.md explains how to load them" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(SystemExit):
        main(["export", str(finished.out_dir), str(tmp_path / "x"), "--step", "two"])
    assert "'two': expected last, best, or a number of steps" in capsys.readouterr().err
