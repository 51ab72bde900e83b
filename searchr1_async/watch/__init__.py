"""Views of a run: state, console, live view, charts, episodes. This file has the rich display of episodes and groups in Jupyter and
IPython: HTML in a cell, text elsewhere.

It is registered by the names of the types, so that importing the package loads neither them nor what renders them.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any


def register_representations() -> bool:
    """Registers the display; idempotent, and does nothing without IPython.

    Returns:
        Whether IPython is running.
    """
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    formatter = getattr(shell, "display_formatter", None)
    if formatter is None:
        return False
    html, plain = (formatter.formatters[mime_type] for mime_type in ("text/html", "text/plain"))
    for name in ("Episode", "Group"):
        html.for_type_by_name("searchr1_async.episodes.types", name, partial(_html, name.lower()))
        plain.for_type_by_name("searchr1_async.episodes.types", name, partial(_plain, name.lower()))
    return True


def _html(kind: str, value: Any) -> str:
    from searchr1_async.watch import episodes_page

    return getattr(episodes_page, f"{kind}_html")(value)


def _plain(kind: str, value: Any, printer: Any, cycle: bool) -> None:
    from searchr1_async.watch import episodes_page

    # In a container the printer's stack is deeper: print one line for each episode.
    is_inside = kind == "episode" and len(printer.stack) > 1
    name = "episode_line" if is_inside else f"{kind}_text"
    printer.text(getattr(episodes_page, name)(value))
