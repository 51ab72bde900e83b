"""This project as a contender of the throughput benchmark, through its public functions.

python -m benchmarks.throughput.ours SETTINGS.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import searchr1_async as sr
from benchmarks.shared.monitor import observing, run_contender
from benchmarks.shared.scripted_episodes import INSTRUCTIONS

MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"synchronous": True},
    "streaming": {},
    "asynchronous": {"max_staleness": 1},
}


def make_search(settings: dict[str, Any]) -> sr.Search:
    """The search over the stand-ins."""
    return sr.Search(
        sr.search.GeminiEmbedder(api_key=settings["gemini_key"], base_url=settings["gemini"]),
        sr.search.RemoteChroma("127.0.0.1", settings["chroma"], settings["collection"]),
        n_results=settings["n_results"],
    )


def episode_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that training and rollouts share."""
    names = ("model", "tokenizer", "renderer", "group_size", "seed")
    return {"instructions": INSTRUCTIONS, **{name: settings[name] for name in names}, **settings["options"]}


async def train(settings: dict[str, Any]) -> None:
    """Trains in the mode that is asked for."""
    loss = {"loss": settings["loss"]} if settings["mode"] == "asynchronous" else {}
    await sr.train(
        sr.load_questions(settings["questions"]),
        make_search(settings),
        settings["out"],
        sr.TrainConfig(
            groups_per_batch=settings["groups"],
            minibatches=settings["minibatches"],
            steps=settings["steps"],
            **episode_settings(settings),
            **MODES[settings["mode"]],
            **loss,
        ),
        service=settings["url"],
        progress=False,
    )


async def play(settings: dict[str, Any]) -> None:
    """One run of one mode."""
    async with observing(Path(settings["observed"])):
        await train(settings)


if __name__ == "__main__":
    run_contender(play)
