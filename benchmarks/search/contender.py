"""One way of searching, in a process of its own, that plays a load and says what it took, as one line of JSON.

    python -m benchmarks.search.contender WAY LOAD_FILE --gemini URL --chroma PORT [--vertex]

WAY is ``ours``, ``recipe`` or ``none``, which answers at once: what playing the episodes costs by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search.load import Load, Step
from benchmarks.shared.chroma_index import COLLECTION, N_RESULTS
from benchmarks.shared.gemini_stand_in import counts_of

KEY = "a-key-of-the-benchmark"
Ask = Callable[[str], Awaitable[tuple[str, ...]]]


@dataclass
class Played:
    """What the episodes saw."""

    seconds: list[float] = field(default_factory=list)
    """From asking to answer, or to failure, one a search."""
    right: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Searches that raised, by the kind of error."""


@dataclass
class Way:
    """One way of searching, open."""

    ask: Ask
    store_requests: Callable[[], int]
    cache_hits: Callable[[], int]


async def play(load: Load, ask: Ask) -> Played:
    """Every episode samples (sleeps) and searches in turn, as many at once as the load says."""
    played = Played()
    slots = asyncio.Semaphore(load.at_once)

    async def episode(steps: Sequence[Step]) -> None:
        async with slots:
            for step in steps:
                await asyncio.sleep(step.pause)
                began = time.monotonic()
                try:
                    found = await ask(step.query)
                    played.right += found == load.right[step.query]
                except Exception as error:  # an episode that failed: the others go on
                    kind = type(error).__name__
                    played.failures[kind] = played.failures.get(kind, 0) + 1
                played.seconds.append(time.monotonic() - began)

    async with asyncio.TaskGroup() as episodes:
        for steps in load.episodes:
            episodes.create_task(episode(steps))
    return played


@asynccontextmanager
async def ours(gemini: str, chroma: int, vertex: bool) -> AsyncIterator[Way]:
    """This project's search."""
    from searchr1_async import Search
    from searchr1_async.search import GeminiEmbedder, RemoteChroma

    class CountedStore(RemoteChroma):
        requests = 0

        async def query(self, *args: Any, **kwargs: Any) -> Any:
            self.requests += 1
            return await super().query(*args, **kwargs)

    os.environ["GOOGLE_CLOUD_PROJECT"] = "benchmark"
    service: Any = {"credentials": _token()} if vertex else {"api_key": KEY}
    store = CountedStore("127.0.0.1", chroma, COLLECTION)
    async with Search(GeminiEmbedder(base_url=gemini, **service), store) as search:

        async def ask(query: str) -> tuple[str, ...]:
            (passages,) = await search.search([query])
            return tuple(passage.id for passage in passages)

        yield Way(ask, lambda: store.requests, lambda: search.statistics.memory_hits)


@asynccontextmanager
async def recipe(gemini: str, chroma: int, vertex: bool) -> AsyncIterator[Way]:
    """The recipe's way."""
    from google.genai import Client
    from google.genai.types import HttpOptions

    from benchmarks.search.recipe import RecipeSearch

    options = HttpOptions(base_url=gemini)
    if vertex:
        client = Client(
            vertexai=True, project="benchmark", location="global", credentials=_token(), http_options=options
        )
    else:
        client = Client(api_key=KEY, http_options=options)
    async with RecipeSearch(client, chroma, COLLECTION, N_RESULTS) as search:
        yield Way(search.search, lambda: search.store_requests, lambda: 0)


@asynccontextmanager
async def none(gemini: str, chroma: int, vertex: bool) -> AsyncIterator[Way]:
    """No search at all."""

    async def ask(query: str) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return ()

    yield Way(ask, lambda: 0, lambda: 0)


def _token() -> Any:
    from google.oauth2.credentials import Credentials

    return Credentials(token=KEY)


WAYS = {"ours": ours, "recipe": recipe, "none": none}


async def measure(name: str, load: Load, gemini: str, chroma: int, vertex: bool) -> dict[str, Any]:
    """One row of the benchmark. Opening and a first search are not in it: they import libraries and connect."""
    async with WAYS[name](gemini, chroma, vertex) as way:
        await way.ask("warm")
        await counts_of(gemini, forget=True)
        store_before, hits_before = way.store_requests(), way.cache_hits()
        gc.collect()
        cpu, began = time.process_time(), time.monotonic()
        played = await play(load, way.ask)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        counts = await counts_of(gemini)
        p50, p90, p99 = np.percentile(played.seconds, [50, 90, 99])
        return {
            "way": name,
            "searches": len(played.seconds),
            "right": played.right,
            "failures": played.failures,
            "embedding_requests": counts["requests"],
            "embedding_statuses": counts["statuses"],
            "texts_embedded": counts["texts_embedded"],
            "embedded_again": counts["embedded_again"],
            "faults_met": sum(counts["faults"].values()),
            "store_requests": way.store_requests() - store_before,
            "cache_hits": way.cache_hits() - hits_before,
            "client_cpu_seconds": cpu,
            "seconds": seconds,
            "p50": float(p50),
            "p90": float(p90),
            "p99": float(p99),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("load", type=Path)
    parser.add_argument("--gemini", required=True)
    parser.add_argument("--chroma", type=int, required=True)
    parser.add_argument("--vertex", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("google_genai").setLevel(logging.ERROR)
    row = asyncio.run(measure(options.way, Load.read(options.load), options.gemini, options.chroma, options.vertex))
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
