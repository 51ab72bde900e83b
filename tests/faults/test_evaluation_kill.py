"""An evaluation killed in the middle and resumed gives the report of one that was not, but for what rounding draws otherwise."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import searchr1_async as sr
from searchr1_async.events import Event
from tests import tiny_world
from tests.evaluation.reports import figures

pytestmark = pytest.mark.slow

QUESTIONS, SAMPLES, SYSTEMS = 48, 12, 3
EPISODES = QUESTIONS * SAMPLES * SYSTEMS
TIMES = ("seconds", "sampling_seconds", "search_seconds")
SERVICE_MEMORY = ("cached_prompt_tokens",)
"""Depends on which prompts the service remembers: both evaluations share one service, and the second finds the first's."""
MOST_FLIPS = 3
"""Episodes of which a token may be drawn otherwise. The service computes a sequence's logits in batches of whoever is there and
with whatever it remembers of its prompt, so that they differ by up to 5e-6, by the shape of the products. Of 23 million tokens
drawn from this model's logits of sequences alone and again in batches of 4 or 16, 117 were others: 0.1 of the 20,700 that this
test compares. More than three of them have a chance of 4 in a million."""


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
        out_dir=out,
        resume=(out / "manifest.json").exists(),
        on_event=say,
        **tiny_world.given(
            sr.EvalConfig,
            {
                name: value
                for name, value in {**tiny_world.PLAYING, **tiny_world.served(), "max_trajectory_tokens": 250}.items()
                if name != "local"
            },
            samples=SAMPLES,
            max_episodes_in_flight=16,
        ),
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


def is_flipped(one: sr.Episode, other: sr.Episode) -> bool:
    """Whether a token of a sample was drawn otherwise; fails where anything but such a draw tells the two apart."""
    assert (one.question, one.prompt_tokens) == (other.question, other.prompt_tokens)
    for mine, its in zip(one.turns, other.turns, strict=False):
        drawn = list(zip(mine.sampled_tokens, its.sampled_tokens, strict=False))
        alike = next((place for place, (token, another) in enumerate(drawn) if token != another), len(drawn))
        assert mine.logprobs[:alike] == pytest.approx(its.logprobs[:alike], abs=1e-4), "drawn from the same"
        if alike < len(drawn):
            return True
        assert (mine.sampled_tokens, mine.truncated) == (its.sampled_tokens, its.truncated)
        assert mine.appended_tokens == its.appended_tokens, "found and told the same"
    assert len(one.turns) == len(other.turns)
    assert (one.stop_reason, one.answer, one.reward) == (other.stop_reason, other.answer, other.reward)
    return False


def flips(whole: sr.Report, killed: sr.Report, system: str) -> list[bool]:
    """Of each sample of a system, by question and number; all that did not flip have the same scores to the last bit."""
    episodes, others = (tuple(report[system].episodes) for report in (whole, killed))
    found = [is_flipped(one, other) for one, other in zip(episodes, others, strict=True)]
    scores, other_scores = (report[system].scores.drop(TIMES + SERVICE_MEMORY) for report in (whole, killed))
    assert scores["question_id"].to_list() == [episode.question.id for episode in episodes]
    same = ~pl.Series(found, dtype=pl.Boolean)
    assert scores.filter(same).equals(other_scores.filter(same))
    return found


def test_killed_twice_it_reports_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed, index = tmp_path / "whole", tmp_path / "killed", tmp_path / "index"
    assert played(start(whole, index), None)
    for questions in (40, 70):
        assert not played(start(killed, index), questions), "killed before its end"
    assert played(start(killed, index), None)
    one, other = sr.open_report(whole), sr.open_report(killed)
    assert list(one) == list(other)
    flipped = sum(sum(flips(one, other, system)) for system in one)
    assert flipped <= MOST_FLIPS
    if not flipped:
        assert json.loads(figures(one)) == json.loads(figures(other))
    assert not sum(evaluation.failed for evaluation in other.values())
    assert sum(evaluation.scores.height for evaluation in other.values()) == EPISODES


if __name__ == "__main__":
    import os

    tiny_world.served = lambda: {  # type: ignore[assignment]
        "service": os.environ["TINY_SERVICE"],
        "model": sys.argv[3],
        "tokenizer": sys.argv[3],
    }
    asyncio.run(evaluate(Path(sys.argv[1]), Path(sys.argv[2])))
