"""The episodes that a report's page links to, and their addresses in the episodes page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import polars as pl

from searchr1_async.episodes.table import EpisodeRow, episode_from_row, storable
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.episode_store import EpisodeStore
from searchr1_async.evaluation.report_frames import ReportFrames
from searchr1_async.records.scores import OUTCOMES
from searchr1_async.watch.viewer.parts import MAX_LISTED

EPISODES_NAME = "episodes.html"
MAX_FLIPS = 100
"""Changed questions listed per pair of systems: with 5 systems, 800 episodes or 3 MB."""
EPISODES_PER_OUTCOME = 4
"""Episodes listed per system and outcome."""

EpisodeKey = tuple[str, str, str, int]
"""System, suite, question id, sample number."""


@dataclass(frozen=True)
class Chosen:
    """The episodes listed on a page, chosen from scores alone."""

    flips: Mapping[tuple[str, str], pl.DataFrame]
    """By pair of systems: the listed flips, balanced between directions."""
    flip_counts: Mapping[tuple[str, str], int]
    """By pair of systems: the total number of flips."""
    outcomes: Mapping[tuple[str, str], pl.DataFrame]
    """By system and outcome: score rows."""
    keys: frozenset[EpisodeKey] = field(default=frozenset())


def choose(report: ReportFrames) -> Chosen:
    """Chooses flips between compared systems and some episodes of each outcome."""
    flips, counts = {}, {}
    for before, after in report.pairs():
        if report.is_paired(before, after):
            found = report.flips(before, after)
            counts[before, after] = found.height
            flips[before, after] = _both_directions(found)
    outcomes = {}
    for label, evaluation in report.items():
        for outcome in OUTCOMES:
            rows = evaluation.scores.filter(outcome=outcome)
            if rows.height:
                outcomes[label, outcome] = _spread(rows)
    keys = {key for (before, after), own in flips.items() for key in _flip_keys(before, after, own)}
    for (label, _), own in outcomes.items():
        keys |= {(label, *row) for row in own.select("suite", "question_id", "sample").iter_rows()}
    return Chosen(flips, counts, outcomes, frozenset(keys))


def _both_directions(flips: pl.DataFrame) -> pl.DataFrame:
    """The first :data:`MAX_FLIPS`, half improved and half worsened if possible, in the original order."""
    if flips.height <= MAX_FLIPS:
        return flips
    numbered = flips.with_row_index("row")
    better, worse = (numbered.filter(direction=direction) for direction in ("improved", "worsened"))
    half = MAX_FLIPS // 2
    of_better = max(half, MAX_FLIPS - worse.height)
    kept = pl.concat([better.head(of_better), worse.head(MAX_FLIPS - min(of_better, better.height))])
    return kept.sort("row").drop("row")


def _spread(rows: pl.DataFrame) -> pl.DataFrame:
    """A few rows spread over suites."""
    first = rows.with_columns(pl.int_range(pl.len()).over("suite").alias("turn")).sort("turn", maintain_order=True)
    return first.head(EPISODES_PER_OUTCOME).drop("turn")


def _flip_keys(before: str, after: str, flips: pl.DataFrame) -> Iterator[EpisodeKey]:
    for row in flips.iter_rows(named=True):
        for label, side in ((before, "before"), (after, "after")):
            if row[f"{side}_sample"] is not None:
                yield label, row["suite"], row["question_id"], row[f"{side}_sample"]


def href(key: EpisodeKey, beside: EpisodeKey | None = None) -> str:
    """The address of an episode in the episodes page, optionally beside another one."""
    label, suite, question, sample = key
    given = {"system": label, "in": suite, "question": question[:MAX_LISTED], "sample": str(sample)}
    if beside is not None:
        given |= {"beside": beside[0], "beside-sample": str(beside[3])}
    return f"{EPISODES_NAME}#{urlencode({name: storable(value) for name, value in given.items()})}"


def flip_links(
    before: str, after: str, flips: pl.DataFrame, available: frozenset[EpisodeKey]
) -> dict[tuple[str, str, str], str]:
    """The address of the pair for each side of each flip, that side first."""
    links = {}
    for row in flips.iter_rows(named=True):
        keys = {
            side: (label, row["suite"], row["question_id"], row[f"{side}_sample"])
            for label, side in ((before, "before"), (after, "after"))
        }
        for side, other in (("before", "after"), ("after", "before")):
            if keys[side] in available:
                beside = keys[other] if keys[other] in available else None
                links[row["suite"], row["question_id"], side] = href(keys[side], beside)
    return links


# --- reading ----------------------------------------------------------------------------------------------------------


def chosen_rows(report: ReportFrames, keys: frozenset[EpisodeKey]) -> list[EpisodeRow]:
    """Loads the kept episodes with these keys, by system, in question order. Raises RunFolderError."""
    rows: list[EpisodeRow] = []
    for label, evaluation in report.items():
        wanted = {key[1:] for key in keys if key[0] == label}
        if not wanted:
            continue
        if report.folder is not None and (report.folder / "episodes").is_dir():
            found = _from_folder(report.folder, label, wanted)
        elif evaluation.load is not None:
            found = _from_memory(label, evaluation.step, evaluation.episodes, wanted)
        else:
            continue
        rows += found
    return rows


def _from_folder(folder: Path, label: str, wanted: set[tuple[str, str, int]]) -> list[EpisodeRow]:
    keys = pl.DataFrame(
        list(wanted), schema={"data_source": pl.String, "question_id": pl.String, "member": pl.Int64}, orient="row"
    )
    try:
        found = (
            EpisodeStore(folder)
            .frame()
            .filter((pl.col("label") == storable(label)) & pl.col("question_id").is_in(keys["question_id"].to_list()))
            .collect()
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        cause = str(error).partition("\n")[0]
        raise RunFolderError(f"the episodes in {folder} cannot be read: {cause}") from error
    found = found.join(keys, on=keys.columns, how="semi", maintain_order="left")
    # The latest record of a sample counts: a failed one may have been retried.
    found = found.unique(keys.columns, keep="last", maintain_order=True).sort("group", "member")
    return [
        EpisodeRow(episode_from_row(row), row["step"], label, group=row["group"], member=row["member"])
        for row in found.iter_rows(named=True)
    ]


def _from_memory(
    label: str, step: int | None, episodes: Sequence[Episode], wanted: set[tuple[str, str, int]]
) -> list[EpisodeRow]:
    seen: Counter[tuple[str, str]] = Counter()
    rows = []
    for episode in episodes:
        question = episode.question.data_source, episode.question.id
        sample = seen[question]
        seen[question] += 1
        if (storable(question[0]), storable(question[1]), sample) in wanted:
            rows.append(EpisodeRow(episode, step, label, member=sample))
    return rows


def key_of(row: EpisodeRow) -> EpisodeKey:
    """The key of a loaded episode."""
    question = row.episode.question
    return row.label or "", storable(question.data_source), storable(question.id), row.member or 0
