"""``python -m searchr1_async COMMAND``."""

from __future__ import annotations

import argparse
import asyncio
import sys

from searchr1_async.commands import ask, atlas, eval, export, index, serve, view, wiki18
from searchr1_async.errors import SearchR1Error


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 failed with a message, 130 stopped by Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        text = asyncio.run(options.run(options))
    except KeyboardInterrupt:
        print(f"\nStopped. {options.stopped(options)}", file=sys.stderr)
        return 130
    except SearchR1Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m searchr1_async", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (ask, atlas, eval, export, index, serve, view, wiki18):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
