"""One self-contained HTML page over episodes: a list to filter, sort and search, and the episodes to read and compare; the same page
in a notebook's cell; and an episode as plain text.

Its content security policy allows a single script, by hash, and that script creates elements and text nodes, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, TextIO

import polars as pl
from markupsafe import Markup

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.episodes.table import EpisodeRow, centred, episode_from_row, storable
from searchr1_async.episodes.types import Episode, Group
from searchr1_async.errors import RunFolderError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.watch.episode_parts import blocks, episode_data, tokenizer_of
from searchr1_async.watch.markup import (
    MARKS,
    MAX_LINE,
    MAX_PASSAGE,
    PAGE_COLOURS,
    asset,
    counted,
    reward_words,
    template,
    verdict,
    visible,
    visible_text,
)

PAGE_NAME = "view.html"
CELL_HEIGHT, EPISODE_HEIGHT = 720, 480
"""In pixels, of a page and of a single episode in a cell."""
_ROWS_AT_ONCE = 512
"""Episodes per read, about; a step or an evaluation is never split."""
_KNOWN = ("step", "label", "member", "advantage", "trained", "drop_reason")
_COLUMNS = [  # the episode's columns and the known ones
    *(*_KNOWN, "question_id", "question", "golden_answers", "data_source", "metadata", "prompt_tokens", "turns"),
    *("stop_reason", "answer", "reward", "reward_parts", "error", "seconds", "given"),
]
_QUESTION = pl.struct("data_source", "question_id").hash()
"""An order of the questions that is the same in all steps and evaluations."""


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
        limit: maximum number of episodes: all those of some questions (at least one), so that they can be compared.

    Raises:
        RunFolderError: the folder has no run or lacks what is requested, or the page is not writable.
    """
    folder = absolute_path(folder, "folder")
    path = folder / PAGE_NAME if out is None else absolute_path(out, "out")
    episodes, notes = _selected(folder, steps, labels, limit)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            about = {"title": f"Episodes of {folder.resolve().name}", "notes": notes}
            _write(file, _rows(folder, episodes), load_tokenizer(folder), about)
        partial.replace(path)
    except OSError as error:
        raise RunFolderError(f"the page {path} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def _selected(
    folder: Path, steps: Sequence[int] | None, labels: Sequence[str] | None, limit: int | None
) -> tuple[dict[str, pl.LazyFrame], list[str]]:
    """The requested episodes of steps and of evaluations, and what to say of them on the page."""
    if not (folder / "episodes").is_dir() and not (folder / "evaluations").is_dir():
        raise RunFolderError(
            f"{folder} holds no run: pass the out_dir of a run, with a folder named episodes or evaluations"
        )
    records = RunRecords(folder)
    training, evaluations = records.episodes(), records.evaluations()
    if steps is not None or labels is not None:
        training = training.filter(pl.col("step").is_in(list(steps or ())))
        evaluations = evaluations.filter(pl.col("label").is_in(list(labels or ())))
    try:
        names = pl.concat([frame.select(order=_QUESTION) for frame in (training, evaluations)])
        questions = names.group_by("order").len().sort("order").collect()
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    total = shown = int(questions["len"].sum())
    if not total:
        which = "yet" if steps is None and labels is None else "of these steps and evaluations"
        raise RunFolderError(f"{folder} holds no episodes {which}: those of a step are written at its end")
    if limit is not None:
        kept = questions.filter((pl.col("len").cum_sum() <= limit) | (pl.int_range(pl.len()) == 0))
        shown, is_kept = int(kept["len"].sum()), kept["order"].max() >= _QUESTION
        training, evaluations = training.filter(is_kept), evaluations.filter(is_kept)
    notes = [f"{counted(shown, 'episode')} of {total:,}."]
    if shown < total:
        notes.append("All episodes of some questions are shown. To show all: searchr1 view RUN")
    return {"step": training, "label": evaluations}, notes


def _rows(folder: Path, episodes: Mapping[str, pl.LazyFrame]) -> Iterator[EpisodeRow]:
    """The episodes, of which a few steps or one evaluation are in memory.

    Args:
        episodes: by the column whose values are read one after the other.

    Raises:
        RunFolderError: a file cannot be read.
    """
    try:
        for column, frame in episodes.items():
            of_all = frame.select(column).collect()[column]
            values = of_all.unique(maintain_order=True)
            each = max(1, _ROWS_AT_ONCE * values.len() // max(1, of_all.len()))
            for at in range(0, values.len(), each):
                block = frame.filter(pl.col(column).is_in(values[at : at + each].to_list())).select(_COLUMNS).collect()
                for part in block.iter_slices(64):
                    for row in part.iter_rows(named=True):
                        yield EpisodeRow(episode_from_row(row), **{name: row[name] for name in _KNOWN})
    except RunFolderError:  # already names the file
        raise
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> RunFolderError:
    cause = str(error).partition("\n")[0]
    return RunFolderError(f"the records in {folder} cannot be read ({cause}): a file is damaged, or of another version")


def page_of(rows: Sequence[EpisodeRow], *, title: str = "Episodes", tokenizer: Any = None) -> str:
    """The page over episodes in memory, as HTML.

    Args:
        tokenizer: the model's; None uses a remembered one that matches the first episode.
    """
    if tokenizer is None:
        tokenizer = next((tokenizer_of(row.episode) for row in rows if row.episode.turns), None)
    file = io.StringIO()
    _write(file, rows, tokenizer, {"title": title, "notes": []})
    return file.getvalue()


class CellView:
    """A page that displays itself in a notebook cell: in an iframe sandboxed to scripts only.

    Its theme follows the system, as an iframe cannot see the notebook's; a button switches it.

    Args:
        text: below the page, folded, for viewers that strip it, such as GitHub.
    """

    def __init__(self, page_html: str, *, height: int = CELL_HEIGHT, text: str = "") -> None:
        self.page_html, self._height, self._text = page_html, height, text

    def _repr_html_(self) -> str:
        folded = f"<details><summary>as text</summary><pre>{visible(self._text)}</pre></details>" if self._text else ""
        return (
            '<iframe title="Episodes" sandbox="allow-scripts" style="width: 100%; border: 1px solid rgb(128 128 128 / .35); '
            f'border-radius: 6px" height="{self._height}" srcdoc="{escape(self.page_html)}"></iframe>{folded}'
        )

    def __repr__(self) -> str:
        return 'episode viewer: display it in a notebook, or write it to a file with view("page.html")'


def episode_html(episode: Episode) -> str:
    """An episode for a notebook cell."""
    return CellView(page_of([EpisodeRow(episode)]), height=EPISODE_HEIGHT, text=episode_text(episode))._repr_html_()


def group_html(group: Group) -> str:
    """The page over a group's episodes, for a notebook cell."""
    rows = [
        EpisodeRow(episode, advantage=by) for episode, by in zip(group.episodes, centred(group.rewards), strict=True)
    ]
    rows += [EpisodeRow(episode, trained=False, drop_reason="failed") for episode in group.failed]
    return CellView(page_of(rows, title=group_text(group).partition("\n")[0]), text=group_text(group))._repr_html_()


def episode_text(episode: Episode) -> str:
    """The whole episode: question, turns, searches with passages, answer, outcome."""
    data = episode_data(EpisodeRow(episode))
    for turn in data["turns"]:
        turn["text"] = "".join(text for _, pieces in turn["stretches"] for text, _ in pieces)
    mark = f"{MARKS[data['verdict']]} " if data["golden"] else ""
    return template("episode.txt").render(data, mark=mark, line=_line, passage=MAX_PASSAGE).rstrip()


def episode_line(episode: Episode) -> str:
    """A one-line summary, for lists and groups."""
    answer = "no answer" if episode.answer is None else repr(_line(episode.answer, 60))
    return (
        f"<Episode {_line(episode.question.data_source, 40)}/{_line(episode.question.id, 40)} {MARKS[verdict(episode)]} "
        f"{answer}, {_line(reward_words(episode), 120)}, {counted(len(episode.turns), 'turn')}>"
    )


def group_text(group: Group) -> str:
    """The question and one line per member, failed ones last."""
    members = (*group.episodes, *group.failed)
    title = f"group of {counted(len(members), 'episode')}: {_line(group.question.question)}"
    return "\n".join([title, *(f"  {episode_line(episode)}" for episode in members)])


def _line(text: str, limit: int = MAX_LINE) -> str:
    return " ".join(visible_text(text[:limit]).split()) + " …" * (len(text) > limit)


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


def _write(file: TextIO, rows: Iterable[EpisodeRow], tokenizer: Any, about: dict[str, Any]) -> None:
    script = f'"use strict";(() => {{\n{asset("episode.js")}\n{asset("page.js")}\n}})();'
    style = "\n".join((PAGE_COLOURS, asset("page.css"), asset("episode.css")))
    page = template("page.html").stream(
        policy=Markup(_policy(script, style)),
        title=storable(visible_text(str(about["title"]))),
        style=Markup(style),
        script=Markup(script),
        blocks=((name, Markup(packed)) for name, packed in blocks(rows, tokenizer, about)),
    )
    page.dump(file)


def _policy(script: str, style: str) -> str:
    def digest(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

    return (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
