"""What comes in from outside, checked once: each module here is the only owner of one kind.

- :mod:`.paths`: paths as users give them.
- :mod:`.settings`: the kinds and bounds of settings and arguments, as their annotations declare them.
- :mod:`.tables`: files of rows, and tables in memory.
- :mod:`.values`: numbers, flags and texts as users and files give them.
- :mod:`.waits`: waiting for services: bounded, told, and put off while a run is held.
- :mod:`.retry_after`: how long a service asks to be left alone.
- :mod:`.network`: how services are reached, through the proxies of the environment or past them.
- :mod:`.open_files`: how many files and connections this process may open.
- :mod:`.sdk`: what the ``tinker`` SDK raises.

Inside the package these values are trusted. Everything else may import this room; it imports only the errors.
"""
