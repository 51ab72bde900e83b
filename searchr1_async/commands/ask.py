"""``ask``: one question to a trained model."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from searchr1_async.boundary.paths import path_argument
from searchr1_async.commands.searching import add_search, named_search, step_argument
from searchr1_async.config import AskConfig
from searchr1_async.episodes.table import storable
from searchr1_async.runs.ask import ask

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers
    from searchr1_async.runs.ask import Answer


def add(commands: Parsers) -> None:
    parser = commands.add_parser("ask", help="ask a trained model one question")
    parser.add_argument("run_folder", metavar="RUN", type=path_argument, help="the run's folder")
    parser.add_argument("question", help="in quotes")
    parser.add_argument(
        "--step", type=step_argument, default="last", help="last, best, or a number of steps (%(default)s)"
    )
    parser.add_argument("--service", help="URL of the Tinker service that has the weights")
    parser.add_argument("--threads", type=int, help="CPU threads of the embedded service")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, 1 as in training (%(default)s)")
    parser.add_argument("--seed", type=int, help="sampling seed")
    parser.add_argument("--max-turns", type=int, help="(as in training)")
    parser.add_argument("--max-tokens", type=int, help="new tokens per turn (as in training)")
    parser.add_argument("--json", action="store_true", help="question, answer, searches and passages as JSON")
    add_search(parser.add_argument_group("search (default: as in training)"))
    parser.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
    answer = await ask(
        options.question,
        named_search(options),
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


def _stopped(options: argparse.Namespace) -> str:
    return "Nothing was written."
