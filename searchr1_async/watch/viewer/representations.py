"""Display of episodes and groups in IPython; a no-op without it."""

from __future__ import annotations

import sys
from typing import Any

from searchr1_async.episodes.types import Episode, Group


def register_representations() -> bool:
    """Register rich display of episodes and groups in Jupyter and IPython: HTML in a cell, text elsewhere. Idempotent.

    Returns:
        Whether IPython is running.
    """
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    formatter = getattr(shell, "display_formatter", None)
    if formatter is None:
        return False
    html, plain = formatter.formatters["text/html"], formatter.formatters["text/plain"]
    html.for_type(Episode, _episode_html)
    html.for_type(Group, _group_html)
    plain.for_type(Episode, _episode_plain)
    plain.for_type(Group, _group_plain)
    return True


def _episode_html(episode: Episode) -> str:
    from searchr1_async.watch.viewer.cell import episode_html

    return episode_html(episode)


def _group_html(group: Group) -> str:
    from searchr1_async.watch.viewer.cell import group_html

    return group_html(group)


def _episode_plain(episode: Episode, printer: Any, cycle: bool) -> None:
    from searchr1_async.watch.viewer.plain import episode_line, episode_text

    # In a container the printer's stack is deeper: print one line each.
    printer.text(episode_text(episode) if len(printer.stack) <= 1 else episode_line(episode))


def _group_plain(group: Group, printer: Any, cycle: bool) -> None:
    from searchr1_async.watch.viewer.plain import group_text

    printer.text(group_text(group))
