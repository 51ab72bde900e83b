"""``eval``: systems over suites, with a report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path, path_argument
from searchr1_async.commands.searching import add_search, named_search, search_of
from searchr1_async.config import LocalOptions
from searchr1_async.episodes.dialect import FORMATS
from searchr1_async.episodes.methods import METHODS
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.evaluate import evaluate
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.repeating import repeats
from searchr1_async.evaluation.systems import SystemSource
from searchr1_async.trained import SEARCH_FILE

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
        "--out-dir", type=path_argument, required=True, help="the evaluation's folder; the same command goes on with it"
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
    add_search(parser.add_argument_group("where it searches (as the runs that are measured, else atlas)"))
    how = parser.add_argument_group("how")
    how.add_argument("--split", help="of every suite")
    how.add_argument("--limit", type=int, help="questions a suite")
    how.add_argument("--question-seed", type=int, default=0, help="which ones (%(default)s)")
    how.add_argument("--samples", type=int, default=1, help="episodes a question (%(default)s)")
    how.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    trained = "as a run was trained, else"
    how.add_argument("--format", choices=FORMATS, help=f"tool-call format ({trained} hermes)")
    how.add_argument(
        "--thinking",
        type=_thinking,
        help=f"on, off, or an effort such as low, as far as the model has them ({trained} off)",
    )
    how.add_argument("--max-turns", type=int, help=f"({trained} 5)")
    how.add_argument("--max-tokens", type=int, help=f"new tokens a turn ({trained} 1024)")
    how.add_argument("--judge", action="store_true", help="have the base model judge every answer, beside exact match")
    parser.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
    is_repetition = len(options.suites) == 1 and repeats(options.suites[0])
    systems = None if is_repetition and not _names_systems(options) else _systems(options)
    search = named_search(options)
    if search is None and not is_repetition and not any(map(_keeps_search, (systems or {}).values())):
        search = search_of(options)
    # What a repetition may not be given is refused by evaluate(), by name.
    report = await evaluate(
        options.suites[0] if is_repetition else options.suites,
        search,
        systems=systems,
        baselines=options.baselines,
        model=options.model,
        service=options.service,
        out_dir=options.out_dir,
        resume=(options.out_dir / "manifest.json").exists(),
        split=options.split,
        limit=options.limit,
        question_seed=options.question_seed,
        samples=options.samples,
        judge=Judge() if options.judge else None,
        format=options.format,
        thinking=options.thinking,
        max_turns=options.max_turns,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        local=LocalOptions(threads=options.threads),
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
            raise ConfigurationError(f"--system {text!r}: give LABEL=WEIGHTS, such as trained=runs/first")
        if label in systems:
            raise ConfigurationError(f"two systems are called {label!r}: give each its own label")
        systems[label] = weights
    return systems


def _stopped(options: argparse.Namespace) -> str:
    return f"Every episode that has ended is kept in {options.out_dir}; the same command goes on."
