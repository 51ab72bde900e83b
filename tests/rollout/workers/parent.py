"""A process with a worker, to be killed: it says the worker's id, and nothing else reaches its standard output.

Its main module is no module that could be imported again: it starts at once, as a notebook's cells do.
"""

from __future__ import annotations

import sys

import anyio

from searchr1_async.config import EpisodeLimits
from searchr1_async.rollout.workers.messages import WorkerSpec
from searchr1_async.rollout.workers.pool import WorkerPool
from tests.players import DictSearch


async def main(tokenizer: str) -> None:
    spec = WorkerSpec("tags", "scripted", tokenizer, EpisodeLimits())
    async with WorkerPool(spec, DictSearch(), count=1) as pool:
        pids = [str(worker.pid) for worker in pool.statistics.workers]
        sys.stdout.write(" ".join(pids) + "\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


anyio.run(main, sys.argv[1])
