"""The codec of an episode: table rows with fixed schemas, and back. Pure.

Every episode file has exactly :data:`EPISODE_SCHEMA`, so files concatenate without missing or differently typed columns. A
row keeps the full episode, token for token; only log probabilities are reduced to single precision, lone surrogates to U+FFFD, and
question metadata to JSON.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """Question metadata as deterministic ASCII JSON, lone surrogates escaped.

    Tuples become lists, sets sorted lists, numpy values Python values, and other values their ``str`` without the address of a
    default ``repr``. Non-string keys become their JSON.

    Raises:
        RecursionError, ValueError: a value contains itself.
    """
    try:
        return json.dumps(dict(metadata))
    except TypeError:
        return json.dumps(_plain(metadata))


def _plain(value: Any) -> Any:
    """``value`` as JSON-compatible data."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.ndarray | np.generic):
        inner = value.tolist()
        return str(inner) if isinstance(inner, np.generic) else _plain(inner)  # tolist() keeps a longdouble
    if isinstance(value, Mapping):
        return {_key(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Set):
        return sorted(map(_plain, value), key=_set_order)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(inner) for inner in value]
    return _ADDRESS.sub("", str(value))


def _key(value: Any) -> str:
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _set_order(value: Any) -> tuple[float, bool, str]:
    """Numbers by value, then strings, then everything else by its JSON: a total order, which ``<`` on sets and NaN is not."""
    is_number = isinstance(value, int | float) and not math.isnan(value)
    is_text = isinstance(value, str)
    return value if is_number else math.inf, not is_text, value if is_text else json.dumps(value)


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
        "step": pl.Int64,  # optimiser step, from 1; null for evaluations outside a step
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
        "policy_version_min": pl.Int64,  # of the sampling weights: optimiser steps done before
        "policy_version_max": pl.Int64,
        "members": pl.Int64,  # finished
        "failed": pl.Int64,  # failed, or cut by a time limit
    }
)


_EPISODES_AT_ONCE = 128
"""Rows per frame build, to keep each GIL-holding call within milliseconds."""


@dataclass(frozen=True, slots=True)
class GroupOutcome:
    """A group and whether it was trained on."""

    place: int
    """Index of the group in the run; place p is question p mod N of epoch p div N."""
    group: Group
    """May have no episodes if it was cancelled as too slow."""
    drop_reason: str | None = None
    """None: trained on."""


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


def step_rows(step: int, outcomes: Iterable[GroupOutcome], advantages: Advantages = centred) -> list[EpisodeRow]:
    """Rows of a step: for each group its finished episodes, then its failed ones.

    Args:
        step: optimiser step, counted from 1.
        outcomes: every group of the step.
        advantages: the function used in training.
    """
    rows: list[EpisodeRow] = []
    for index, outcome in enumerate(outcomes):
        group, reason = outcome.group, outcome.drop_reason
        rows += [
            EpisodeRow(episode, step, None, outcome.place, index, member, float(advantage), reason is None, reason)
            for member, (episode, advantage) in enumerate(
                zip(group.episodes, advantages(group.rewards) if group.rewards else (), strict=True)
            )
        ]
        rows += [
            EpisodeRow(episode, step, None, outcome.place, index, member, None, False, "failed")
            for member, episode in enumerate(group.failed, start=len(group.episodes))
        ]
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
        played = [(episode, None) for episode in group.episodes] + [(episode, "failed") for episode in group.failed]
        rows += [
            EpisodeRow(episode, place=place, member=member, drop_reason=reason)
            for member, (episode, reason) in enumerate(played)
        ]
        if not played:
            rows.append(EpisodeRow(Episode(group.question, (), (), StopReason.FAILED), place=place))
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
    groups = [outcome.group for outcome in outcomes]
    versions = [group.policy_versions for group in groups]
    values: dict[str, list[Any]] = {
        "step": [step] * len(groups),
        "place": [outcome.place for outcome in outcomes],
        "question_id": _storable(group.question.id for group in groups),
        "data_source": _storable(group.question.data_source for group in groups),
        "trained": [outcome.drop_reason is None for outcome in outcomes],
        "drop_reason": _storable(outcome.drop_reason for outcome in outcomes),
        "reward_mean": [sum(group.rewards) / len(group.rewards) if group.rewards else None for group in groups],
        "policy_version_min": [seen[0] if seen else None for seen in versions],
        "policy_version_max": [seen[-1] if seen else None for seen in versions],
        "members": [len(group.episodes) for group in groups],
        "failed": [len(group.failed) for group in groups],
    }
    return pl.DataFrame({name: pl.Series(values[name], dtype=dtype) for name, dtype in GROUP_SCHEMA.items()})


def episodes_frame(rows: Sequence[EpisodeRow]) -> pl.DataFrame:
    """Rows as an :data:`EPISODE_SCHEMA` frame; no rows give an empty, typed frame.

    Built column by column: polars holds the GIL four times as long when given row dictionaries.
    """
    chunks = [rows[start : start + _EPISODES_AT_ONCE] for start in range(0, len(rows), _EPISODES_AT_ONCE)] or [rows]
    return pl.concat([_frame(chunk) for chunk in chunks], rechunk=True)


def _frame(rows: Sequence[EpisodeRow]) -> pl.DataFrame:
    episodes = [row.episode for row in rows]
    questions = [episode.question for episode in episodes]
    parts = [{storable(name): float(value) for name, value in e.reward_parts.items()} for e in episodes]
    action_counts = [episode.action_token_count for episode in episodes]
    token_counts = [
        len(episode.prompt_tokens) + actions + sum(len(turn.appended_tokens) for turn in episode.turns)
        for episode, actions in zip(episodes, action_counts, strict=True)
    ]
    columns: dict[str, list[Any] | pl.Series] = {
        "step": [row.step for row in rows],
        "label": _storable(row.label for row in rows),
        "question_id": _storable(question.id for question in questions),
        "question": _storable(question.question for question in questions),
        "golden_answers": _texts([question.golden_answers for question in questions]),
        "data_source": _storable(question.data_source for question in questions),
        "metadata": [metadata_json(question.metadata) for question in questions],
        "place": [row.place for row in rows],
        "group": [row.group for row in rows],
        "member": [row.member for row in rows],
        "stop_reason": [episode.stop_reason.value for episode in episodes],
        "answer": _storable(episode.answer for episode in episodes),
        "reward": [float(episode.reward) for episode in episodes],
        **{name: [part.get(name) for part in parts] for name in ("correct", "format", "f1")},
        "reward_parts": _nested(
            pl.DataFrame(
                {"name": [name for part in parts for name in part], "value": [v for p in parts for v in p.values()]},
                schema=_fields(REWARD_PART),
            ).to_struct(),
            [len(part) for part in parts],
        ),
        "advantage": [row.advantage for row in rows],
        "trained": [row.trained for row in rows],
        "drop_reason": _storable(row.drop_reason for row in rows),
        "turn_count": [len(episode.turns) for episode in episodes],
        "token_count": token_counts,
        "ac_tokens": action_counts,
        "ob_tokens": [total - actions for total, actions in zip(token_counts, action_counts, strict=True)],
        "transcript": _storable(map(transcript, episodes)),
        "policy_versions": _numbers(
            [sorted({turn.policy_version for turn in episode.turns}) for episode in episodes], "q", pl.Int64()
        ),
        "seconds": [float(episode.seconds) for episode in episodes],
        "error": _storable(episode.error for episode in episodes),
        "prompt_tokens": _numbers([episode.prompt_tokens for episode in episodes], "i", pl.Int32()),
        "turns": _nested(
            _turns([turn for episode in episodes for turn in episode.turns]),
            [len(episode.turns) for episode in episodes],
        ),
        "given": pl.DataFrame(_calls([episode.given for episode in episodes]), schema=CALL).to_struct(),
    }
    return pl.DataFrame({name: pl.Series(name, columns[name], dtype=dtype) for name, dtype in EPISODE_SCHEMA.items()})


def _turns(turns: Sequence[Turn]) -> pl.Series:
    columns: dict[str, list[Any] | pl.Series] = {
        "text": _storable(turn.text for turn in turns),
        "content": _storable(turn.content for turn in turns),
        **_calls([turn.call for turn in turns]),
        "sampled_tokens": _numbers([turn.sampled_tokens for turn in turns], "i", pl.Int32()),
        "logprobs": _numbers([turn.logprobs for turn in turns], "f", pl.Float32()),
        "appended_tokens": _numbers([turn.appended_tokens for turn in turns], "i", pl.Int32()),
        "policy_version": [turn.policy_version for turn in turns],
        "seconds": [float(turn.seconds) for turn in turns],
        "truncated": [turn.truncated for turn in turns],
        "sequence_id": [turn.sequence_id for turn in turns],
        "cached_prompt_tokens": [turn.cached_prompt_tokens for turn in turns],
    }
    return pl.DataFrame(columns, schema=_fields(TURN)).to_struct()


def _calls(calls: Sequence[SearchCall | None]) -> dict[str, list[Any] | pl.Series]:
    return {
        "queries": _texts([None if call is None else call.queries for call in calls]),
        "passages": _nested(
            _passages([found for call in calls if call is not None for found in call.results]),
            [None if call is None else len(call.results) for call in calls],
        ),
        "problem": _storable(None if call is None else call.problem for call in calls),
        "search_seconds": [None if call is None else float(call.seconds) for call in calls],
    }


def _passages(found: Sequence[Sequence[Passage]]) -> pl.Series:
    """One list of passages per query."""
    passages = [passage for each in found for passage in each]
    columns = {
        "id": _storable(passage.id for passage in passages),
        "title": _storable(passage.title for passage in passages),
        "text": _storable(passage.text for passage in passages),
        "score": [float(passage.score) for passage in passages],
    }
    return _nested(pl.DataFrame(columns, schema=_fields(PASSAGE)).to_struct(), [len(each) for each in found])


def _texts(lists: Sequence[Sequence[str] | None]) -> pl.Series:
    flat = _storable(text for texts in lists for text in texts or ())
    return _nested(pl.Series(flat, dtype=pl.String), [None if texts is None else len(texts) for texts in lists])


def _numbers(lists: Sequence[Sequence[float]], code: str, dtype: pl.DataType) -> pl.Series:
    # struct.pack converts Python numbers faster than numpy.
    packed = b"".join(struct.pack(f"={len(numbers)}{code}", *numbers) for numbers in lists)
    flat = pl.Series(np.frombuffer(packed, code), dtype=dtype)
    return _nested(flat, [len(numbers) for numbers in lists])


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


def _fields(dtype: pl.Struct) -> dict[str, Any]:
    return {field.name: field.dtype for field in dtype.fields}


def _storable(texts: Iterable[str | None]) -> list[str | None]:
    return [None if text is None else storable(text) for text in texts]


def transcript(episode: Episode) -> str:
    """The episode as plain text: question, each turn, each search's passages, answer."""
    lines = [f"[question] {episode.question.question}"]
    if episode.given is not None:
        lines += ["[given with the question]", *_call_lines(episode.given, "nothing")]
    for number, turn in enumerate(episode.turns, start=1):
        lines.append(f"[turn {number}] {turn.text}")
        if turn.call is not None:
            lines += _call_lines(turn.call)
    lines.append(f"[{episode.stop_reason.value}] {episode.answer or ''}".rstrip())
    lines.append(f"[golden] {' | '.join(episode.question.golden_answers)}")
    if episode.error:
        lines.append(f"[error] {episode.error}")
    return "\n".join(lines)


def _call_lines(call: SearchCall, problem: str = "malformed call") -> list[str]:
    lines = [] if call.problem is None else [f"[{problem}] {call.problem}"]
    for query, found in zip(call.queries, call.results, strict=False):
        lines.append(f"[search] {query}")
        lines.extend(f"[passage] {passage.title}: {passage.text}" for passage in found)
    return lines


def episode_from_row(row: Mapping[str, Any]) -> Episode:
    """The episode behind a row of :data:`EPISODE_SCHEMA` (see the module docstring for exactness)."""
    return Episode(
        question=Question(
            id=row["question_id"],
            question=row["question"],
            golden_answers=tuple(row["golden_answers"]),
            data_source=row["data_source"],
            metadata=json.loads(row["metadata"]),
        ),
        prompt_tokens=tuple(row["prompt_tokens"]),
        turns=tuple(_turn_from_row(turn) for turn in row["turns"]),
        stop_reason=StopReason(row["stop_reason"]),
        answer=row["answer"],
        reward=row["reward"],
        reward_parts={part["name"]: part["value"] for part in row["reward_parts"]},
        error=row["error"],
        seconds=row["seconds"],
        given=_call_from_row(row.get("given")),
    )


def _call_from_row(row: Mapping[str, Any] | None) -> SearchCall | None:
    if row is None or row["queries"] is None:
        return None
    return SearchCall(
        queries=tuple(row["queries"]),
        results=tuple(tuple(Passage(**passage) for passage in found) for found in row["passages"] or ()),
        problem=row["problem"],
        seconds=row["search_seconds"],
    )


def _turn_from_row(row: Mapping[str, Any]) -> Turn:
    return Turn(
        sampled_tokens=tuple(row["sampled_tokens"]),
        logprobs=tuple(row["logprobs"]),
        text=row["text"],
        content=row["content"],
        policy_version=row["policy_version"],
        call=_call_from_row(row),
        appended_tokens=tuple(row["appended_tokens"]),
        seconds=row["seconds"],
        truncated=row["truncated"],
        sequence_id=row.get("sequence_id"),
        cached_prompt_tokens=row.get("cached_prompt_tokens") or 0,
    )
