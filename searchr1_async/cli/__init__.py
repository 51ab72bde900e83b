"""The console script ``searchr1``, also ``python -m searchr1_async``: parses the command line, and imports a command once it is known."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn

from searchr1_async.boundary.signals import exit_status, exit_with, print_line, settle_streams
from searchr1_async.errors import SearchR1Error

COMMANDS = {
    "run": ("atlas", "train a small model to search the Factbook on this machine"),
    "ask": ("model_commands", "ask a trained model one question"),
    "eval": ("model_commands", "evaluate models, checkpoints and runs on question suites"),
    "export": ("model_commands", "export a run's weights as a PEFT adapter or merged"),
    "view": ("model_commands", "write an HTML page of a run's episodes"),
    "index": ("search_commands", "embed a corpus into a folder or a Chroma server"),
    "serve": ("search_commands", "serve an index over HTTP to other machines or processes"),
    "wiki18": ("search_commands", "download the prebuilt index of the 2018 Wikipedia (21 million passages)"),
}
"""Name to module and help. The module's ``add_NAME`` adds the arguments, and two defaults: ``run``, a coroutine function from the
parsed options to the final output, and ``stopped``, a function from them to the message after Ctrl-C."""
ALIASES = {"run": ["atlas"]}


def entry() -> NoReturn:
    """The console script, as a process."""
    exit_with(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        Exit status: 0 success, 1 failure with a message, 130 after Ctrl-C, 143 after SIGTERM. A closed output pipe
        (``| head``) is ignored.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = argparse.Namespace(stopped=lambda options: "")
    try:
        options = parser_for(given).parse_args(given)
        print_line(asyncio.run(options.run(options)), sys.stdout)
        return 0
    except KeyboardInterrupt as ending:
        print_line(f"\nStopped. {options.stopped(options)}".rstrip(), sys.stderr)
        return exit_status(ending)
    except SearchR1Error as error:
        print_line(f"{type(error).__name__}: {error}", sys.stderr)
        return 1
    finally:
        settle_streams()


def parser_for(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the one command that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="searchr1",
        description="Trains, asks and evaluates search-using language models, and serves what they search.",
    )
    parser.add_argument("--version", action="version", version=f"searchr1_async {version('searchr1_async')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        aliases = ALIASES.get(name, [])
        command = commands.add_parser(name, help=text, aliases=aliases)
        if chosen in (name, *aliases):
            getattr(import_module(f"searchr1_async.cli.{module}"), f"add_{name}")(command)
    return parser
