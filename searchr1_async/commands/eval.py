"""``eval``: evaluates systems on suites and writes a report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path, path_argument
from searchr1_async.commands.searching import add_search, named_search, search_of
from searchr1_async.config import EvalConfig
from searchr1_async.episodes.formats import FORMATS
from searchr1_async.episodes.prompts import METHODS
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.evaluate import evaluate
from searchr1_async.evaluation.job_manifest import repeats
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.systems import SystemSource
from searchr1_async.runs.weights import SEARCH_FILE

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


def add(commands: Parsers) -> None:
    parser = commands.add_parser("eval", help="evaluate models, checkpoints and runs on question suites")
    add_argument = parser.add_argument
    add_argument(
        "suites",
        nargs="+",
        help="suites: names (nq, hotpotqa, …, benchmarks for all seven), files or folders; or an evaluation's folder to repeat",
    )
    add_argument(
        "--out-dir", type=path_argument, required=True, help="the evaluation's folder; the same command resumes it"
    )
    what = parser.add_argument_group("systems")
    what.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="LABEL=WEIGHTS",
        help="label and run folder or tinker:// path (repeatable); default: the base model",
    )
    what.add_argument("--untrained", action="store_true", help="add the base model")
    what.add_argument(
        "--baselines", nargs="+", default=[], choices=METHODS[1:], help="add baselines that use the base model"
    )
    what.add_argument("--model", help="the base model")
    what.add_argument("--service", help="URL of a Tinker service")
    what.add_argument("--threads", type=int, help="CPU threads of the embedded service")
    add_search(parser.add_argument_group("search (default: that of the evaluated runs, else atlas)"))
    how = parser.add_argument_group("settings")
    how.add_argument("--split", help="split of every suite")
    how.add_argument("--limit", type=int, help="questions per suite")
    how.add_argument("--question-seed", type=int, default=0, help="selects the questions (%(default)s)")
    how.add_argument("--samples", type=int, default=1, help="episodes per question (%(default)s)")
    how.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    how.add_argument("--seed", type=int, default=0, help="sampling seed (%(default)s)")
    trained = "as in the run's training, else"
    how.add_argument("--format", choices=FORMATS, help=f"tool-call format ({trained} hermes)")
    how.add_argument(
        "--thinking",
        type=_thinking,
        help=f"on, off, or an effort such as low, if the model supports it ({trained} off)",
    )
    how.add_argument("--max-turns", type=int, help=f"({trained} 5)")
    how.add_argument("--max-tokens", type=int, help=f"new tokens per turn ({trained} 1024)")
    how.add_argument(
        "--judge", action="store_true", help="let the base model judge answers, in addition to exact match"
    )
    parser.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
    is_repetition = len(options.suites) == 1 and repeats(options.suites[0])
    systems = None if is_repetition and not _names_systems(options) else _systems(options)
    search = named_search(options)
    if search is None and not is_repetition and not any(map(_keeps_search, (systems or {}).values())):
        search = search_of(options)
    # evaluate() refuses arguments that a repetition does not accept.
    report = await evaluate(
        options.suites[0] if is_repetition else options.suites,
        search,
        systems,
        EvalConfig(
            baselines=options.baselines,
            model=options.model,
            split=options.split,
            limit=options.limit,
            question_seed=options.question_seed,
            samples=options.samples,
            format=options.format,
            thinking=options.thinking,
            max_turns=options.max_turns,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed,
            threads=options.threads,
        ),
        service=options.service,
        out_dir=options.out_dir,
        resume=(options.out_dir / "manifest.json").exists(),
        judge=Judge() if options.judge else None,
    )
    page = await anyio.to_thread.run_sync(report.save)
    notes = "\n".join(f"- {note}" for note in report.notes())
    return f"\n{report}\n\n{notes}\n\nreport with its episodes: {page}"


def _keeps_search(weights: SystemSource) -> bool:
    return isinstance(weights, str) and (absolute_path(weights) / SEARCH_FILE).is_file()


def _thinking(text: str) -> bool | str:
    return {"on": True, "off": False}.get(text, text)


def _names_systems(options: argparse.Namespace) -> bool:
    return options.untrained or bool(options.system)


def _systems(options: argparse.Namespace) -> dict[str, SystemSource]:
    systems: dict[str, SystemSource] = {"untrained": None} if options.untrained or not options.system else {}
    for text in options.system:
        label, found, weights = text.partition("=")
        if not found or not label.strip() or not weights.strip():
            raise ConfigurationError(f"--system {text!r}: expected LABEL=WEIGHTS, such as trained=runs/first")
        if label in systems:
            raise ConfigurationError(f"two systems are called {label!r}: use unique labels")
        systems[label] = weights
    return systems


def _stopped(options: argparse.Namespace) -> str:
    return f"Finished episodes are kept in {options.out_dir}; run the same command to resume."
