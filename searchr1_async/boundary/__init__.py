"""Validation of everything that enters the package, with one owner per kind of input.

- :mod:`.settings`: numbers, flags and texts of users, settings and arguments by their annotations, and how messages show a value.
- :mod:`.paths`: user-supplied paths, model folders, the cache folder, atomic files, and the limit of open files.
- :mod:`.tables`: rows and cells of files and of in-memory tables; the only reader of Parquet files.
- :mod:`.signals`: SIGINT, SIGTERM and SIGHUP, which stop the work of this process cleanly; standard streams that may be closed.
- :mod:`.network`: proxies, loopback addresses, ``Retry-After``, and exceptions of the ``tinker`` SDK.
- :mod:`.waits`: bounded waits, reported after 5 seconds, deadlines that stop while a run is paused, and work in threads.

For the package itself:

- :mod:`.lazy`: names that load on first use.

The rest of the package trusts validated values. Any module may import this package; it imports only the errors.
"""
