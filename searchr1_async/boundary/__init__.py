"""What comes in from outside, checked once: each module here is the only owner of one kind.

Of users:

- :mod:`.paths`: paths as users give them, folders of models, and the folder for caches.
- :mod:`.values`: numbers, flags and texts, and how a value is shown in a message.
- :mod:`.settings`: the kinds and bounds of settings and arguments, as their annotations declare them.
- :mod:`.rows`: rows of files (JSONL, JSON, CSV, TSV, Parquet) and of tables in memory, each with its place.
- :mod:`.cells`: one cell of such a row: whether it is missing, and the text of a number.
- :mod:`.tables`: the only reader of Parquet files.

Of the system:

- :mod:`.signals`: SIGINT, SIGTERM and SIGHUP, which stop the work of this process cleanly.
- :mod:`.streams`: standard output and error, which may be closed.
- :mod:`.open_files`: how many files and connections this process may open.

Of services:

- :mod:`.network`: how services are reached, through the proxies of the environment or past them.
- :mod:`.waits`: bounded waits, reported after 5 seconds, and deadlines that stand still while a run is held.
- :mod:`.retry_after`: the header ``Retry-After``.
- :mod:`.sdk`: what the ``tinker`` SDK raises.

Inside the package these values are trusted. Everything else may import this room; it imports only the errors.
"""
