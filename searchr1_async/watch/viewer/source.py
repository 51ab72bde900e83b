"""Selects and streams the episodes of a run's folder for a page."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.episodes.table import EpisodeRow, episode_from_row
from searchr1_async.errors import RunFolderError
from searchr1_async.records.run_records import RunRecords

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
