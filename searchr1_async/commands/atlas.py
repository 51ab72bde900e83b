"""``atlas``: trains a small model to search the Factbook."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from searchr1_async.atlas_job import AtlasSettings, run_atlas
from searchr1_async.boundary.paths import path_argument

if TYPE_CHECKING:
    from searchr1_async.commands import Parsers


def add(commands: Parsers) -> None:
    atlas = commands.add_parser("atlas", help="train a small model to search the Factbook on this machine")
    defaults = AtlasSettings()
    atlas.add_argument("--out-dir", type=path_argument, default=defaults.out_dir, help="the run's folder (%(default)s)")
    atlas.add_argument("--seed", type=int, default=defaults.seed)
    atlas.add_argument("--steps", type=int, default=defaults.steps, help="maximum optimiser steps (%(default)s)")
    atlas.add_argument("--time-limit", type=float, default=defaults.time_limit, help="seconds of RL (%(default)s)")
    atlas.add_argument("--held-out", type=int, default=defaults.held_out, help="held-out questions (%(default)s)")
    atlas.add_argument("--warm-up-steps", type=int, default=defaults.warm_up_steps)
    atlas.add_argument("--groups-per-batch", type=int, default=defaults.groups_per_batch)
    atlas.add_argument("--group-size", type=int, default=defaults.group_size)
    atlas.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    atlas.add_argument("--threads", type=int, default=None, help="CPU threads of the model (all cores)")
    atlas.set_defaults(run=_run, stopped=_stopped)


async def _run(options: argparse.Namespace) -> str:
    given = {name: getattr(options, name) for name in AtlasSettings.__slots__ if hasattr(options, name)}
    began = time.monotonic()
    result, text = await run_atlas(AtlasSettings(**given))
    minutes = (time.monotonic() - began) / 60
    return f"\n{text}\n{result.steps} optimiser steps; {minutes:.1f} minutes in this session"


def _stopped(options: argparse.Namespace) -> str:
    return f"Finished steps are kept in {options.out_dir}; run the same command to resume."
