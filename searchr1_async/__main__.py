"""``python -m searchr1_async COMMAND``."""

from searchr1_async.cli import entry

if __name__ == "__main__":
    entry()
