"""A process with a worker, to be killed. Prints only the worker's process id.

Like a notebook, its main module cannot be imported again.
"""

from __future__ import annotations

import sys

import anyio

from searchr1_async.config import EpisodeLimits
from searchr1_async.rollout.messages import WorkerSpec
from searchr1_async.rollout.worker_pool import WorkerPool
from searchr1_async.testing import DictSearch


async def main(tokenizer: str) -> None:
    spec = WorkerSpec("tags", "scripted", tokenizer, EpisodeLimits())
    async with WorkerPool(spec, DictSearch(), count=1) as pool:
        pids = [str(worker.pid) for worker in pool.statistics.workers]
        sys.stdout.write(" ".join(pids) + "\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


anyio.run(main, sys.argv[1])
