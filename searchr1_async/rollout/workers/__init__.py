"""Processes that play groups, for where one thread of Python is the limit.

The Tinker SDK costs about 3 ms of CPU a sample, in one thread of a process whatever the number of clients: some 300 samples a
second. A :class:`~searchr1_async.rollout.workers.pool.WorkerPool` plays in several processes; the search, the rewards and
the learning stay in one.
"""
