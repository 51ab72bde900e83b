"""From training to the report in folders with wildcard characters in their names, beside folders they would match."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import searchr1_async as sr
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world
from tests.episodes.stand_in import stand_in
from tests.local.serving import KEY, service_thread

pytestmark = pytest.mark.anyio

MODEL = "Qwen/Qwen3.5-4B"
QUESTIONS = [sr.Question(f"q{number}", f"Who wrote book {number}?", ("Austen",)) for number in range(6)]
HELD_OUT = [sr.Question("h", "Who wrote the last book?", ("Austen",))]


def reply(prompt: list[int], chance: random.Random) -> str:
    return chance.choice(["Answer: Austen", "Answer: Dickens"])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Of a service; paths are relative to a folder of this test."""
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    tokenizer = tmp_path / "tokenizer"
    stand_in().save_pretrained(tokenizer)
    backend = ScriptedBackend(reply, model_name=MODEL, tokenizer_path=str(tokenizer))
    with service_thread(tmp_path / "service", backend) as served:
        yield {"service": served.url, "model": MODEL, "tokenizer": str(tokenizer), "max_tokens": 64, "progress": False}


@pytest.mark.parametrize(
    ("wild", "plain"),
    [
        ("[1]", "1"),
        pytest.param("*", "-all", marks=pytest.mark.slow),
        pytest.param("?", "x", marks=pytest.mark.slow),
    ],
)
async def test_a_run_and_its_report_use_the_given_folders(
    settings: dict[str, Any], tmp_path: Path, wild: str, plain: str
) -> None:
    search, run_name, report_name = tiny_world.make_search(tmp_path / "index"), f"lr{wild}", f"ev{wild}"
    sizes = {"group_size": 2, "groups_per_batch": 2, "minibatches": 1, "drop_constant_groups": False}

    async def train(out_dir: str, steps: int, **more: Any) -> sr.TrainingResult:
        return await sr.train(
            QUESTIONS,
            search,
            out_dir=out_dir,
            held_out=HELD_OUT,
            **tiny_world.given(sr.TrainConfig, sizes, settings, more, steps=steps),
        )

    await train(f"lr{plain}", 1)
    other = contents(Path(f"lr{plain}"))
    run = sr.train(
        QUESTIONS,
        search,
        out_dir=run_name,
        held_out=HELD_OUT,
        **tiny_world.given(sr.TrainConfig, sizes, settings, steps=2),
    )
    assert (await run).steps == 2
    assert (await train(run_name, 3, resume=True)).steps == 3
    for found in (run, sr.open_run(run_name)):
        assert found.metrics["step"].to_list() == [1, 2, 3]
        assert found.episodes().select(pl.len()).collect().item() == 3 * 4
    point = ResumePoint.load(tmp_path / run_name)
    assert point is not None
    assert point.step == 3

    report = await sr.evaluate(
        HELD_OUT,
        search,
        systems={"trained": run_name},
        out_dir=report_name,
        **tiny_world.given(sr.EvalConfig, settings),
    )
    assert report["trained"].step == 3
    again = await sr.evaluate(
        HELD_OUT,
        search,
        systems={"trained": run_name},
        out_dir=report_name,
        resume=True,
        **tiny_world.given(sr.EvalConfig, settings),
    )
    assert again["trained"].scores.equals(report["trained"].scores)
    page = again.save(f"report{wild}")
    assert page.parent == tmp_path / f"report{wild}"
    assert sr.open_report(report_name)["trained"].scores.equals(report["trained"].scores)
    assert contents(Path(f"lr{plain}")) == other
    assert not (tmp_path / f"ev{plain}").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
