"""The codec of an episode: table rows with fixed schemas, and back. Pure.

Every episode file has exactly :data:`EPISODE_SCHEMA`, so files concatenate without missing or differently typed columns. A
row keeps the full episode, token for token; only log probabilities are reduced to single precision, lone surrogates to U+FFFD, and
question metadata to JSON.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any, cast

import numpy as np
import polars as pl

from searchr1_async.episodes.types import Episode, Group, GroupOutcome, Passage, Question, SearchCall, StopReason, Turn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """Question metadata as deterministic ASCII JSON.

    Sets become sorted lists, numpy values Python values, and other values their ``str`` without the address of a default ``repr``.
    Keys that are no texts become their JSON.
    """
    try:
        return json.dumps(dict(metadata), default=_plain)
    except TypeError:  # a mapping inside has keys that JSON has not
        return json.dumps(_with_text_keys(metadata), default=_plain)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else json.dumps(key, default=_plain): _with_text_keys(inner)
            for key, inner in value.items()
        }
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and type(value) is not np.longdouble:
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Set):
        return sorted(
            value, key=lambda each: (type(each).__name__, each) if isinstance(each, str | int) else ("", str(each))
        )
    return _ADDRESS.sub("", str(value))


REWARD_PART = pl.Struct({"name": pl.String, "value": pl.Float64})

PASSAGE = pl.Struct({"id": pl.String, "title": pl.String, "text": pl.String, "score": pl.Float64})

CALL: dict[str, Any] = {
    "queries": pl.List(pl.String),  # null: no call; empty: a malformed call
    "passages": pl.List(pl.List(PASSAGE)),  # per query; null or empty when the search was not run
    "problem": pl.String,
    "search_seconds": pl.Float64,
}

TURN = pl.Struct(
    {
        "text": pl.String,
        "content": pl.String,
        **CALL,
        "sampled_tokens": pl.List(pl.Int32),
        "logprobs": pl.List(pl.Float32),
        "appended_tokens": pl.List(pl.Int32),
        "policy_version": pl.Int64,
        "seconds": pl.Float64,
        "truncated": pl.Boolean,
        # Added later: older files lack the columns below.
        "sequence_id": pl.String,
        "cached_prompt_tokens": pl.Int64,
    }
)

EPISODE_SCHEMA = pl.Schema(
    {
        "step": pl.Int64,  # optimizer step, from 1; null for evaluations outside a step
        "label": pl.String,  # evaluation name; null in training
        "question_id": pl.String,
        "question": pl.String,
        "golden_answers": pl.List(pl.String),
        "data_source": pl.String,
        "metadata": pl.String,  # JSON
        "place": pl.Int64,  # index of the group in the run; null in an evaluation
        "group": pl.Int64,  # index of the group in its step
        "member": pl.Int64,  # index of the episode in its group
        "stop_reason": pl.String,
        "answer": pl.String,
        "reward": pl.Float64,
        "correct": pl.Float64,
        "format": pl.Float64,
        "f1": pl.Float64,
        "reward_parts": pl.List(REWARD_PART),  # all reward parts, by name
        "advantage": pl.Float64,  # as used in training; null for failed episodes and in evaluations
        "trained": pl.Boolean,
        "drop_reason": pl.String,  # null when trained
        "turn_count": pl.Int64,
        "token_count": pl.Int64,
        "ac_tokens": pl.Int64,
        "ob_tokens": pl.Int64,  # tokens read but not sampled, each counted once
        "transcript": pl.String,
        "policy_versions": pl.List(pl.Int64),
        "seconds": pl.Float64,
        "error": pl.String,
        "prompt_tokens": pl.List(pl.Int32),
        "turns": pl.List(TURN),
        # Passages placed in the prompt; null queries: none. Last column: older files lack it.
        "given": pl.Struct(CALL),
    }
)

GROUP_SCHEMA = pl.Schema(
    {
        "step": pl.Int64,
        "place": pl.Int64,
        "question_id": pl.String,
        "data_source": pl.String,
        "trained": pl.Boolean,
        "drop_reason": pl.String,  # null when trained
        "reward_mean": pl.Float64,  # over finished members; null if there are none
        "policy_version_min": pl.Int64,  # of the sampling weights: optimizer steps done before
        "policy_version_max": pl.Int64,
        "members": pl.Int64,  # finished
        "failed": pl.Int64,  # failed, or cut by a time limit
    }
)


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """An episode with its group's or evaluation's data; fields are named as their columns."""

    episode: Episode
    step: int | None = None
    label: str | None = None
    place: int | None = None
    group: int | None = None
    member: int | None = None
    advantage: float | None = None
    trained: bool | None = None
    drop_reason: str | None = None


def storable(text: str) -> str:
    """``text`` as valid UTF-8: surrogate pairs joined, lone surrogates replaced by U+FFFD.

    Model output decoded token by token may contain either, and Arrow rejects both. Control characters are kept.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


Advantages = Callable[[Sequence[float]], Sequence[float]]
"""Maps a group's rewards to advantages, in order."""


def centred(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the group mean."""
    mean = sum(rewards) / len(rewards) if rewards else 0.0
    return [reward - mean for reward in rewards]


def _members(group: Group) -> list[tuple[Episode, str | None]]:
    """Finished episodes, then failed ones with that as their drop reason."""
    return [*((episode, None) for episode in group.episodes), *((episode, "failed") for episode in group.failed)]


def step_rows(step: int, outcomes: Iterable[GroupOutcome], advantages: Advantages = centred) -> list[EpisodeRow]:
    """Rows of a step: for each group its finished episodes, then its failed ones."""
    rows: list[EpisodeRow] = []
    for index, outcome in enumerate(outcomes):
        group = outcome.group
        values = [*map(float, advantages(group.rewards))] if group.rewards else []
        for member, (episode, failed) in enumerate(_members(group)):
            reason = failed or outcome.drop_reason
            value = None if failed else values[member]
            rows.append(EpisodeRow(episode, step, None, outcome.place, index, member, value, reason is None, reason))
    return rows


def evaluation_rows(label: str, episodes: Sequence[Episode], step: int | None = None) -> list[EpisodeRow]:
    """Rows of an evaluation; ``group`` and ``member`` number the questions and the samples per question."""
    groups: dict[tuple[str, str], int] = {}
    members: dict[int, int] = {}
    rows: list[EpisodeRow] = []
    for episode in episodes:
        group = groups.setdefault((episode.question.data_source, episode.question.id), len(groups))
        member = members[group] = members.get(group, -1) + 1
        rows.append(EpisodeRow(episode, step, label, group=group, member=member, trained=False))
    return rows


def kept_groups_frame(groups: Mapping[int, Group]) -> pl.DataFrame:
    """Groups by place as an :data:`EPISODE_SCHEMA` frame; failed episodes have a drop reason, and a group without episodes has one
    row without a ``member``."""
    rows: list[EpisodeRow] = []
    for place, group in groups.items():
        rows += [
            EpisodeRow(episode, place=place, member=member, drop_reason=reason)
            for member, (episode, reason) in enumerate(_members(group))
        ] or [EpisodeRow(Episode(group.question, (), (), StopReason.FAILED), place=place)]
    return episodes_frame(rows)


def groups_from_frame(frame: pl.DataFrame) -> dict[int, Group]:
    """The groups behind :func:`kept_groups_frame`, by place; their episodes share one question."""
    groups: dict[int, Group] = {}
    for row in frame.iter_rows(named=True):
        place, episode = int(row["place"]), episode_from_row(row)
        group = groups.get(place) or Group(episode.question, ())
        episode = replace(episode, question=group.question)
        if row["member"] is None:
            groups[place] = group
        elif row["drop_reason"] is None:
            groups[place] = replace(group, episodes=(*group.episodes, episode))
        else:
            groups[place] = replace(group, failed=(*group.failed, episode))
    return groups


def groups_frame(step: int, outcomes: Sequence[GroupOutcome]) -> pl.DataFrame:
    """A step's groups as a :data:`GROUP_SCHEMA` frame."""
    rows = []
    for outcome in outcomes:
        group, reason = outcome.group, outcome.drop_reason
        versions = group.policy_versions or (None,)
        mean = sum(group.rewards) / len(group.rewards) if group.rewards else None
        rows.append(
            (
                *(step, outcome.place, storable(group.question.id), storable(group.question.data_source)),
                *(reason is None, None if reason is None else storable(reason), mean, versions[0], versions[-1]),
                *(len(group.episodes), len(group.failed)),
            )
        )
    return pl.DataFrame(rows, schema=GROUP_SCHEMA, orient="row")


def episodes_frame(rows: Sequence[EpisodeRow]) -> pl.DataFrame:
    """Rows as an :data:`EPISODE_SCHEMA` frame; no rows give an empty, typed frame."""
    # In parts, to keep each call that holds the GIL within milliseconds.
    parts = [rows[start : start + 128] for start in range(0, len(rows), 128)] or [rows]
    schema = pl.Struct(EPISODE_SCHEMA)
    return pl.concat([_column(schema, [_cells(row) for row in part]).struct.unnest() for part in parts], rechunk=True)


def _cells(row: EpisodeRow) -> tuple[Any, ...]:
    """The values of a row in the order of :data:`EPISODE_SCHEMA`, nested values as tuples."""
    episode, question = row.episode, row.episode.question
    parts = {storable(name): value for name, value in episode.reward_parts.items()}
    total, actions = episode.token_count, episode.action_token_count
    return (
        *(row.step, row.label, question.id, question.question, question.golden_answers, question.data_source),
        *(metadata_json(question.metadata), row.place, row.group, row.member),
        *(episode.stop_reason.value, episode.answer, episode.reward),
        *(parts.get("correct"), parts.get("format"), parts.get("f1"), tuple(parts.items())),
        *(row.advantage, row.trained, row.drop_reason),
        *(len(episode.turns), total, actions, total - actions, episode.transcript),
        sorted({turn.policy_version for turn in episode.turns}),
        *(episode.seconds, episode.error, episode.prompt_tokens),
        [_turn_cells(turn) for turn in episode.turns],
        _call_cells(episode.given),
    )


_PASSAGE_CELLS = attrgetter(*PASSAGE.to_schema())
_SAMPLED_CELLS = attrgetter(
    *[name for name in TURN.to_schema() if name not in CALL and name not in ("text", "content")]
)


def _turn_cells(turn: Turn) -> tuple[Any, ...]:
    return (turn.text, turn.content, *_call_cells(turn.call), *_SAMPLED_CELLS(turn))


def _call_cells(call: SearchCall | None) -> tuple[Any, ...]:
    if call is None:
        return (None, None, None, None)
    passages = [[*map(_PASSAGE_CELLS, found)] for found in call.results]
    return (call.queries, passages, call.problem, call.seconds)


_CODES = {pl.Int32: "i", pl.Float32: "f"}
"""Of the numbers of tokens. ``struct.pack`` converts them faster than numpy and polars."""


def _column(dtype: Any, values: Sequence[Any]) -> pl.Series:
    """Values as a column; those of a struct are tuples.

    Built from flat columns: polars holds the GIL four times as long when given nested values.
    """
    if isinstance(dtype, pl.Struct):
        schema = dtype.to_schema()
        columns = zip(*values, strict=True) if values else ([] for _ in schema)
        fields = zip(schema.items(), columns, strict=True)
        return pl.DataFrame([_column(inner, cells).alias(name) for (name, inner), cells in fields]).to_struct()
    if isinstance(dtype, pl.List):
        if code := _CODES.get(cast(Any, dtype.inner)):
            packed = b"".join([struct.pack(f"={len(cells)}{code}", *cells) for cells in values])
            flat = pl.Series(np.frombuffer(packed, code))
        else:
            flat = _column(dtype.inner, list(chain.from_iterable(filter(None, values))))
        return _nested(flat, [None if cells is None else len(cells) for cells in values])
    if dtype == pl.String:
        values = [None if text is None else storable(text) for text in values]
    return pl.Series(values, dtype=dtype)


def _nested(values: pl.Series, lengths: Sequence[int | None]) -> pl.Series:
    """Split ``values`` into consecutive lists of the given lengths; None gives a null."""
    row = np.repeat(np.arange(len(lengths)), [length or 0 for length in lengths])
    lists = (
        pl.DataFrame([pl.Series("row", row).set_sorted(), values.alias("values")])
        .group_by("row", maintain_order=True)
        .agg("values")["values"]
    )
    if len(lists) == len(lengths):
        return lists
    # Only non-empty lists came out of the group-by: append an empty one and gather by index.
    lists.append(pl.Series([[]], dtype=lists.dtype))
    filled = iter(range(len(lists) - 1))
    take = [None if length is None else next(filled) if length else len(lists) - 1 for length in lengths]
    return lists.gather(pl.Series(take, dtype=pl.UInt32))


def episode_from_row(row: Mapping[str, Any]) -> Episode:
    """The episode behind a row of :data:`EPISODE_SCHEMA` (see the module docstring for exactness)."""
    return Episode(
        question=Question(
            row["question_id"],
            row["question"],
            tuple(row["golden_answers"]),
            row["data_source"],
            json.loads(row["metadata"]),
        ),
        prompt_tokens=tuple(row["prompt_tokens"]),
        turns=tuple(map(_turn, row["turns"])),
        stop_reason=StopReason(row["stop_reason"]),
        reward_parts={part["name"]: part["value"] for part in row["reward_parts"]},
        given=_call(row.get("given")),
        **{name: row[name] for name in ("answer", "reward", "error", "seconds")},
    )


def _call(row: Mapping[str, Any] | None) -> SearchCall | None:
    if row is None or row["queries"] is None:
        return None
    results = tuple(tuple(Passage(**passage) for passage in found) for found in row["passages"] or ())
    return SearchCall(tuple(row["queries"]), results, row["problem"], row["search_seconds"])


def _turn(row: Mapping[str, Any]) -> Turn:
    return Turn(
        call=_call(row),
        sequence_id=row.get("sequence_id"),
        cached_prompt_tokens=row.get("cached_prompt_tokens") or 0,
        **{name: tuple(row[name]) for name in ("sampled_tokens", "logprobs", "appended_tokens")},
        **{name: row[name] for name in ("text", "content", "policy_version", "seconds", "truncated")},
    )
