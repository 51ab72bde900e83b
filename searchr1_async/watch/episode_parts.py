"""An episode as data for all its views: texts, the log probability of each token, and packed chunks for the page's script.

A tokenizer's pieces are only used if they concatenate exactly to the turn's text. The page's data are a small index over all
episodes and chunks that are unpacked on demand: JSON, gzipped, in base64, so no episode text appears in the page's markup.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice, pairwise
from typing import Any

from searchr1_async.episodes.table import EpisodeRow
from searchr1_async.episodes.types import Episode, SearchCall, StopReason, Turn
from searchr1_async.watch.markup import (
    KEPT,
    MARKS,
    MAX_LINE,
    MAX_PASSAGE,
    MAX_TEXT,
    STOP_WORDS,
    SUSPECT_RANGES,
    TOO_LONG,
    Kind,
    counted,
    learning_words,
    reward_words,
    segments,
    source_words,
    tokens,
    verdict,
)

_UNFINISHED = "\ufffd"
_MAX_JOINED = 16
"""Maximum tokens joined into one piece of valid text; an emoji takes up to 4 bytes, a flag 8."""
LEVELS = (0.9, 0.5, 0.2, 0.05, 0.01)
"""Probability thresholds between shades: from the first on a token is uncoloured, below the last it is the most intense."""
CHUNK = 50
"""Episodes per chunk, which is unpacked within milliseconds."""
MAX_LISTED = 300
"""Maximum characters of an answer or a question id in the index; chunks have the full text."""
_newest: Any = None


def remember_tokenizer(tokenizer: Any) -> None:
    """Colour the tokens of episodes that this tokenizer decoded, until another one is given.

    It is kept alive, because notebooks show episodes after their service has closed.
    """
    global _newest
    _newest = tokenizer


def tokenizer_of(episode: Episode) -> Any:
    """The remembered tokenizer if it matches every turn of the episode, else None."""
    matches = all(turn_pieces(_newest, turn.sampled_tokens, turn.text) is not None for turn in episode.turns)
    return _newest if matches else None


def token_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str] | None:
    """The text of each token, as long as ``token_ids``; None if the tokenizer cannot decode them.

    Tokens that are valid UTF-8 only together have their text at the first of them, and ``""`` at the others. Compare with the
    expected text: see :func:`turn_pieces`.
    """
    pieces: list[str] = []
    at = 0
    try:
        while at < len(token_ids):
            text, end = _alone(tokenizer, token_ids[at]), at + 1
            longest = min(len(token_ids), at + _MAX_JOINED)
            while _UNFINISHED in text and end < longest:
                end += 1
                text = tokenizer.decode(list(token_ids[at:end]))
            pieces += [text, *[""] * (end - at - 1)]
            at = end
    except Exception:  # unknown ids: tokenizers raise different errors
        return None
    return pieces


@lru_cache(maxsize=1 << 18)
def _alone(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token])


def turn_pieces(tokenizer: Any, token_ids: Sequence[int], text: str) -> list[str] | None:
    """:func:`token_pieces` if they concatenate to ``text``; otherwise, and without a tokenizer, None."""
    if tokenizer is None or not token_ids:
        return None
    pieces = token_pieces(tokenizer, token_ids)
    return pieces if pieces is not None and "".join(pieces) == text else None


def joined_logprobs(pieces: Sequence[str], logprobs: Sequence[float]) -> list[tuple[str, float | None]]:
    """Non-empty pieces, each with the summed log probability of its tokens; None if one is not finite."""
    out: list[tuple[str, float]] = []
    for piece, logprob in zip(pieces, logprobs, strict=True):
        if piece or not out:
            out.append((piece, logprob))
        else:
            out[-1] = (out[-1][0], out[-1][1] + logprob)
    return [(piece, float(logprob) if math.isfinite(logprob) else None) for piece, logprob in out]


def overlaid(
    text: str, kinds: Sequence[tuple[Kind, int]], pieces: Sequence[tuple[str, Any]], limit: int = MAX_TEXT
) -> list[tuple[Kind, list[tuple[str, Any]]]]:
    """The first ``limit`` characters by kind, each segment split at piece boundaries. A piece that spans two kinds is in both."""
    end = min(limit, len(text))
    kind_ends = list(accumulate(length for _, length in kinds))
    piece_ends = list(accumulate(len(piece) for piece, _ in pieces))
    cuts = sorted({0, end, *(place for place in (*kind_ends, *piece_ends) if place < end)})
    out: list[tuple[Kind, list[tuple[str, Any]]]] = []
    last = -1
    for start, stop in pairwise(cuts):
        place = bisect_right(kind_ends, start)
        if place != last:
            out.append((kinds[place][0], []))
            last = place
        out[-1][1].append((text[start:stop], pieces[bisect_right(piece_ends, start)][1]))
    return out


def episode_data(row: EpisodeRow, tokenizer: Any = None) -> dict[str, Any]:
    """What every view of an episode shows, as JSON values; the texts are untrusted."""
    episode, question = row.episode, row.episode.question
    facts = [
        "" if row.advantage is None else f"advantage {row.advantage:+.2f}",
        counted(len(episode.turns), "turn"),
        f"{tokens(episode.token_count)}, {episode.action_token_count:,} of them sampled",
        f"{episode.seconds:.1f} s",
        question.data_source,
        question.id,
    ]
    return {
        "source": source_words(row.step, row.label),
        "question": question.question,
        "golden": question.golden_answers[:20],
        "verdict": verdict(episode),
        "answer": episode.answer,
        "outcome": f"{reward_words(episode)} · stopped ({episode.stop_reason.value}): {STOP_WORDS[episode.stop_reason]}",
        "error": episode.error,
        "facts": " · ".join(filter(None, facts)),
        "learning": learning_words(row),
        "learned": None if row.label is not None else row.trained,
        "given": _call(episode.given, "none"),
        "prompt": _read("prompt", episode.prompt_tokens, tokenizer),
        "turns": [_turn(turn, number, tokenizer) for number, turn in enumerate(episode.turns, start=1)],
    }


def _turn(turn: Turn, number: int, tokenizer: Any) -> dict[str, Any]:
    pieces = turn_pieces(tokenizer, turn.sampled_tokens, turn.text)
    coloured: list[tuple[str, float | None]] = [(turn.text, None)]
    if is_coloured := pieces is not None and len(turn.logprobs) == len(pieces):
        coloured = joined_logprobs(pieces or [], turn.logprobs)
    thousandths = [(piece, None if logprob is None else round(1000 * logprob)) for piece, logprob in coloured]
    head = f"turn {number} · {tokens(len(turn.sampled_tokens))} · weights after step {turn.policy_version} · {turn.seconds:.1f} s"
    return {
        "head": head + " · cut at the token limit" * turn.truncated,
        "isColoured": is_coloured,
        "stretches": overlaid(turn.text, segments(turn.text, turn.content), thousandths),
        "rest": turn.text[MAX_TEXT:],
        "call": _call(turn.call),
        "appended": _read("appended to the turn", turn.appended_tokens, tokenizer),
    }


def _call(call: SearchCall | None, if_wrong: str = "malformed call") -> dict[str, Any] | None:
    """A problem, and each query with its passages; None instead of them for a query that was not run."""
    if call is None:
        return None
    searches: list[dict[str, Any]] = []
    for place, query in enumerate(call.queries):
        found = call.results[place] if place < len(call.results) else None
        facts = "not run" if found is None else f"{counted(len(found), 'passage')}, {call.seconds:.2f} s"
        passages = None if found is None else [(each.title, f"{each.score:.3f}", each.text) for each in found]
        searches.append({"query": query, "facts": facts, "passages": passages})
    problem = None if call.problem is None else f"{if_wrong}: {call.problem}"
    return {"problem": problem, "searches": searches}


def _read(name: str, token_ids: tuple[int, ...], tokenizer: Any) -> tuple[str, str | None] | None:
    """Tokens that the model read: what they are, and their text if it is known."""
    if not token_ids:
        return None
    return f"{name}: {tokens(len(token_ids))}, not trained on", _decoded(tokenizer, token_ids)


@lru_cache(maxsize=256)
def _decoded(tokenizer: Any, token_ids: tuple[int, ...]) -> str | None:
    pieces = None if tokenizer is None else token_pieces(tokenizer, token_ids)
    return None if pieces is None else "".join(pieces)


def blocks(rows: Iterable[EpisodeRow], tokenizer: Any, about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The page's data blocks, as name and content: ``chunk-0``, ``chunk-1``, …, then ``index``.

    Args:
        rows: consumed one by one, never all in memory.
        tokenizer: for token pieces; None omits them.
        about: ``title`` and ``notes`` of the page.
    """
    listed: list[dict[str, Any]] = []
    left = iter(rows)
    for number, part in enumerate(iter(lambda: list(islice(left, CHUNK)), [])):
        listed += map(_listed, part)
        yield f"chunk-{number}", compressed([episode_data(row, tokenizer) for row in part])
    rules = {  # shared with the script, so that they are defined once
        "chunk": CHUNK,
        "flags": {name: label for name, (label, _) in _FLAGS.items()},
        "marks": MARKS,
        "levels": LEVELS,
        "suspects": {"ranges": SUSPECT_RANGES, "kept": KEPT},
        "limits": {"text": MAX_TEXT, "passage": MAX_PASSAGE, "line": MAX_LINE},
    }
    yield "index", compressed({**about, **rules, "rows": listed})


def compressed(value: Any) -> str:
    """JSON, gzipped, in base64. Deterministic."""
    # ASCII: lone surrogates, invalid in UTF-8, become escapes that JavaScript can read.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode("ascii")


def _listed(row: EpisodeRow) -> dict[str, Any]:
    """The row of the list, by which it is filtered and sorted."""
    episode, question = row.episode, row.episode.question
    return {
        "id": question.id[:MAX_LISTED],
        "suite": question.data_source,
        "question": question.question[:MAX_LINE],
        "source": source_words(row.step, row.label),
        "label": row.label,
        "member": row.member,
        "answer": None if episode.answer is None else episode.answer[:MAX_LISTED],
        "verdict": verdict(episode),
        "flags": [name for name, (_, is_set) in _FLAGS.items() if is_set(row)],
        "reward": _number(episode.reward) if episode.is_complete else None,
        "advantage": _number(row.advantage),
        "turns": len(episode.turns),
        "tokens": episode.token_count,
        "seconds": _number(episode.seconds),
    }


def _is_malformed(episode: Episode) -> bool:
    return episode.stop_reason is StopReason.MALFORMED_CALL or any(call.problem is not None for call in episode.calls)


_FLAGS: dict[str, tuple[str, Callable[[EpisodeRow], bool]]] = {
    "right": ("right", lambda row: verdict(row.episode) == "right"),
    "wrong": ("wrong", lambda row: verdict(row.episode) == "wrong"),
    "nosearch": (
        "no search",
        lambda row: not any(call and call.results for call in (row.episode.given, *row.episode.calls)),
    ),
    "toolong": ("too long", lambda row: row.episode.stop_reason in TOO_LONG),
    "failed": ("failed", lambda row: not row.episode.is_complete),
    "malformed": ("malformed", lambda row: _is_malformed(row.episode)),
    "dropped": ("not trained on", lambda row: row.trained is False and row.label is None),
}
"""Filters of the list, name to label and rule."""


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
