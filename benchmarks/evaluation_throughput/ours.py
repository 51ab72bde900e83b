"""This project as a contender of the evaluation benchmark, through its public functions.

    python -m benchmarks.evaluation_throughput.ours SETTINGS.json

``pool`` evaluates all suites by one call; ``suites`` by one call a suite, each begun when the one before has returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evaluation_throughput.marks import import_all, marking, prepare_service
from benchmarks.shared.monitor import observing, run_contender


async def evaluated(settings: dict[str, Any], weights: str, suites: Mapping[str, str], out: str) -> int:
    """Questions that were answered right, of the suites in these files."""
    import searchr1_async as sr
    from benchmarks.shared.scripted_episodes import INSTRUCTIONS
    from benchmarks.throughput.ours import make_search

    report = await sr.evaluate(
        suites,
        make_search(settings),
        {"evaluated": weights},
        sr.EvalConfig(
            model=settings["model"],
            tokenizer=settings["tokenizer"],
            renderer=settings["renderer"],
            instructions=INSTRUCTIONS,
            **settings["options"],
        ),
        out_dir=out,
        service=settings["url"],
        progress=False,
    )
    return round(report["evaluated"].scores["exact_match"].sum())


async def play(settings: dict[str, Any]) -> None:
    """One evaluation."""
    import searchr1_async  # noqa: F401

    imports = import_all(settings["tokenizer"])
    weights = await asyncio.to_thread(prepare_service, settings["url"], settings["model"])
    suites: dict[str, str] = settings["suites"]
    parts = [suites] if settings["mode"] == "pool" else [{name: path} for name, path in suites.items()]
    async with observing(Path(settings["observed"])):
        with marking(Path(settings["marks"]), imports) as marks:
            rights = [
                await evaluated(settings, weights, part, f"{settings['out']}/{number}")
                for number, part in enumerate(parts)
            ]
            marks.right = sum(rights)


if __name__ == "__main__":
    run_contender(play)
