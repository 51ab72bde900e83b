"""The commands of ``python -m searchr1_async``, one module each.

``add`` registers a module's parser with two defaults: ``run``, a coroutine function from parsed options to the final
output, and ``stopped``, the message shown after Ctrl-C.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Parsers = argparse._SubParsersAction[argparse.ArgumentParser]
