"""``eval``: systems over suites, with a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from searchr1_async.config import LocalOptions
from searchr1_async.episodes.dialect import FORMATS
from searchr1_async.episodes.methods import METHODS
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.evaluate import evaluate
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.repeating import repeats
from searchr1_async.evaluation.systems import SystemSource
from searchr1_async.search import Search

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


def add(commands: Parsers) -> None:
    parser = commands.add_parser("eval", help="measure models, checkpoints and runs over question suites")
    add_argument = parser.add_argument
    add_argument(
        "suites",
        nargs="+",
        help="suites: names (nq, hotpotqa, …, benchmarks: all seven), files or folders; or the folder of an evaluation to repeat",
    )
    add_argument(
        "--out-dir", type=Path, required=True, help="the evaluation's folder; the same command goes on with it"
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="LABEL=WEIGHTS",
        help="a run's folder or a tinker:// path under a label (several times); without any: the base model",
    )
    what.add_argument("--untrained", action="store_true", help="the base model besides")
    what.add_argument("--baselines", nargs="+", default=[], choices=METHODS[1:], help="the base model used otherwise")
    what.add_argument("--model", help="the base model")
    what.add_argument("--service", help="URL of a Tinker service")
    what.add_argument("--threads", type=int, help="CPU threads of the embedded service")
    where = parser.add_argument_group("where it searches")
    where.add_argument("--corpus", default="atlas", help="atlas, or a file of passages (%(default)s)")
    where.add_argument("--chroma", metavar="HOST:PORT", help="a Chroma server instead")
    where.add_argument("--collection", default="wiki_embeddings", help="on that server (%(default)s)")
    where.add_argument("--embedder", help="of the index (all-MiniLM-L6-v2; with --chroma gemini-embedding-001)")
    where.add_argument("--results", type=int, default=3, help="passages a query (%(default)s)")
    where.add_argument("--passage-words", type=int, help="words a passage is cut at")
    how = parser.add_argument_group("how")
    how.add_argument("--split", help="of every suite")
    how.add_argument("--limit", type=int, help="questions a suite")
    how.add_argument("--question-seed", type=int, default=0, help="which ones (%(default)s)")
    how.add_argument("--samples", type=int, default=1, help="episodes a question (%(default)s)")
    how.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    how.add_argument("--format", default="hermes", choices=FORMATS, help="tool-call format (%(default)s)")
    how.add_argument("--max-turns", type=int, default=5, help="(%(default)s)")
    how.add_argument("--max-tokens", type=int, default=1024, help="new tokens a turn (%(default)s)")
    how.add_argument("--judge", action="store_true", help="have the base model judge every answer, beside exact match")
    parser.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
    shared = {
        "out_dir": options.out_dir,
        "resume": (options.out_dir / "manifest.json").exists(),
        "service": options.service,
        "local": LocalOptions(threads=options.threads),
    }
    if len(options.suites) == 1 and repeats(options.suites[0]):
        report = await evaluate(options.suites[0], **shared)
    else:
        report = await evaluate(
            options.suites,
            _search(options),
            systems=_systems(options),
            baselines=options.baselines,
            model=options.model,
            split=options.split,
            limit=options.limit,
            question_seed=options.question_seed,
            samples=options.samples,
            temperature=options.temperature,
            seed=options.seed,
            format=options.format,
            max_turns=options.max_turns,
            max_tokens=options.max_tokens,
            judge=Judge() if options.judge else None,
            **shared,
        )
    page = await anyio.to_thread.run_sync(report.save)
    notes = "\n".join(f"- {note}" for note in report.notes())
    return f"\n{report}\n\n{notes}\n\nreport with its episodes: {page}"


def _systems(options: argparse.Namespace) -> dict[str, SystemSource]:
    systems: dict[str, SystemSource] = {"untrained": None} if options.untrained or not options.system else {}
    for text in options.system:
        label, found, weights = text.partition("=")
        if not found or not label.strip() or not weights.strip():
            raise ConfigurationError(f"--system {text!r}: give LABEL=WEIGHTS, such as trained=runs/first")
        if label in systems:
            raise ConfigurationError(f"two systems are called {label!r}: give each its own label")
        systems[label] = weights
    return systems


def _search(options: argparse.Namespace) -> Search:
    settings = {"n_results": options.results, "max_passage_words": options.passage_words}
    if options.chroma is None:
        embedder = {} if options.embedder is None else {"embedder": options.embedder}
        return Search.local(options.corpus, **embedder, **settings)
    host, _, port = options.chroma.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigurationError(f"--chroma {options.chroma!r}: give HOST:PORT, such as localhost:8000")
    embedder = options.embedder or "gemini-embedding-001"
    return Search.chroma(host, int(port), options.collection, embedder=embedder, **settings)


def _stopped(options: argparse.Namespace) -> str:
    return f"Every episode that has ended is kept in {options.out_dir}; the same command goes on."
