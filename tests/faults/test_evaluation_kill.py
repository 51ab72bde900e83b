"""An evaluation killed in the middle and resumed gives the report of one that was not."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import searchr1_async as sr
from searchr1_async.events import Event
from tests import tiny_world

pytestmark = pytest.mark.slow

QUESTIONS, SAMPLES, SYSTEMS = 48, 12, 3
EPISODES = QUESTIONS * SAMPLES * SYSTEMS


def say(event: Event) -> None:
    """To the process that counts."""
    sys.stdout.write(type(event).__name__ + "\n")
    sys.stdout.flush()


async def evaluate(out: Path, index: Path) -> sr.Report:
    """The evaluation, going on where it was; a line for every question that has been played."""
    train, held_out = tiny_world.make_questions()
    return await sr.evaluate(
        {"trained": train, "held out": held_out},
        tiny_world.make_search(index),
        systems={"search": None, "direct": sr.System(method="direct"), "rag": sr.System(method="rag")},
        samples=SAMPLES,
        out_dir=out,
        resume=(out / "manifest.json").exists(),
        max_episodes_in_flight=16,
        emit=say,
        # The prompts of the baselines are longer than an episode of this world: 119 and 213 tokens.
        **{
            name: value
            for name, value in {**tiny_world.PLAYING, **tiny_world.served(), "max_trajectory_tokens": 250}.items()
            if name != "local"
        },
    )


def start(out: Path, index: Path) -> subprocess.Popen[str]:
    """In a process of its own, to be killed."""
    service = tiny_world.shared_service()
    environment = tiny_world.child_environment() | {"TINKER_API_KEY": service.api_key, "TINY_SERVICE": service.url}
    command = [sys.executable, __file__, str(out), str(index), str(tiny_world.model_folder())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def played(process: subprocess.Popen[str], most: int | None) -> bool:
    """Lets it play, and kills it when so many questions more are done; whether it came to its end before."""
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += line.strip() == "PhaseAdvanced"
        if seen == most:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait(timeout=60) == 0


def test_killed_twice_it_reports_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed, index = tmp_path / "whole", tmp_path / "killed", tmp_path / "index"
    assert played(start(whole, index), None)
    for questions in (40, 70):
        assert not played(start(killed, index), questions), "killed before its end"
    assert played(start(killed, index), None)
    one, other = (json.loads(sr.open_report(folder).figures()) for folder in (whole, killed))
    assert one == other
    scores = [sr.open_report(folder)["search"].scores for folder in (whole, killed)]
    assert (
        scores[0]
        .drop("seconds", "sampling_seconds", "search_seconds")
        .equals(scores[1].drop("seconds", "sampling_seconds", "search_seconds"))
    )
    assert sum(evaluation.scores.height for evaluation in sr.open_report(killed).values()) == EPISODES


if __name__ == "__main__":
    import os

    tiny_world.served = lambda: {  # type: ignore[assignment]
        "service": os.environ["TINY_SERVICE"],
        "model": sys.argv[3],
        "tokenizer": sys.argv[3],
    }
    asyncio.run(evaluate(Path(sys.argv[1]), Path(sys.argv[2])))
