"""``view``: writes an HTML page of a run's episodes."""

from __future__ import annotations

import argparse
import webbrowser
from typing import TYPE_CHECKING

import anyio.to_thread

from searchr1_async.boundary.paths import path_argument
from searchr1_async.errors import ConfigurationError
from searchr1_async.watch.viewer import view_run

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


def add(commands: Parsers) -> None:
    view = commands.add_parser("view", help="write an HTML page of a run's episodes")
    view.add_argument("run_folder", metavar="RUN", type=path_argument, help="the run's folder")
    view.add_argument("--out", type=path_argument, help="output file (view.html in the run's folder)")
    view.add_argument("--open", action="store_true", help="open it in the browser")
    view.add_argument("--step", type=int, nargs="+", metavar="N", help="only these training steps")
    view.add_argument("--evaluation", nargs="+", metavar="LABEL", help='only these evaluations ("after RL")')
    view.add_argument("--limit", type=int, metavar="N", help="maximum episodes, spread over steps and evaluations")
    view.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
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


def _stopped(options: argparse.Namespace) -> str:
    return "The page is written atomically; run the same command again if it is missing."
