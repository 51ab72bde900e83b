"""Rich display of episodes and groups in Jupyter and IPython: HTML in a cell, text elsewhere.

Registered by the names of the types, so that importing the package loads neither them nor the viewer.
"""

from __future__ import annotations

import sys
from typing import Any

_TYPES = "searchr1_async.episodes.types"


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
    html, plain = formatter.formatters["text/html"], formatter.formatters["text/plain"]
    html.for_type_by_name(_TYPES, "Episode", _episode_html)
    html.for_type_by_name(_TYPES, "Group", _group_html)
    plain.for_type_by_name(_TYPES, "Episode", _episode_plain)
    plain.for_type_by_name(_TYPES, "Group", _group_plain)
    return True


def _episode_html(episode: Any) -> str:
    from searchr1_async.watch.viewer.cell import episode_html

    return episode_html(episode)


def _group_html(group: Any) -> str:
    from searchr1_async.watch.viewer.cell import group_html

    return group_html(group)


def _episode_plain(episode: Any, printer: Any, cycle: bool) -> None:
    from searchr1_async.watch.viewer.cell import episode_line, episode_text

    # In a container the printer's stack is deeper: print one line each.
    printer.text(episode_text(episode) if len(printer.stack) <= 1 else episode_line(episode))


def _group_plain(group: Any, printer: Any, cycle: bool) -> None:
    from searchr1_async.watch.viewer.cell import group_text

    printer.text(group_text(group))
