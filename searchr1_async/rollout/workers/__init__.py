"""Rollout worker processes, for more throughput than one Python process allows.

The Tinker SDK uses about 3 ms of CPU per sample in one thread per process, so about 300 samples per second. A
:class:`~searchr1_async.rollout.workers.pool.WorkerPool` rolls out in several processes; search, rewards and training stay in
one.
"""
