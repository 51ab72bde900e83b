"""Episodes as rows of a table with one fixed schema, and rows as episodes again. Pure.

Every file that holds episodes has exactly :data:`EPISODE_SCHEMA`, so that any two of them concatenate and a reader
never meets a missing or differently typed column. A row holds everything that its episode held, token for token;
only log probabilities are kept in single precision, in which samplers give them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn

PASSAGE = pl.Struct({"id": pl.String, "title": pl.String, "text": pl.String, "score": pl.Float64})

TURN = pl.Struct(
    {
        "text": pl.String,
        "content": pl.String,
        "queries": pl.List(pl.String),  # null: the turn made no call; empty: a malformed one
        "passages": pl.List(pl.List(PASSAGE)),  # for each query; null or empty when the search was not run
        "problem": pl.String,
        "search_seconds": pl.Float64,
        "sampled_tokens": pl.List(pl.Int32),
        "logprobs": pl.List(pl.Float32),
        "appended_tokens": pl.List(pl.Int32),
        "policy_version": pl.Int64,
        "seconds": pl.Float64,
        "truncated": pl.Boolean,
    }
)

EPISODE_SCHEMA = pl.Schema(
    {
        "step": pl.Int64,  # optimiser step, counted from 1; null in an evaluation that belongs to none
        "label": pl.String,  # name of the evaluation; null in training
        "question_id": pl.String,
        "question": pl.String,
        "golden_answers": pl.List(pl.String),
        "data_source": pl.String,
        "metadata": pl.String,  # JSON
        "group": pl.Int64,  # place of the question in its step
        "member": pl.Int64,  # place of the episode in its group
        "stop_reason": pl.String,
        "answer": pl.String,
        "reward": pl.Float64,
        "correct": pl.Float64,
        "format": pl.Float64,
        "f1": pl.Float64,
        "reward_parts": pl.List(pl.Struct({"name": pl.String, "value": pl.Float64})),  # all of them, by name
        "advantage": pl.Float64,  # reward - mean reward of the group; null for failed episodes and in evaluations
        "trained": pl.Boolean,
        "drop_reason": pl.String,  # null when trained
        "turn_count": pl.Int64,
        "token_count": pl.Int64,
        "ac_tokens": pl.Int64,
        "ob_tokens": pl.Int64,  # tokens read and not written, each counted once
        "transcript": pl.String,
        "policy_versions": pl.List(pl.Int64),
        "seconds": pl.Float64,
        "error": pl.String,
        "prompt_tokens": pl.List(pl.Int32),
        "turns": pl.List(TURN),
    }
)


_ROWS_AT_ONCE = 32


def storable(text: str) -> str:
    """``text`` as valid UTF-8: surrogate pairs joined, lone surrogates replaced by U+FFFD.

    A model's bytes, decoded token by token, may hold either, and Arrow takes neither. NUL and every other control
    character is valid and kept.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def group_rows(step: int, groups: Iterable[tuple[Group, str | None]]) -> list[dict[str, Any]]:
    """The rows of a step: for each group its finished episodes, then its failed ones.

    Args:
        step: optimiser step, counted from 1.
        groups: each with None when it was trained on, else with the reason for which it was dropped.
    """
    rows: list[dict[str, Any]] = []
    for index, (group, drop_reason) in enumerate(groups):
        mean = sum(group.rewards) / len(group.rewards) if group.rewards else 0.0
        for member, episode in enumerate(group.episodes):
            row = episode_row(episode)
            row.update(step=step, group=index, member=member, advantage=episode.reward - mean)
            row.update(trained=drop_reason is None, drop_reason=_text(drop_reason))
            rows.append(row)
        for member, episode in enumerate(group.failed, start=len(group.episodes)):
            row = episode_row(episode)
            row.update(step=step, group=index, member=member, trained=False, drop_reason="failed")
            rows.append(row)
    return rows


def evaluation_rows(label: str, episodes: Sequence[Episode], step: int | None = None) -> list[dict[str, Any]]:
    """The rows of an evaluation; ``group`` and ``member`` number the questions and each question's samples."""
    groups: dict[tuple[str, str], int] = {}
    members: dict[int, int] = {}
    rows: list[dict[str, Any]] = []
    for episode in episodes:
        group = groups.setdefault((episode.question.data_source, episode.question.id), len(groups))
        member = members[group] = members.get(group, -1) + 1
        row = episode_row(episode)
        row.update(step=step, label=storable(label), group=group, member=member, trained=False)
        rows.append(row)
    return rows


def episodes_frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a frame of exactly :data:`EPISODE_SCHEMA`; no rows give an empty, typed frame."""
    # polars holds the interpreter's lock while it reads Python objects: about 0.4 ms an episode. In one piece, a step of
    # 1,024 episodes would stop the event loop for 0.4 s though this runs in a worker thread.
    chunks = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)] or [rows]
    return pl.concat([_frame(chunk) for chunk in chunks])


def _frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            pl.Series(name, [row.get(name) for row in rows], dtype=dtype, strict=False)
            for name, dtype in EPISODE_SCHEMA.items()
        ]
    )


def episode_row(episode: Episode) -> dict[str, Any]:
    """One episode as a row; what only its group or evaluation knows is left for the caller to add."""
    question = episode.question
    parts = {storable(name): float(value) for name, value in episode.reward_parts.items()}
    ac_tokens = episode.action_token_count
    token_count = len(episode.prompt_tokens) + ac_tokens + sum(len(turn.appended_tokens) for turn in episode.turns)
    return {
        "question_id": storable(question.id),
        "question": storable(question.question),
        "golden_answers": [storable(answer) for answer in question.golden_answers],
        "data_source": storable(question.data_source),
        "metadata": json.dumps(dict(question.metadata), default=str, skipkeys=True),
        "stop_reason": episode.stop_reason.value,
        "answer": _text(episode.answer),
        "reward": float(episode.reward),
        "correct": parts.get("correct"),
        "format": parts.get("format"),
        "f1": parts.get("f1"),
        "reward_parts": [{"name": name, "value": value} for name, value in parts.items()],
        "turn_count": len(episode.turns),
        "token_count": token_count,
        "ac_tokens": ac_tokens,
        "ob_tokens": token_count - ac_tokens,
        "transcript": storable(transcript(episode)),
        "policy_versions": sorted({turn.policy_version for turn in episode.turns}),
        "seconds": float(episode.seconds),
        "error": _text(episode.error),
        "prompt_tokens": list(episode.prompt_tokens),
        "turns": [_turn_row(turn) for turn in episode.turns],
    }


def _turn_row(turn: Turn) -> dict[str, Any]:
    call = turn.call
    return {
        "text": storable(turn.text),
        "content": storable(turn.content),
        "queries": None if call is None else [storable(query) for query in call.queries],
        "passages": None if call is None else [[_passage_row(p) for p in found] for found in call.results],
        "problem": None if call is None else _text(call.problem),
        "search_seconds": None if call is None else float(call.seconds),
        "sampled_tokens": list(turn.sampled_tokens),
        "logprobs": list(turn.logprobs),
        "appended_tokens": list(turn.appended_tokens),
        "policy_version": turn.policy_version,
        "seconds": float(turn.seconds),
        "truncated": turn.truncated,
    }


def _passage_row(passage: Passage) -> dict[str, Any]:
    return {
        "id": storable(passage.id),
        "title": storable(passage.title),
        "text": storable(passage.text),
        "score": float(passage.score),
    }


def _text(text: str | None) -> str | None:
    return None if text is None else storable(text)


def transcript(episode: Episode) -> str:
    """The whole episode as plain text: question, each turn's text, each search's passages, answer. For people."""
    lines = [f"[question] {episode.question.question}"]
    for number, turn in enumerate(episode.turns, start=1):
        lines.append(f"[turn {number}] {turn.text}")
        if turn.call is None:
            continue
        if turn.call.problem is not None:
            lines.append(f"[malformed call] {turn.call.problem}")
        for query, found in zip(turn.call.queries, turn.call.results, strict=False):
            lines.append(f"[search] {query}")
            lines.extend(f"[passage] {passage.title}: {passage.text}" for passage in found)
    lines.append(f"[{episode.stop_reason.value}] {episode.answer or ''}".rstrip())
    lines.append(f"[golden] {' | '.join(episode.question.golden_answers)}")
    if episode.error:
        lines.append(f"[error] {episode.error}")
    return "\n".join(lines)


def episode_from_row(row: Mapping[str, Any]) -> Episode:
    """The episode that a row of :data:`EPISODE_SCHEMA` was made from (see the module's docstring for exactness)."""
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
    )


def _turn_from_row(row: Mapping[str, Any]) -> Turn:
    call = None
    if row["queries"] is not None:
        call = SearchCall(
            queries=tuple(row["queries"]),
            results=tuple(tuple(Passage(**passage) for passage in found) for found in row["passages"] or ()),
            problem=row["problem"],
            seconds=row["search_seconds"],
        )
    return Turn(
        sampled_tokens=tuple(row["sampled_tokens"]),
        logprobs=tuple(row["logprobs"]),
        text=row["text"],
        content=row["content"],
        policy_version=row["policy_version"],
        call=call,
        appended_tokens=tuple(row["appended_tokens"]),
        seconds=row["seconds"],
        truncated=row["truncated"],
    )
