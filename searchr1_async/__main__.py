"""``python -m searchr1_async COMMAND``."""

from __future__ import annotations

import argparse
import sys

from searchr1_async.boundary import signals
from searchr1_async.boundary.signals import print_line, standard_streams
from searchr1_async.commands import ask, atlas, eval, export, index, serve, view, wiki18
from searchr1_async.errors import SearchR1Error


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        Exit status: 0 success, 1 failure with a message, 130 after Ctrl-C, 143 after SIGTERM. A closed output pipe
        (``| head``) is ignored.
    """
    with standard_streams():
        options = _parser().parse_args(arguments)
        try:
            text = signals.run_to_end(options.run(options))
        except KeyboardInterrupt as ending:
            print_line(f"\nStopped. {options.stopped(options)}", sys.stderr)
            return signals.exit_status(ending)
        except SearchR1Error as error:
            print_line(f"{type(error).__name__}: {error}", sys.stderr)
            return 1
        print_line(text, sys.stdout)
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m searchr1_async", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (ask, atlas, eval, export, index, serve, view, wiki18):
        command.add(commands)
    return parser


if __name__ == "__main__":
    signals.exit_with(main())
