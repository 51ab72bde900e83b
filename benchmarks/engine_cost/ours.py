"""The engine as a contender: it trains, or only rolls out, while one thing about this process is looked at.

python -m benchmarks.engine_cost.ours SETTINGS.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import searchr1_async as sr
from benchmarks.engine_cost.looks import looking
from benchmarks.evaluation_throughput.marks import import_all
from benchmarks.shared.monitor import observing, run_contender
from benchmarks.throughput.ours import episode_settings, make_search, train


async def roll_out(settings: dict[str, Any]) -> None:
    """The episodes alone, of all batches at once."""
    await sr.rollout(
        sr.load_questions(settings["questions"]),
        make_search(settings),
        sr.RolloutConfig(**episode_settings(settings)),
        service=settings["url"],
        progress=False,
    )


async def play(settings: dict[str, Any]) -> None:
    """One run."""
    work = roll_out if settings["mode"] == "rollouts" else train
    import_all(settings["tokenizer"])  # so that looking begins behind the imports
    async with observing(Path(settings["observed"])) as observed:
        with looking(settings["look"], Path(settings["looked"]), observed):
            await work(settings)


if __name__ == "__main__":
    run_contender(play)
