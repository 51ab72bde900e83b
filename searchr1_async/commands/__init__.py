"""The commands of ``python -m searchr1_async``, one module each.

A module's ``add`` puts its parser among the others, with two defaults: ``run``, a coroutine function that takes the
parsed options and returns the text to show at the end, and ``stopped``, which says in words what Ctrl-C leaves.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Parsers = argparse._SubParsersAction[argparse.ArgumentParser]
