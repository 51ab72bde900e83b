"""What a compact index costs on real passages and real questions: answers found in the top 3, and a small model's exact match.

    pip install wordllama
    python -m benchmarks compact_real --data FOLDER --work FOLDER [--run FOLDER]

Both against exact search over the same vectors: answers with the 768 numbers of benchmarks/shared/real_vectors.py, by suite, over all
questions that the corpus answers and that the index was not calibrated with; exact match with the run that benchmarks/evaluation
trained (`--run`, its folder `run`), with that run's own embedder, each question played with both searches, always by the likeliest
tokens, so that only what was found can differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import searchr1_async as sr
from benchmarks.evaluation.questions import PLAYING, answerable
from benchmarks.evaluation.questions import SUITES as SPLITS
from benchmarks.shared.extended_vectors import ExtendedVectors, Extension, kept_neighbours
from benchmarks.shared.real_vectors import SUITES, RealVectors, holds_answer, nearest, read_corpus, real_vectors
from benchmarks.shared.report import write_result
from benchmarks.shared.wordllama_embedder import WordLlamaEmbedder
from searchr1_async import Passage
from searchr1_async.search import CompactStore, Found, Vectors, build_compact_index
from searchr1_async.search.passage_embedding import passage_text

CALIBRATING = 500


class ExactStore:
    """Every passage compared with every query, in memory.

    Args:
        passages: row by row.
        vectors: ``[passages, dimension]``, of length 1.
    """

    name, fingerprint, max_queries, max_requests = "exact", "exact", 256, 1

    def __init__(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        self._passages, self._vectors = passages, vectors
        self.dimension = vectors.shape[1]

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def count(self) -> int:
        return len(self._passages)

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        scores = vectors @ self._vectors.T
        return tuple(
            tuple(
                Passage(p.id, p.title, p.text, float(row[place]))
                for place in np.argsort(-row, kind="stable")[:n_results]
                for p in (self._passages[place],)
            )
            for row in scores
        )


async def answers_found(real: RealVectors, work: Path) -> list[dict[str, Any]]:
    """For each suite, how often the answer is in the top 3, exact and compact."""
    order = np.random.default_rng(4).permutation(len(real.questions))
    tested = [int(number) for number in order[CALIBRATING:] if real.questions[number].metadata.get("answerable")]
    extension = Extension(real.vectors, await asyncio.to_thread(kept_neighbours, real.vectors, work))
    source = ExtendedVectors(real, extension, len(real.vectors), characters=None)
    folder = work / f"real-{len(real.vectors)}"
    print(await build_compact_index(source, folder, queries=real.queries[order[:CALIBRATING]]), file=sys.stderr)
    exact = await asyncio.to_thread(nearest, real.queries[tested], real.vectors, 3)
    store = CompactStore(folder)
    await store.open()
    compact: list[list[int]] = []
    for first in range(0, len(tested), 128):
        found = await store.query(real.queries[tested[first : first + 128]], 3)
        compact += [[int(passage.id) for passage in passages] for passages in found]
    await store.aclose()
    rows: list[dict[str, Any]] = []
    for suite in SUITES:
        own = [place for place, number in enumerate(tested) if real.questions[number].data_source == suite]
        right = {
            name: [holds_answer(real.questions[tested[at]], [real.passages[row] for row in found[at]]) for at in own]
            for name, found in (("exact", exact.tolist()), ("compact", compact))
        }
        same = np.mean([len(set(exact[at].tolist()) & set(compact[at])) / 3 for at in own])
        rows.append(
            {
                "suite": suite,
                "questions": len(own),
                "exact": float(np.mean(right["exact"])),
                "compact": float(np.mean(right["compact"])),
                "gained": sum(b and not a for a, b in zip(right["exact"], right["compact"], strict=True)),
                "lost": sum(a and not b for a, b in zip(right["exact"], right["compact"], strict=True)),
                "recall_at_3": float(same),
            }
        )
    return rows


async def exact_match(options: argparse.Namespace) -> dict[str, Any]:
    """The trained run's exact match with both searches, paired by question."""
    embedder = WordLlamaEmbedder()
    await embedder.open()
    passages = read_corpus(options.data)
    vectors = await embedder.embed_passages([passage_text(passage) for passage in passages])
    folder = options.work / "real-wordllama"
    asked = {
        suite: answerable(options.data, suite, split, training=False)[: options.limit]
        for suite, split in SPLITS.items()
    }
    others = [
        question.question
        for suite, split in SPLITS.items()
        for question in answerable(options.data, suite, split, training=False)[options.limit : options.limit + 100]
    ]
    print(await build_compact_index(options.data / "corpus.parquet", folder, embedder=embedder, queries=others))
    stores = {"exact": ExactStore(passages, vectors), "compact": CompactStore(folder)}
    measured: dict[str, sr.evaluation.Evaluation] = {}
    for name, store in stores.items():
        search = sr.Search(WordLlamaEmbedder(), store, n_results=1, max_passage_words=40)
        report = await sr.evaluate(
            asked, search, {name: options.run}, sr.EvalConfig(temperature=0.0, **PLAYING), progress="plain"
        )
        measured[name] = report[name]
    gain = sr.evaluation.compare(measured["exact"], measured["compact"])
    return {
        "questions": sum(len(questions) for questions in asked.values()),
        "difference": gain.mean,
        "low": gain.interval[0],
        "high": gain.interval[1],
        "p_value": gain.p_value,
        "gained": gain.improved,
        "lost": gain.worsened,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a suite, and whether it is within a point."""
    lines = [
        "| suite | questions | answer in the top 3: exact | compact | difference | gained, lost | recall@3 | within 1 point |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        differs = row["compact"] - row["exact"]
        lines.append(
            f"| {row['suite']} | {row['questions']:,} | {row['exact']:.1%} | {row['compact']:.1%} | {100 * differs:+.2f} points "
            f"| {row['gained']}, {row['lost']} | {row['recall_at_3']:.3f} | {'yes' if abs(differs) <= 0.01 else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="a trained run, for exact match")
    parser.add_argument("--limit", type=int, default=40, help="questions a suite that the model is asked")
    parser.add_argument(
        "--real", type=int, help="so many passages, whose vectors are there; default: all, computed first"
    )
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args()
    real = asyncio.run(real_vectors(options.data, options.work, limit=options.real))
    rows = asyncio.run(answers_found(real, options.work))
    body = [table(rows)]
    print(body[0])
    if options.run is not None:
        played = asyncio.run(exact_match(options))
        print(json.dumps(played))
        body.append(
            f"A small model (SmolLM2-135M, trained by benchmarks/evaluation) on {played['questions']} questions, each played with both "
            f"searches: exact match with the compact index less that with exact search {100 * played['difference']:+.2f} points "
            f"[{100 * played['low']:+.2f}, {100 * played['high']:+.2f}], {played['gained']} questions better and {played['lost']} worse."
        )
        rows.append(
            {
                "suite": "exact match of the model",
                "questions": played["questions"],
                "gained": played["gained"],
                "lost": played["lost"],
                "difference": played["difference"],
                "low": played["low"],
                "high": played["high"],
            }
        )
    if options.keep:
        title = "The compact index on real passages and questions"
        write_result("compact_real", title, body, pl.DataFrame(rows, infer_schema_length=None))
