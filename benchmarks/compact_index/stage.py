"""One stage of the compact index's benchmark, in a process of its own; prints a line of JSON, its last.

Stages: ``prepare`` (vectors, exact neighbours), ``build``, ``serve`` (single, batched, through `Search`), ``hold`` (opens, and waits),
``flat`` (faiss's exact index), ``chroma`` (in this process).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

import searchr1_async as sr
from benchmarks.shared.extended_vectors import ExtendedVectors, Extension, kept_neighbours
from benchmarks.shared.real_vectors import RealVectors, real_vectors
from searchr1_async.episodes.prompts import clean_query
from searchr1_async.events import Event, PhaseEnded
from searchr1_async.search import CompactStore, Store, Vectors, build_compact_index
from searchr1_async.search.stores.sources import Block

RESULTS = 10
BATCH = 128


@dataclass(frozen=True)
class Asked:
    """Real questions, shuffled, in three sets that share none."""

    texts: Sequence[str]
    tested: Vectors
    """Of which recall and speed are measured."""
    calibrating: Vectors
    """That the builder is given."""
    others: Vectors
    """All others: a long load."""

    @classmethod
    def of(cls, real: RealVectors, tested: int, calibrating: int = 500) -> Asked:
        order = np.random.default_rng(3).permutation(len(real.queries))
        sets = np.split(order, [tested, tested + calibrating])
        texts = [real.questions[number].question for number in sets[0]]
        return cls(texts, *(np.ascontiguousarray(real.queries[part]) for part in sets))

    @classmethod
    def load(cls, path: Path) -> Asked:
        """What :meth:`save` wrote: a server has nothing else of the real vectors in memory."""
        with np.load(path) as kept:
            return cls(kept["texts"].tolist(), kept["tested"], kept["calibrating"], kept["others"])

    def save(self, path: Path) -> None:
        np.savez(path, texts=self.texts, tested=self.tested, calibrating=self.calibrating, others=self.others)


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes that a process has in memory: its own, and of files."""
    kept = {"RssAnon": "anon", "RssFile": "file"}
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {line.partition(":")[0]: line.partition(":")[2] for line in lines}
    return {name: 1024 * int(fields[field].split()[0]) for field, name in kept.items() if field in fields}


def extension_of(real: RealVectors, work: Path) -> Extension:
    return Extension(real.vectors, kept_neighbours(real.vectors, work))


# --- what is exact ----------------------------------------------------------------------------------------------------------


def exact_path(options: argparse.Namespace) -> Path:
    return options.work / "exact" / f"{options.rows}-{options.questions}.npz"


def asked_path(options: argparse.Namespace) -> Path:
    return options.work / "exact" / f"questions-{options.questions}.npz"


class ExactNearest:
    """The nearest of some queries among all rows shown so far, by comparing with each."""

    def __init__(self, queries: Vectors) -> None:
        self._queries = queries
        self._best = np.empty((len(queries), 0), np.float32)
        self.rows = np.empty((len(queries), 0), np.int64)
        self.seconds = 0.0

    def show(self, first: int, vectors: Vectors) -> None:
        """More rows, float32 as they were made, the first of them number ``first``."""
        import faiss

        began = time.monotonic()
        found, places = faiss.knn(self._queries, vectors, min(RESULTS, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        best, rows = np.concatenate([self._best, found], 1), np.concatenate([self.rows, places + first], 1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :RESULTS]
        self._best, self.rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
        self.seconds += time.monotonic() - began


class Observed(ExtendedVectors):
    """The source, whose rows are shown to :class:`ExactNearest` on their way: making 21 million of them twice takes 8 minutes."""

    def observe(self, exact: ExactNearest) -> None:
        self._exact, self.whole = exact, False

    async def blocks(self, start: int) -> AsyncGenerator[Block]:
        row = start
        async for passages, vectors in super().blocks(start):
            await anyio.to_thread.run_sync(self._exact.show, row, vectors)
            row += len(passages)
            yield passages, vectors
        self.whole = start == 0


def prepare(options: argparse.Namespace, real: RealVectors, asked: Asked) -> dict[str, Any]:
    """Neighbours, and what is nearest of all; kept."""
    extension, path = extension_of(real, options.work), exact_path(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    asked.save(asked_path(options))
    identity = identity_of(asyncio.run(_fingerprint(real, extension, options.rows)))
    if path.exists():
        with np.load(path) as kept:
            if np.array_equal(kept["identity"], identity) and np.array_equal(kept["queries"], asked.tested):
                return {"exact_seconds": float(kept["seconds"]), "real": len(real.vectors)}
    exact = ExactNearest(asked.tested)
    for first, _, vectors in extension.blocks(options.rows):
        exact.show(first, vectors)
    keep_exact(path, exact, asked, identity)
    return {"exact_seconds": exact.seconds, "real": len(real.vectors)}


def keep_exact(path: Path, exact: ExactNearest, asked: Asked, identity: NDArray[np.uint8]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, rows=exact.rows, queries=asked.tested, identity=identity, seconds=exact.seconds)
    temporary.replace(path)


def identity_of(fingerprint: str) -> NDArray[np.uint8]:
    return np.frombuffer(fingerprint.encode(), np.uint8)


async def _fingerprint(real: RealVectors, extension: Extension, rows: int) -> str:
    return (await ExtendedVectors(real, extension, rows).open()).fingerprint


# --- making and serving -----------------------------------------------------------------------------------------------------


def build(options: argparse.Namespace, real: RealVectors, asked: Asked) -> dict[str, Any]:
    """Makes the index; how long each step took."""
    phases: dict[str, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, PhaseEnded):
            phases[event.phase] = event.seconds
            print(f"{event.phase}: {event.seconds:.0f} s", file=sys.stderr, flush=True)

    extension = extension_of(real, options.work)
    source = Observed(real, extension, options.rows, characters=options.characters)
    exact = ExactNearest(asked.tested)
    source.observe(exact)
    report = asyncio.run(build_compact_index(source, options.index, queries=asked.calibrating, on_event=note))
    if source.whole:
        path = exact_path(options)
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_exact(path, exact, asked, identity_of(asyncio.run(_fingerprint(real, extension, options.rows))))
        phases["rows"] -= exact.seconds  # no part of making an index
    chosen = report.manifest.calibration
    return {
        "build_seconds": report.seconds - exact.seconds,
        "bytes": report.manifest.bytes,
        "file_bytes": {name: record.bytes for name, record in report.manifest.files.items()},
        "phases": phases,
        "lists": report.manifest.lists,
        "probes": chosen.probes,
        "candidates": chosen.candidates,
        "calibrated_recall": chosen.recall,
        "curve": [
            {
                "recall_at_3": p.recall_at_3,
                "queries_per_second": p.queries_per_second,
                "probes": p.probes,
                "candidates": p.candidates,
            }
            for p in chosen.curve
        ],
    }


async def one_at_a_time(store: Store, queries: Vectors) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Ids of each, and how long a query took."""
    found, taken = [], []
    for number in range(len(queries)):
        began = time.perf_counter()
        (passages,) = await store.query(queries[number : number + 1], RESULTS)
        taken.append(time.perf_counter() - began)
        found.append(tuple(passage.id for passage in passages))
    return found, {
        "single_per_second": len(queries) / sum(taken),
        "single_p50": float(np.percentile(taken, 50)),
        "single_p99": float(np.percentile(taken, 99)),
    }


async def in_batches(store: Store, queries: Vectors) -> dict[str, float]:
    """As many at once as the store takes, at most 128, with as many requests at once as it says."""
    batches = [queries[first : first + BATCH] for first in range(0, len(queries), BATCH)]
    gate = anyio.CapacityLimiter(store.max_requests)
    taken: list[float] = []

    async def ask(batch: Vectors) -> None:
        async with gate:
            began = time.perf_counter()
            await store.query(batch, 3)
            taken.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for batch in batches:
            group.start_soon(ask, batch)
    seconds = time.perf_counter() - began
    return {"batched_per_second": len(queries) / seconds, "batch_p99": float(np.percentile(taken, 99))}


class KnownVectors:
    """An embedder of texts whose vectors are known: what `Search` costs beside the store."""

    name, max_texts, max_requests = "known vectors", 4096, 1

    def __init__(self, texts: Sequence[str], vectors: Vectors) -> None:
        self._known = {clean_query(text): vector for text, vector in zip(texts, vectors, strict=True)}
        self.dimension = vectors.shape[1]
        self.fingerprint = "known"

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._known[text] for text in texts])

    embed_passages = embed_queries


async def through_search(store: Store, asked: Asked) -> dict[str, float]:
    """All questions at once, each a call of its own, as episodes ask."""
    async with sr.Search(KnownVectors(asked.texts, asked.tested), store, cache_entries=0) as search:
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for text in asked.texts:
                group.start_soon(search.search, [text])
        return {"search_per_second": len(asked.texts) / (time.perf_counter() - began)}


def recall(found: Sequence[Sequence[str]], exact: NDArray[np.int64]) -> dict[str, float]:
    """Shares of the exact 3 and 10 nearest among as many that were found."""
    rows = [{at: {str(row) for row in own[:at]} for at in (3, 10)} for own in exact]
    return {
        f"recall_at_{at}": float(
            np.mean([len(row[at] & set(ids[:at])) / at for row, ids in zip(rows, found, strict=True)])
        )
        for at in (3, 10)
    }


async def _serve(options: argparse.Namespace, store: Store, asked: Asked) -> dict[str, Any]:
    before = memory()
    began = time.perf_counter()
    await store.open()
    measured: dict[str, Any] = {"open_seconds": time.perf_counter() - began}
    measured |= {f"opened_{name}": value for name, value in memory().items()}
    measured |= {f"started_{name}": value for name, value in before.items()}
    try:
        if options.state == "cold-batches":
            measured |= await in_batches(store, asked.tested)
        elif options.state == "load":
            measured |= await in_batches(store, asked.others)
        else:
            if options.state == "warm":
                await one_at_a_time(store, asked.tested)
            found, times = await one_at_a_time(store, asked.tested)
            measured |= times
            with np.load(exact_path(options)) as kept:
                measured |= recall(found, kept["rows"])
            if options.state == "warm":
                for _ in range(2):
                    measured |= await in_batches(store, asked.tested)
        measured |= {f"served_{name}": value for name, value in memory().items()}
        if options.state == "warm":
            measured |= await through_search(store, asked)
    finally:
        await store.aclose()
    return measured


async def _hold(store: Store, asked: Asked) -> None:
    await store.open()
    await one_at_a_time(store, asked.tested)
    print("ready", flush=True)
    await anyio.to_thread.run_sync(sys.stdin.readline)
    await store.aclose()


# --- those beside it --------------------------------------------------------------------------------------------------------


def flat(options: argparse.Namespace, real: RealVectors, asked: Asked) -> dict[str, Any]:
    """faiss's exact index in memory, float32."""
    import faiss

    started = memory()
    index = faiss.IndexFlatIP(real.vectors.shape[1])
    # Room for all at once: as it grows by doubling, 5 million rows of 15.4 GB asked for 25.8 GB.
    index.codes.resize(4 * options.rows * index.d)
    index.codes.resize(0)
    began = time.perf_counter()
    for _, _, vectors in extension_of(real, options.work).blocks(options.rows):
        index.add(vectors)
    seconds = time.perf_counter() - began
    held = memory()
    taken, found = [], []
    for query in asked.tested:
        began = time.perf_counter()
        found.append([str(row) for row in index.search(query[None], RESULTS)[1][0]])
        taken.append(time.perf_counter() - began)
    began = time.perf_counter()
    for first in range(0, len(asked.tested), BATCH):
        index.search(asked.tested[first : first + BATCH], 3)
    batched = len(asked.tested) / (time.perf_counter() - began)
    with np.load(exact_path(options)) as kept:
        quality = recall(found, kept["rows"])
    return {
        "build_seconds": seconds,
        "single_per_second": len(taken) / sum(taken),
        "single_p50": float(np.percentile(taken, 50)),
        "single_p99": float(np.percentile(taken, 99)),
        "batched_per_second": batched,
        **quality,
        **{f"served_{name}": value for name, value in held.items()},
        **{f"started_{name}": value for name, value in started.items()},
    }


async def _chroma(options: argparse.Namespace, real: RealVectors, asked: Asked) -> dict[str, Any]:
    """The package's own store over Chroma in this process, with its own settings; built once, given up after some time."""
    from searchr1_async.search import EmbeddedChroma

    store = EmbeddedChroma(options.index)
    await store.open()
    extension = extension_of(real, options.work)
    source = Observed(real, extension, options.rows, characters=options.characters)
    exact = ExactNearest(asked.tested)
    source.observe(exact)
    done, began = await store.count(), time.perf_counter()
    measured: dict[str, Any] = {}
    try:
        async for passages, vectors in source.blocks(done):
            for first in range(0, len(passages), 2048):
                await store.add(passages[first : first + 2048], vectors[first : first + 2048])
            done += len(passages)
            if time.perf_counter() - began > options.patience:
                return {"given_up": True, "build_seconds": time.perf_counter() - began, "count": done}
        measured["build_seconds"] = time.perf_counter() - began
        await one_at_a_time(store, asked.tested)
        found, times = await one_at_a_time(store, asked.tested)
        measured |= times | await in_batches(store, asked.tested)
        with np.load(exact_path(options)) as kept:
            measured |= recall(found, kept["rows"])
        return measured | {f"served_{name}": value for name, value in memory().items()}
    finally:
        await store.aclose()


def run(options: argparse.Namespace) -> Mapping[str, Any] | None:
    if options.stage in ("serve", "hold"):
        asked = Asked.load(asked_path(options))
        store = CompactStore(options.index)
        return asyncio.run(_hold(store, asked) if options.stage == "hold" else _serve(options, store, asked))
    real = asyncio.run(real_vectors(options.data, options.work, limit=options.real))
    asked = Asked.of(real, options.questions)
    match options.stage:
        case "prepare":
            return prepare(options, real, asked)
        case "build":
            return build(options, real, asked)
        case "flat":
            return flat(options, real, asked)
        case "chroma":
            return asyncio.run(_chroma(options, real, asked))
    return None


def parser() -> argparse.ArgumentParser:
    """The arguments of a stage."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stage", choices=("prepare", "build", "serve", "hold", "flat", "chroma"))
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--rows", type=int, required=True)
    made.add_argument("--index", type=Path, required=True)
    made.add_argument("--questions", type=int, default=512)
    made.add_argument("--characters", type=int, default=100)
    made.add_argument("--state", choices=("cold", "cold-batches", "warm", "load"), default="warm")
    made.add_argument("--patience", type=float, default=900)
    made.add_argument("--real", type=int, help="take so many real passages, whose vectors are there")
    return made


if __name__ == "__main__":
    result = run(parser().parse_args())
    if result is not None:
        print(json.dumps(result), flush=True)
    os._exit(0) if "chromadb" in sys.modules else None
