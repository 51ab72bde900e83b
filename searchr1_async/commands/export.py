"""``export``: writes trained weights to a folder for other software."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from searchr1_async.boundary.paths import path_argument
from searchr1_async.commands.searching import step_argument
from searchr1_async.config import LocalOptions
from searchr1_async.runs.export import export
from searchr1_async.watch.dashboard import console_view

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


def add(commands: Parsers) -> None:
    parser = commands.add_parser("export", help="export a run's weights as a PEFT adapter or merged")
    add_argument = parser.add_argument
    add_argument("source", metavar="RUN", help="a run's folder, or a tinker://RUN/weights/NAME path")
    add_argument("folder", type=path_argument, metavar="FOLDER", help="output folder; must be missing or empty")
    add_argument(
        "--step",
        type=step_argument,
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
    return f"{folder} contains the weights; its README.md explains how to load them."


def _stopped(options: argparse.Namespace) -> str:
    return f"Nothing was written to {options.folder}."
