"""Styles of an episode, light and dark, shared by cells, pages and reports."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_ASSETS = Path(__file__).with_name("assets")

LIGHT = (
    "--ground: #fff; --card: #f7f8fa; --ink: #1d2430; --soft: #5b6472; --line: #dfe3e8; --good: #1a7f4b; --bad: #b3372b; "
    "--accent: #2f62a8; --mark: #ffe69a; --mark-ink: #1d2430; --mask: rgb(110 120 135 / .1); --chosen: #e4edf8;"
)
DARK = (
    "--ground: #14171c; --card: #1c2128; --ink: #e5e9ef; --soft: #9aa4b2; --line: #323943; --good: #58c48b; --bad: #f0847a; "
    "--accent: #82aee8; --mark: #6b5510; --mark-ink: #fff3cf; --mask: rgb(150 160 175 / .13); --chosen: #26364a;"
)


@cache
def asset(name: str) -> str:
    """The text of a bundled file."""
    return (_ASSETS / name).read_text(encoding="utf-8")


@cache
def cell_style() -> str:
    """CSS for a cell's output, scoped to ``.searchr1-episode``.

    Follows the notebook's theme if it is declared (JupyterLab, Notebook 7, VS Code, Colab), else the system's.
    """
    root = ".searchr1-episode"
    return "\n".join(
        (
            f"{root} {{ {LIGHT} }}",
            f"@media (prefers-color-scheme: dark) {{ {root} {{ {DARK} }} }}",
            f'[data-jp-theme-light="true"] {root}, .vscode-light {root}, html[theme="light"] {root} {{ {LIGHT} }}',
            f'[data-jp-theme-light="false"] {root}, .vscode-dark {root}, html[theme="dark"] {root} {{ {DARK} }}',
            f"{root} {{ {asset('cell.css')} {asset('episode.css')} }}",
        )
    )
