"""``python -m searchr1_async COMMAND``."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

from searchr1_async.atlas_job import AtlasSettings, run_atlas
from searchr1_async.errors import SearchR1Error


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 failed with a message, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m searchr1_async", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    atlas = commands.add_parser("atlas", help="train a small model to search the Factbook on this machine")
    defaults = AtlasSettings()
    atlas.add_argument("--out-dir", type=Path, default=defaults.out_dir, help="the run's folder (%(default)s)")
    atlas.add_argument("--seed", type=int, default=defaults.seed)
    atlas.add_argument("--steps", type=int, default=defaults.steps, help="optimiser steps at most (%(default)s)")
    atlas.add_argument("--time-limit", type=float, default=defaults.time_limit, help="seconds of RL (%(default)s)")
    atlas.add_argument("--held-out", type=int, default=defaults.held_out, help="held-out questions (%(default)s)")
    atlas.add_argument("--warm-up-steps", type=int, default=defaults.warm_up_steps)
    atlas.add_argument("--groups-per-batch", type=int, default=defaults.groups_per_batch)
    atlas.add_argument("--group-size", type=int, default=defaults.group_size)
    atlas.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    atlas.add_argument("--threads", type=int, default=None, help="CPU threads of the model (all cores)")
    options = vars(parser.parse_args(arguments))
    options.pop("command")
    settings = AtlasSettings(**options)
    began = time.monotonic()
    try:
        result, text = asyncio.run(run_atlas(settings))
    except KeyboardInterrupt:
        print(f"\nStopped. Finished steps are kept in {settings.out_dir}; the same command goes on.", file=sys.stderr)
        return 130
    except SearchR1Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    minutes = (time.monotonic() - began) / 60
    print(f"\n{text}\n{result.steps} optimiser steps; {minutes:.1f} minutes in this session")
    return 0


if __name__ == "__main__":
    sys.exit(main())
