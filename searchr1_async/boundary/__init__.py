"""What comes in from outside, checked once: each module here is the only owner of one kind.

- :mod:`.paths`: paths as users give them.
- :mod:`.tables`: files of rows, and tables in memory.
- :mod:`.values`: numbers, flags and texts as users and files give them.
- :mod:`.retry_after`: how long a service asks to be left alone.
- :mod:`.waits`: waiting for services: bounded, and told.

Inside the package these values are trusted. Everything else may import this room; it imports only the errors.
"""
