"""Commands on models and runs: ``ask``, ``eval``, ``export`` and ``view``.

What they run is imported once they run, so that their help comes quickly.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import anyio.to_thread

from searchr1_async.boundary.paths import path_argument
from searchr1_async.config import AskConfig, EvalConfig, LocalOptions
from searchr1_async.episodes.prompts import METHODS
from searchr1_async.errors import ConfigurationError

if TYPE_CHECKING:
    from searchr1_async.evaluation.plan import SystemSource
    from searchr1_async.runs.weights import Step


def add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=path_argument, help="the run's folder")
    parser.add_argument("question", help="in quotes")
    parser.add_argument("--step", type=_step, default="last", help="last, best, or a number of steps (%(default)s)")
    _add_service(parser)
    parser.set_defaults(run=_ask, stopped=lambda options: "Nothing was written.")


async def _ask(options: argparse.Namespace) -> str:
    from searchr1_async.runs.ask import ask

    config = AskConfig(threads=options.threads)
    return str(
        await ask(
            options.question, None, config, checkpoint=options.run_folder, step=options.step, service=options.service
        )
    )


def add_eval(parser: argparse.ArgumentParser) -> None:
    add_argument = parser.add_argument
    add_argument(
        "suites",
        nargs="+",
        help="suites: names (nq, hotpotqa, …, benchmarks for all seven), files or folders; or an evaluation's folder to repeat",
    )
    add_argument(
        "--out-dir", type=path_argument, required=True, help="the evaluation's folder; the same command resumes it"
    )
    add_argument(
        "--system",
        action="append",
        default=[],
        metavar="LABEL=WEIGHTS",
        help="label and run folder or tinker:// path (repeatable); default: the base model",
    )
    add_argument("--untrained", action="store_true", help="add the base model")
    add_argument("--baselines", nargs="+", choices=METHODS[1:], help="add baselines that use the base model")
    add_argument("--model", help="the base model")
    _add_service(parser)
    add_argument(
        "--search",
        help="a corpus, the folder of an index, or the URL of `searchr1 serve` or of Chroma (that of the evaluated runs)",
    )
    add_argument("--limit", type=int, help="questions per suite")
    add_argument("--samples", type=int, help="episodes per question (1)")
    add_argument("--config", type=path_argument, help="a TOML file with any other setting of EvalConfig")
    add_argument("--judge", action="store_true", help="let the base model judge answers, in addition to exact match")
    parser.set_defaults(
        run=_eval,
        stopped=lambda options: f"Finished episodes are kept in {options.out_dir}; run the same command to resume.",
    )


async def _eval(options: argparse.Namespace) -> str:
    from searchr1_async.evaluation.evaluate import evaluate, repeats
    from searchr1_async.evaluation.judge import Judge
    from searchr1_async.search.search import Search

    config = EvalConfig() if options.config is None else EvalConfig.load(options.config)
    given = {name: getattr(options, name) for name in ("baselines", "model", "threads", "limit", "samples")}
    suites = options.suites[0] if len(options.suites) == 1 else options.suites
    report = await evaluate(
        suites,
        None if options.search is None else await Search.open(options.search),
        _systems(options) or (None if isinstance(suites, str) and repeats(suites) else {"untrained": None}),
        config.replace(**{name: value for name, value in given.items() if value is not None}),
        service=options.service,
        out_dir=options.out_dir,
        resume=(options.out_dir / "manifest.json").exists(),
        judge=Judge() if options.judge else None,
    )
    page = await anyio.to_thread.run_sync(report.save)
    notes = "\n".join(f"- {note}" for note in report.notes())
    return f"\n{report}\n\n{notes}\n\nreport with its episodes: {page}"


def _systems(options: argparse.Namespace) -> dict[str, SystemSource] | None:
    """The systems by label; None if none is named."""
    systems: dict[str, SystemSource] = {"untrained": None} if options.untrained else {}
    for text in options.system:
        label, found, weights = text.partition("=")
        if not found or not label.strip() or not weights.strip():
            raise ConfigurationError(f"--system {text!r}: expected LABEL=WEIGHTS, such as trained=runs/first")
        if label in systems:
            raise ConfigurationError(f"two systems are called {label!r}: give each --system its own label")
        systems[label] = weights
    return systems or None


def add_export(parser: argparse.ArgumentParser) -> None:
    add_argument = parser.add_argument
    add_argument("source", metavar="RUN", help="a run's folder, or a tinker://RUN/weights/NAME path")
    add_argument("folder", type=path_argument, metavar="FOLDER", help="output folder; must be missing or empty")
    add_argument("--step", type=_step, default="last", help="for a run: last, best, or an optimizer step (%(default)s)")
    add_argument(
        "--format", choices=("peft", "merged"), default="peft", help="a LoRA adapter, or the whole model (%(default)s)"
    )
    add_argument(
        "--push-to-hub", metavar="NAME", help="also upload to this Hugging Face repository, private if it is new"
    )
    _add_service(parser)
    parser.set_defaults(run=_export, stopped=lambda options: f"Nothing was written to {options.folder}.")


async def _export(options: argparse.Namespace) -> str:
    from searchr1_async.runs.export import export
    from searchr1_async.watch.views import ConsoleView

    async with ConsoleView() as progress:
        folder = await export(
            options.source,
            options.folder,
            step=options.step,
            format=options.format,
            push_to_hub=options.push_to_hub,
            service=options.service,
            local=LocalOptions(threads=options.threads),
            on_event=progress,
        )
    return f"{folder} contains the weights; its README.md explains how to load them."


def add_view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=path_argument, help="the run's folder")
    parser.add_argument("--out", type=path_argument, help="output file (view.html in the run's folder)")
    parser.set_defaults(
        run=_view,
        stopped=lambda options: "The page is written atomically; run the same command again if it is missing.",
    )


async def _view(options: argparse.Namespace) -> str:
    from searchr1_async.watch.episodes_page import view_run

    path = await anyio.to_thread.run_sync(view_run, options.run_folder, options.out)
    return f"{path}: {path.stat().st_size / 1e6:,.1f} MB; open it in a browser"


def _add_service(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--service", help="URL of a Tinker service")
    parser.add_argument("--threads", type=int, help="CPU threads of the embedded service (all cores)")


def _step(text: str) -> Step:
    from searchr1_async.runs.weights import parse_step

    if (step := parse_step(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected last, best, or a number of steps")
    return step
