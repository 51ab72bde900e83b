"""This project as a contender of the throughput benchmark, through its public functions.

python -m benchmarks.throughput.ours SETTINGS.json
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.shared.monitor import log_to, observing

MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"synchronous": True},
    "streaming": {},
    "asynchronous": {"max_staleness": 1},
}


async def play(settings: dict[str, Any]) -> None:
    """One run of one mode."""
    import searchr1_async as sr
    from benchmarks.shared.scripted_episodes import INSTRUCTIONS

    search = sr.Search(
        sr.search.GeminiEmbedder(api_key=settings["gemini_key"], base_url=settings["gemini"]),
        sr.search.RemoteChroma("127.0.0.1", settings["chroma"], settings["collection"]),
        n_results=settings["n_results"],
    )
    loss = {"loss": settings["loss"]} if settings["mode"] == "asynchronous" else {}
    async with observing(Path(settings["observed"])):
        await sr.train(
            sr.load_questions(settings["questions"]),
            search,
            settings["out"],
            sr.TrainConfig(
                model=settings["model"],
                tokenizer=settings["tokenizer"],
                renderer=settings["renderer"],
                instructions=INSTRUCTIONS,
                group_size=settings["group_size"],
                groups_per_batch=settings["groups"],
                minibatches=settings["minibatches"],
                steps=settings["steps"],
                seed=settings["seed"],
                **MODES[settings["mode"]],
                **loss,
                **settings["options"],
            ),
            service=settings["url"],
            progress=False,
        )


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    log_to(Path(settings["log"]))
    asyncio.run(play(settings))


if __name__ == "__main__":
    main()
