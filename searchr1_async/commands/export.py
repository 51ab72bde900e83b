"""``export``: trained weights as a folder that other software loads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from searchr1_async.boundary.paths import path_argument
from searchr1_async.commands.searching import step_argument
from searchr1_async.config import LocalOptions
from searchr1_async.exporting.export import export
from searchr1_async.watch.dashboard import console_view

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


def add(commands: Parsers) -> None:
    parser = commands.add_parser("export", help="take a run's weights away: a PEFT adapter or merged weights")
    add_argument = parser.add_argument
    add_argument("source", metavar="RUN", help="a run's folder, or a tinker://RUN/weights/NAME path")
    add_argument("folder", type=path_argument, metavar="FOLDER", help="where to write; must not exist, or be empty")
    add_argument(
        "--step",
        type=step_argument,
        default="last",
        help="of a run: last, best, or a number of optimiser steps (%(default)s)",
    )
    add_argument(
        "--format", choices=("peft", "merged"), default="peft", help="a LoRA adapter, or the whole model (%(default)s)"
    )
    add_argument(
        "--base-model", help="the base model's name on the hub, or a folder with its weights (as the run says)"
    )
    add_argument("--push-to-hub", metavar="NAME", help="upload to this Hugging Face repository as well")
    add_argument("--public", action="store_true", help="a repository that is created is public")
    add_argument("--service", help="URL of a Tinker service")
    add_argument(
        "--service-folder", type=path_argument, help="the embedded service's folder that holds a tinker:// path"
    )
    add_argument("--threads", type=int, help="CPU threads of the embedded service")
    parser.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
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
    return f"{folder} holds the weights; its README.md says how to load them."


def _stopped(options: argparse.Namespace) -> str:
    return f"Nothing was written to {options.folder}."
