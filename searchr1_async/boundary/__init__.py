"""Validation of everything that enters the package, with one owner per kind of input.

From users:

- :mod:`.paths`: user-supplied paths, the cache folder, atomic files, and the limit of open files.
- :mod:`.settings`: types and bounds of settings and arguments, from their annotations.
- :mod:`.tables`: rows of files (JSONL, JSON, CSV, TSV, Parquet) and in-memory tables; the only reader of Parquet.

From the system:

- :mod:`.signals`: SIGINT, SIGTERM and SIGHUP, which stop the work of this process cleanly, and closed standard streams.

From services:

- :mod:`.network`: proxies, loopback addresses, ``Retry-After``, and exceptions of the ``tinker`` SDK.
- :mod:`.waits`: bounded waits, reported after 5 seconds, deadlines that stop while a run is paused, and work in threads.

The rest of the package trusts validated values. Any module may import this package; it imports only the errors.
"""
