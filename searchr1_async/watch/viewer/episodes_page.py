"""One self-contained HTML file over many episodes: a list to filter, sort and search, and the episodes to read and compare.

Its content security policy allows a single script, by hash, and that script creates elements and text nodes, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TextIO

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.episodes.table import (
    EpisodeRow,
    GroupOutcome,
    episode_from_row,
    evaluation_rows,
    step_rows,
    storable,
)
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.errors import RunFolderError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.watch.viewer.markup import DARK, LIGHT, asset, counted, visible_text
from searchr1_async.watch.viewer.parts import blocks, tokenizer_of

_ROWS_AT_ONCE = 512
"""Minimum episodes per read; a step or an evaluation is never split."""

_KNOWN = ("step", "label", "member", "advantage", "trained", "drop_reason")
_COLUMNS = [  # the episode's columns and the known ones
    *(*_KNOWN, "question_id", "question", "golden_answers", "data_source", "metadata", "prompt_tokens", "turns"),
    *("stop_reason", "answer", "reward", "reward_parts", "error", "seconds", "given"),
]

SourceKey = tuple[int | None, str | None]
"""Step and label; training steps have no label."""


@dataclass(frozen=True, slots=True)
class RunEpisodes:
    """A run's selected episodes."""

    folder: Path
    total: int
    """Episodes of the requested steps and evaluations, before the limit."""
    chosen: dict[SourceKey, frozenset[int] | None] = field(default_factory=dict)
    """In display order: for each source, the positions of its rows in the file; None is all."""
    counts: dict[SourceKey, int] = field(default_factory=dict)
    """Selected episodes of each source."""

    @property
    def shown(self) -> int:
        return sum(self.counts.values())

    def rows(self) -> Iterator[EpisodeRow]:
        """The episodes, read in blocks: at most a few steps, or one evaluation, are in memory.

        Raises:
            RunFolderError: a file cannot be read.
        """
        records = RunRecords(self.folder)
        with _reading(self.folder):
            for block in self._step_blocks():
                frame = records.episodes().filter(pl.col("step").is_in(block)).select(_COLUMNS)
                yield from self._kept(frame.collect())
            for step, label in self.chosen:
                if label is not None:
                    frame = records.evaluations().filter(pl.col("label") == label).select(_COLUMNS)
                    yield from self._kept(frame.collect(), (step, label))

    def _step_blocks(self) -> Iterator[list[int]]:
        block: list[int] = []
        rows = 0
        for (step, label), count in self.counts.items():
            if label is None and step is not None:
                block.append(step)
                rows += count
                if rows >= _ROWS_AT_ONCE:
                    yield block
                    block, rows = [], 0
        if block:
            yield block

    def _kept(self, frame: pl.DataFrame, key: SourceKey | None = None) -> Iterator[EpisodeRow]:
        seen: dict[SourceKey, int] = {}
        for part in frame.iter_slices(64):
            for row in part.iter_rows(named=True):
                source = key or (row["step"], None)
                place = seen[source] = seen.get(source, -1) + 1
                places = self.chosen[source]
                if places is None or place in places:
                    yield _row(row)


def run_episodes(
    folder: Path,
    *,
    steps: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    limit: int | None = None,
) -> RunEpisodes:
    """Select a run's episodes; reads only small columns.

    Args:
        folder: the run's folder.
        steps: training steps; None is all, or none if ``labels`` are given.
        labels: evaluations; None is all, or none if ``steps`` are given.
        limit: maximum number of episodes, shared evenly by steps and evaluations, preferring common questions so that they can be
            compared.

    Raises:
        RunFolderError: the folder has no run, no episodes yet, or lacks the requested steps or evaluations.
    """
    folder = Path(folder)
    if not (folder / "episodes").is_dir() and not (folder / "evaluations").is_dir():
        raise RunFolderError(
            f"{folder} holds no run: pass the out_dir of a run, with a folder named episodes or evaluations"
        )
    records = RunRecords(folder)
    names = ["step", "label", "data_source", "question_id"]
    with _reading(folder):
        training = records.episodes().select(names).collect()
        measured = records.evaluations().select(names).collect()
    found: dict[SourceKey, list[str]] = {}
    for step, label, suite, question in (*training.iter_rows(), *measured.iter_rows()):
        found.setdefault((step, label), []).append(f"{suite}\0{question}")
    if not found:
        raise RunFolderError(f"{folder} holds no episodes yet: the first are written at the end of step 1")
    wanted = _asked_for(folder, found, steps, labels)
    total = sum(map(len, wanted.values()))
    if limit is None or total <= limit:
        return RunEpisodes(folder, total, dict.fromkeys(wanted), {key: len(rows) for key, rows in wanted.items()})
    quotas = _shares([len(rows) for rows in wanted.values()], max(limit, 1))
    chosen = {key: _same_questions(rows, quota) for (key, rows), quota in zip(wanted.items(), quotas, strict=True)}
    kept: dict[SourceKey, frozenset[int] | None] = {key: places for key, places in chosen.items() if places}
    return RunEpisodes(folder, total, kept, {key: len(places) for key, places in chosen.items() if places})


def _asked_for(
    folder: Path, found: dict[SourceKey, list[str]], steps: Sequence[int] | None, labels: Sequence[str] | None
) -> dict[SourceKey, list[str]]:
    if steps is None and labels is None:
        return found
    have_steps = [step for step, label in found if label is None]
    have_labels = [label for _, label in found if label is not None]
    for asked, have, noun in ((steps, have_steps, "step"), (labels, have_labels, "evaluation")):
        missing = [each for each in asked or () if each not in have]
        if missing:
            there = f"{have[0]!r} to {have[-1]!r}" if have else "none"
            raise RunFolderError(f"{folder} holds no {noun} {missing[0]!r}: it has {there}")
    return {
        (step, label): rows
        for (step, label), rows in found.items()
        if (step in (steps or ()) if label is None else label in (labels or ()))
    }


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Equal shares, up to each size."""
    shares = [0] * len(sizes)
    left = limit
    while left > 0 and (open_ := [place for place, size in enumerate(sizes) if shares[place] < size]):
        each = left // len(open_)
        if each == 0:
            # Fewer than one each: an even selection of sources, always with the last one.
            for place in (open_[len(open_) - 1 - (number * len(open_)) // left] for number in range(left)):
                shares[place] += 1
            return shares
        for place in open_:
            taken = min(each, sizes[place] - shares[place])
            shares[place] += taken
            left -= taken
    return shares


def _same_questions(questions: Sequence[str], quota: int) -> frozenset[int]:
    """Positions of ``quota`` rows, by a question order that is the same in every source."""
    order = sorted(range(len(questions)), key=lambda place: (zlib.crc32(questions[place].encode("utf-8")), place))
    return frozenset(order[:quota])


def _row(row: dict[str, Any]) -> EpisodeRow:
    return EpisodeRow(episode_from_row(row), **{name: row[name] for name in _KNOWN})


class _reading:  # noqa: N801 - used as a statement
    """Turns errors of polars (damaged or vanishing file) into :class:`RunFolderError`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RunFolderError):  # already names the file
            return
        if isinstance(error, pl.exceptions.PolarsError | OSError | ValueError):
            cause = str(error).partition("\n")[0]
            raise RunFolderError(
                f"the records in {self._folder} cannot be read ({cause}): a file is damaged, or of another version"
            ) from error


_SCRIPTS = ("text.js", "data.js", "episode.js", "list.js", "main.js")

PAGE_NAME = "view.html"
CELL_HEIGHT = 720
"""Height in pixels of a page in a cell."""


def view_run(
    folder: Path | str,
    out: Path | str | None = None,
    *,
    steps: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    limit: int | None = None,
) -> Path:
    """Write one page over a run's episodes and return its path. Blocking: call it from a worker thread.

    Args:
        folder: the run's folder, running or finished. Tokens are coloured if it has the model's tokenizer
            (``<folder>/tokenizer``).
        out: the page, replaced atomically; None is ``view.html`` in the folder.
        steps: training steps to show; None is all, or none if ``labels`` are given.
        labels: evaluations to show; None is all, or none if ``steps`` are given.
        limit: maximum number of episodes, shared evenly by steps and evaluations, preferring common questions.

    Raises:
        RunFolderError: the folder has no run or lacks what is requested, or the page is not writable.
    """
    folder = absolute_path(folder, "folder")
    path = folder / PAGE_NAME if out is None else absolute_path(out, "out")
    episodes = run_episodes(folder, steps=steps, labels=labels, limit=limit)
    about = {"title": f"Episodes of {folder.resolve().name}", "notes": _notes(episodes)}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            _write(file, episodes.rows(), load_tokenizer(folder), about)
        partial.replace(path)
    except OSError as error:
        raise RunFolderError(f"the page {path} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def page_of(
    episodes: Iterable[Episode | Group | EpisodeRow],
    *,
    title: str = "Episodes",
    label: str | None = None,
    step: int | None = None,
    tokenizer: Any = None,
) -> str:
    """The page over episodes in memory, as HTML.

    Args:
        episodes: episodes or groups, from ``rollout`` or an evaluation's ``episodes``; or rows, which carry more data.
        title: page heading.
        label: name of their evaluation; None if they are not one.
        step: optimiser steps done before them; None if they belong to no step.
        tokenizer: the model's; None uses a remembered one that matches the first episode.
    """
    rows = _as_rows(list(episodes), label, step)
    if tokenizer is None:
        tokenizer = next((tokenizer_of(row.episode) for row in rows if row.episode.turns), None)
    file = io.StringIO()
    _write(file, rows, tokenizer, {"title": title, "notes": []})
    return file.getvalue()


class CellView:
    """A page that displays itself in a notebook cell."""

    def __init__(self, page_html: str) -> None:
        self.page_html = page_html

    def _repr_html_(self) -> str:
        return in_cell(self.page_html)

    def __repr__(self) -> str:
        return 'episode viewer: display it in a notebook, or write it to a file with view("page.html")'


def in_cell(page_html: str, height: int = CELL_HEIGHT) -> str:
    """A page as HTML for a cell: an iframe sandboxed to scripts only.

    Its theme follows the system, as an iframe cannot see the notebook's; a button switches it.

    Args:
        page_html: as from :func:`page_of`.
        height: of the iframe in pixels.
    """
    return (
        '<iframe title="Episodes" sandbox="allow-scripts" style="width: 100%; border: 1px solid rgb(128 128 128 / .35); '
        f'border-radius: 6px" height="{int(height)}" srcdoc="{escape(page_html)}"></iframe>'
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in the run's folder; None if it is missing or fails to load."""
    saved = folder / "tokenizer"
    if not saved.is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(saved), local_files_only=True)
    except (OSError, ValueError, KeyError):  # episodes are readable without token colours
        return None


def _as_rows(episodes: Sequence[Episode | Group | EpisodeRow], label: str | None, step: int | None) -> list[EpisodeRow]:
    rows: list[EpisodeRow] = []
    single = [each for each in episodes if isinstance(each, Episode)]
    groups = [each for each in episodes if isinstance(each, Group)]
    if label is not None:
        members = [episode for group in groups for episode in (*group.episodes, *group.failed)]
        rows += evaluation_rows(label, [*single, *members], step)
    else:
        rows += [EpisodeRow(episode, step) for episode in single]
        for row in step_rows(step or 0, [GroupOutcome(place, group) for place, group in enumerate(groups)]):
            # Whether they were trained on is unknown.
            rows.append(EpisodeRow(row.episode, step, None, row.place, row.group, row.member, row.advantage))
    return rows + [each for each in episodes if isinstance(each, EpisodeRow)]


def _notes(episodes: RunEpisodes) -> list[str]:
    steps = sum(label is None for _, label in episodes.counts)
    evaluations = len(episodes.counts) - steps
    parts = [counted(steps, "step") + " of training"] if steps else []
    parts += [counted(evaluations, "evaluation")] if evaluations else []
    notes = [f"{counted(episodes.shown, 'episode')} of {' and '.join(parts)}."]
    if episodes.shown < episodes.total:
        notes.append(
            f"Showing {episodes.shown:,} of {episodes.total:,}: a share of every step and evaluation, with the same questions "
            "where possible. To show all: python -m searchr1_async view RUN"
        )
    return notes


def _write(file: TextIO, rows: Iterable[EpisodeRow], tokenizer: Any, about: dict[str, Any]) -> None:
    script = '"use strict";(() => {\n' + "\n".join(asset(name) for name in _SCRIPTS) + "\n})();"
    style = "\n".join(
        (
            f":root {{ color-scheme: light dark; {LIGHT} }}",
            f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}",
            f':root[data-theme="light"] {{ color-scheme: light; {LIGHT} }}',
            f':root[data-theme="dark"] {{ color-scheme: dark; {DARK} }}',
            asset("page.css"),
            asset("episode.css"),
        )
    )
    title = escape(storable(visible_text(str(about["title"]))))
    file.write(_HEAD.format(policy=_policy(script, style), title=title, style=style))
    for name, content in blocks(rows, tokenizer, about):
        file.write(f'<script type="application/octet-stream" id="{name}">{content}</script>\n')
    file.write(f"<script>{script}</script>\n</body></html>\n")


def _policy(script: str, style: str) -> str:
    def digest(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

    return (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><p id="waiting">Loading the episodes …</p>
<noscript><p>This page needs JavaScript to unpack its episodes.</p></noscript>
"""
