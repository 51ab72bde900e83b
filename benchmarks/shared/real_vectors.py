"""Real vectors of 768 numbers, of real passages and real questions, made on this machine without a hub.

No model of 768 numbers comes by `pip` alone. So two real models stand side by side, each part of length 1 times its weight, and
the whole of length 1: all-MiniLM-L6-v2 of title and text (384 numbers), WordLlama of title and text (256), and the first 128 of
WordLlama's 256 numbers of the title. A question's text stands in all three parts. Needs `pip install wordllama`.

The data folder holds `corpus.parquet`, the questions of five suites, and transcripts (`search_r1_traces.jsonl.gz`), whose retrieved
passages are further real text. MiniLM takes an hour or two for the 57,000 passages on two cores; finished vectors are kept in the
work folder, 1,024 passages a file.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

import searchr1_async as sr
from benchmarks.shared.wordllama_embedder import WordLlamaEmbedder
from searchr1_async import Passage
from searchr1_async.episodes.rewards import normalize_answer
from searchr1_async.search import Embedder, SentenceTransformerEmbedder, Vectors

SUITES = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa")
WEIGHTS = (0.85, 0.45, 0.25)
"""Of the three parts: see the table in benchmarks/results/compact_vectors.md."""
TITLE_NUMBERS = 128
DIMENSION = 768
_SHARD = {"questions": 2048, "corpus": 1024, "extra": 1024}
_RETRIEVED = re.compile(r"Doc \d+\s*\(Title: ?\\?\"?(.*?)\\?\"?\) (.*?)(?=\\nDoc \d+|\\n*</information>)", re.S)


@dataclass(frozen=True)
class RealVectors:
    """Passages and questions with their vectors, row by row."""

    passages: Sequence[Passage]
    vectors: Vectors
    """``[passages, 768]``, of length 1."""
    questions: Sequence[sr.Question]
    queries: Vectors
    """``[questions, 768]``, of length 1."""


@dataclass(frozen=True)
class Parts:
    """The vectors of each model, not weighted yet."""

    minilm: Vectors
    wordllama: Vectors
    title: Vectors

    def joined(self, weights: Sequence[float]) -> Vectors:
        whole = np.concatenate(
            [w * part for w, part in zip(weights, (self.minilm, self.wordllama, self.title), strict=True)], axis=1
        )
        return _of_length_1(whole)


async def real_vectors(
    data: Path, work: Path, *, weights: Sequence[float] = WEIGHTS, limit: int | None = None
) -> RealVectors:
    """All real passages and questions; computes what `work` does not hold yet.

    Args:
        data: folder of passages and questions.
        work: keeps vectors, in its folder ``real``.
        weights: of the three parts.
        limit: passages, at most, of those whose vectors `work` holds; None takes all, and computes what it does not hold.
    """
    passages, questions, of_passages, of_questions = await embedded_parts(data, work, compute=limit is None)
    joined = of_passages.joined(weights)[:limit]
    return RealVectors(passages[:limit], joined, questions, of_questions.joined(weights))


async def embedded_parts(
    data: Path, work: Path, *, compute: bool
) -> tuple[list[Passage], list[sr.Question], Parts, Parts]:
    folder = work / "real"
    folder.mkdir(parents=True, exist_ok=True)
    corpus, extra, questions = read_corpus(data), read_extra(data), read_questions(data)
    asked = [question.question for question in questions]
    minilm = SentenceTransformerEmbedder() if compute else None
    try:
        shards = {
            name: await _embedded(folder, name, texts, minilm)
            for name, texts in (
                ("questions", asked),
                ("corpus", [whole_text(passage) for passage in corpus]),
                ("extra", [whole_text(passage) for passage in extra]),
            )
        }
    finally:
        if minilm is not None:
            await minilm.aclose()
    passages = corpus[: len(shards["corpus"])] + extra[: len(shards["extra"])]
    texts = await _words(folder, [whole_text(passage) for passage in corpus + extra])
    chosen = np.r_[: len(shards["corpus"]), len(corpus) : len(corpus) + len(shards["extra"])]
    titles = await _words(folder, [passage.title or passage.text for passage in passages], "titles")
    queries = await _words(folder, asked, "questions")
    return (
        passages,
        questions[: len(shards["questions"])],
        Parts(np.concatenate([shards["corpus"], shards["extra"]]), texts[chosen], _title_part(titles)),
        Parts(shards["questions"], queries[: len(shards["questions"])], _title_part(queries)),
    )


def whole_text(passage: Passage) -> str:
    """What is embedded of a passage."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def read_corpus(data: Path) -> list[Passage]:
    """The passages of the corpus, in its order."""
    rows = pl.read_parquet(data / "corpus.parquet", columns=["id", "title", "text"]).iter_rows()
    return [Passage(own_id, title or "", text) for own_id, title, text in rows]


def read_extra(data: Path) -> list[Passage]:
    """The passages in the transcripts, as they were retrieved, that the corpus does not have word for word."""
    seen = {whole_text(passage) for passage in read_corpus(data)}
    found: list[Passage] = []
    with gzip.open(data / "search_r1_traces.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            for title, text in _RETRIEVED.findall(json.dumps(json.loads(line), ensure_ascii=False)):
                passage = Passage(f"trace-{len(found)}", title, text)
                if len(text) > 200 and whole_text(passage) not in seen:
                    seen.add(whole_text(passage))
                    found.append(passage)
    return found


def read_questions(data: Path) -> list[sr.Question]:
    """The questions of all suites and splits."""
    return [question for suite in SUITES for question in sr.load_questions(data / f"{suite}.jsonl")]


async def _embedded(folder: Path, name: str, texts: Sequence[str], embedder: Embedder | None) -> Vectors:
    """MiniLM's vectors, in files of some rows each; without an embedder only those up to the first file that is missing."""
    parts: list[Vectors] = []
    for start in range(0, len(texts), _SHARD[name]):
        path = folder / f"{name}-{start:06d}.npy"
        if not path.exists():
            if embedder is None:
                break
            await embedder.open()
            part = list(texts[start : start + _SHARD[name]])
            vectors = await (embedder.embed_queries if name == "questions" else embedder.embed_passages)(part)
            _keep(path, vectors)
            print(f"{name}: {start + len(part):,} of {len(texts):,}", file=sys.stderr, flush=True)
        parts.append(np.load(path))
    return np.concatenate(parts) if parts else np.empty((0, 384), np.float32)


async def _words(folder: Path, texts: Sequence[str], name: str = "passages") -> Vectors:
    """WordLlama's vectors, 1,600 passages a second."""
    path = folder / f"wordllama-{name}-{len(texts)}.npy"
    if path.exists():
        return np.load(path)
    embedder = WordLlamaEmbedder()
    await embedder.open()
    vectors = await embedder.embed_passages(texts)
    _keep(path, vectors)
    return vectors


def _keep(path: Path, vectors: Vectors) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, vectors)
    temporary.replace(path)


def _title_part(vectors: Vectors) -> Vectors:
    """WordLlama was trained so that its first numbers are a vector by themselves (Matryoshka)."""
    return _of_length_1(vectors[:, :TITLE_NUMBERS])


def _of_length_1(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return (vectors / lengths).astype(np.float32)


# --- whether the answer is found ------------------------------------------------------------------------------------------


def holds_answer(question: sr.Question, passages: Sequence[Passage]) -> bool:
    """Whether a golden answer stands in one of them as whole words, normalised as in evaluation."""
    answers = [words for answer in question.golden_answers if (words := normalize_answer(answer))]
    texts = [f" {normalize_answer(f'{passage.title} {passage.text}')} " for passage in passages]
    return any(f" {answer} " in text for answer in answers for text in texts)


def nearest(queries: Vectors, vectors: Vectors, results: int) -> np.ndarray:
    """The rows nearest by inner product, ``[queries, results]``, by comparing with all."""
    import faiss

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(np.ascontiguousarray(vectors))
    return flat.search(np.ascontiguousarray(queries), results)[1]
