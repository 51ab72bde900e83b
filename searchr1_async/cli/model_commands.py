"""Commands on models and runs: ``ask``, ``eval``, ``export`` and ``view``.

What they run is imported once they run, so that their help comes quickly.
"""

from __future__ import annotations

import argparse
import json
import webbrowser
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path, path_argument
from searchr1_async.config import AskConfig, EvalConfig, LocalOptions
from searchr1_async.episodes.formats import FORMATS
from searchr1_async.episodes.prompts import METHODS
from searchr1_async.errors import ConfigurationError

if TYPE_CHECKING:
    from searchr1_async.evaluation.systems import SystemSource
    from searchr1_async.runs.ask import Answer
    from searchr1_async.runs.weights import Step
    from searchr1_async.search.search import Search

_SEARCH = ("corpus", "chroma", "collection", "embedder", "results", "passage_words")


def add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=path_argument, help="the run's folder")
    parser.add_argument("question", help="in quotes")
    parser.add_argument("--step", type=_step, default="last", help="last, best, or a number of steps (%(default)s)")
    parser.add_argument("--service", help="URL of the Tinker service that has the weights")
    parser.add_argument("--threads", type=int, help="CPU threads of the embedded service")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, 1 as in training (%(default)s)")
    parser.add_argument("--seed", type=int, help="sampling seed")
    parser.add_argument("--max-turns", type=int, help="(as in training)")
    parser.add_argument("--max-tokens", type=int, help="new tokens per turn (as in training)")
    parser.add_argument("--json", action="store_true", help="question, answer, searches and passages as JSON")
    _add_search(parser.add_argument_group("search (default: as in training)"))
    parser.set_defaults(run=_ask, stopped=_ask_stopped)


async def _ask(options: argparse.Namespace) -> str:
    from searchr1_async.runs.ask import ask

    answer = await ask(
        options.question,
        _named_search(options),
        AskConfig(
            temperature=options.temperature,
            seed=options.seed,
            max_turns=options.max_turns,
            max_tokens=options.max_tokens,
            threads=options.threads,
        ),
        checkpoint=options.run_folder,
        step=options.step,
        service=options.service,
    )
    return _json(answer) if options.json else str(answer)


def _json(answer: Answer) -> str:
    from searchr1_async.episodes.table import storable

    values = {
        "question": answer.question,
        "answer": answer.answer,
        "stop_reason": answer.episode.stop_reason.value,
        "step": answer.step,
        "checkpoint": answer.checkpoint,
        "searches": [
            {
                "queries": call.queries,
                "problem": call.problem,
                "passages": [
                    [{"id": each.id, "title": each.title, "text": each.text, "score": each.score} for each in found]
                    for found in call.results
                ],
            }
            for call in answer.searches
        ],
    }
    return storable(json.dumps(values, ensure_ascii=False, indent=1))


def _ask_stopped(options: argparse.Namespace) -> str:
    return "Nothing was written."


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
    _add_search(parser.add_argument_group("search (default: that of the evaluated runs, else atlas)"))
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
    parser.set_defaults(run=_eval, stopped=_eval_stopped)


async def _eval(options: argparse.Namespace) -> str:
    from searchr1_async.evaluation.evaluate import evaluate
    from searchr1_async.evaluation.job_manifest import repeats
    from searchr1_async.evaluation.judge import Judge

    is_repetition = len(options.suites) == 1 and repeats(options.suites[0])
    systems = None if is_repetition and not _names_systems(options) else _systems(options)
    search = _named_search(options)
    if search is None and not is_repetition and not any(map(_keeps_search, (systems or {}).values())):
        search = _search_of(options)
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
    from searchr1_async.runs.weights import SEARCH_FILE

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


def _eval_stopped(options: argparse.Namespace) -> str:
    return f"Finished episodes are kept in {options.out_dir}; run the same command to resume."


def add_export(parser: argparse.ArgumentParser) -> None:
    add_argument = parser.add_argument
    add_argument("source", metavar="RUN", help="a run's folder, or a tinker://RUN/weights/NAME path")
    add_argument("folder", type=path_argument, metavar="FOLDER", help="output folder; must be missing or empty")
    add_argument(
        "--step",
        type=_step,
        default="last",
        help="for a run: last, best, or an optimiser step (%(default)s)",
    )
    add_argument(
        "--format", choices=("peft", "merged"), default="peft", help="a LoRA adapter, or the whole model (%(default)s)"
    )
    add_argument("--base-model", help="hub name or folder of the base model (the run's)")
    add_argument("--push-to-hub", metavar="NAME", help="also upload to this Hugging Face repository")
    add_argument("--public", action="store_true", help="make a newly created repository public")
    add_argument("--service", help="URL of a Tinker service")
    add_argument("--service-folder", type=path_argument, help="the embedded service's folder with a tinker:// path")
    add_argument("--threads", type=int, help="CPU threads of the embedded service")
    parser.set_defaults(run=_export, stopped=_export_stopped)


async def _export(options: argparse.Namespace) -> str:
    from searchr1_async.runs.export import export
    from searchr1_async.watch.dashboard import console_view

    async with console_view() as progress:
        folder = await export(
            options.source,
            options.folder,
            step=options.step,
            format=options.format,
            base_model=options.base_model,
            push_to_hub=options.push_to_hub,
            private=not options.public,
            service=options.service,
            service_folder=options.service_folder,
            local=LocalOptions(threads=options.threads),
            emit=progress,
        )
    return f"{folder} contains the weights; its README.md explains how to load them."


def _export_stopped(options: argparse.Namespace) -> str:
    return f"Nothing was written to {options.folder}."


def add_view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=path_argument, help="the run's folder")
    parser.add_argument("--out", type=path_argument, help="output file (view.html in the run's folder)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument("--step", type=int, nargs="+", metavar="N", help="only these training steps")
    parser.add_argument("--evaluation", nargs="+", metavar="LABEL", help='only these evaluations ("after RL")')
    parser.add_argument("--limit", type=int, metavar="N", help="maximum episodes, spread over steps and evaluations")
    parser.set_defaults(run=_view, stopped=_view_stopped)


async def _view(options: argparse.Namespace) -> str:
    from searchr1_async.watch.viewer import view_run

    if options.limit is not None and options.limit < 1:
        raise ConfigurationError(f"--limit is {options.limit}: it must be at least 1")
    path = await anyio.to_thread.run_sync(
        lambda: view_run(
            options.run_folder, options.out, steps=options.step, labels=options.evaluation, limit=options.limit
        )
    )
    if options.open:
        await anyio.to_thread.run_sync(webbrowser.open, path.resolve().as_uri())
    return f"{path}: {path.stat().st_size / 1e6:,.1f} MB; open it in a browser"


def _view_stopped(options: argparse.Namespace) -> str:
    return "The page is written atomically; run the same command again if it is missing."


def _add_search(group: Any) -> None:
    """Adds search options to a parser or group, without defaults: recorded settings apply if none is given."""
    group.add_argument("--corpus", help="atlas, or a file of passages (atlas)")
    group.add_argument("--chroma", metavar="HOST:PORT", help="a Chroma server instead")
    group.add_argument("--collection", help="collection on that server (wiki_embeddings)")
    group.add_argument(
        "--embedder", help="embedder of the index (all-MiniLM-L6-v2; with --chroma gemini-embedding-001)"
    )
    group.add_argument("--results", type=int, help="passages per query (3)")
    group.add_argument("--passage-words", type=int, help="maximum words per passage")


def _named_search(options: argparse.Namespace) -> Search | None:
    """The search from the options, or None if no option is set. Errors as :meth:`Search.local` and :meth:`Search.chroma`."""
    return _search_of(options) if any(getattr(options, name) is not None for name in _SEARCH) else None


def _search_of(options: argparse.Namespace) -> Search:
    """The search from the options and defaults; errors as :func:`_named_search`."""
    from searchr1_async.search.places import SearchOptions
    from searchr1_async.search.search import Search

    settings = SearchOptions()
    if options.results is not None:
        settings["n_results"] = options.results
    if options.passage_words is not None:
        settings["max_passage_words"] = options.passage_words
    if options.chroma is None:
        embedder = {} if options.embedder is None else {"embedder": options.embedder}
        return Search.local("atlas" if options.corpus is None else options.corpus, **embedder, **settings)
    host, _, port = options.chroma.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigurationError(f"--chroma {options.chroma!r}: expected HOST:PORT, such as localhost:8000")
    embedder, collection = options.embedder or "gemini-embedding-001", options.collection or "wiki_embeddings"
    return Search.chroma(host, int(port), collection, embedder=embedder, **settings)


def _step(text: str) -> Step:
    from searchr1_async.runs.weights import parse_step

    if (step := parse_step(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected last, best, or a number of steps")
    return step
