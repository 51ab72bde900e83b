"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME [ARGUMENTS]` runs one."""

from __future__ import annotations

import importlib
import sys

from benchmarks.catalogue import BENCHMARKS


def listing() -> str:
    """One line for each benchmark."""
    width = max(len(each.name) for each in BENCHMARKS)
    lines = [f"  {each.name:{width}}  {each.minutes:>4} min  {each.question}" for each in BENCHMARKS]
    usage = "usage: python -m benchmarks NAME [ARGUMENTS]   (NAME --help shows its arguments)"
    return "\n".join([usage, "", *lines])


def main(arguments: list[str]) -> int | str | None:
    """Runs the named benchmark: its exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name = arguments[0].replace("-", "_")
    found = next((each for each in BENCHMARKS if each.name == name), None)
    if found is None:
        return f"there is no benchmark {arguments[0]!r}; these are:\n\n{listing()}"
    sys.argv = [f"python -m benchmarks {name}", *arguments[1:]]
    return importlib.import_module(found.module).main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
