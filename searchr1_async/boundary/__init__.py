"""Validation of everything that enters the package, with one owner per kind of input.

From users:

- :mod:`.paths`: user-supplied paths, model folders, and the cache folder.
- :mod:`.values`: numbers, flags and texts, and how messages show a value.
- :mod:`.settings`: types and bounds of settings and arguments, from their annotations.
- :mod:`.rows`: rows of files (JSONL, JSON, CSV, TSV, Parquet) and in-memory tables, each with its place.
- :mod:`.cells`: single cells of such rows: missing values, and numbers as text.
- :mod:`.tables`: the only reader of Parquet files.

From the system:

- :mod:`.signals`: SIGINT, SIGTERM and SIGHUP, which stop the work of this process cleanly.
- :mod:`.streams`: standard output and error, which may be closed.
- :mod:`.open_files`: the limit of open files and connections.

From services:

- :mod:`.network`: proxies and loopback addresses.
- :mod:`.waits`: bounded waits, reported after 5 seconds, and deadlines that stop while a run is paused.
- :mod:`.retry_after`: the header ``Retry-After``.
- :mod:`.sdk`: exceptions of the ``tinker`` SDK.

The rest of the package trusts validated values. Any module may import this package; it imports only the errors.
"""
