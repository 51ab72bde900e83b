"""What all views of an episode share: safe HTML of untrusted text, segments of a turn, words for outcomes, styles. Pure."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal, TypeVar

from searchr1_async.episodes.types import Episode, StopReason

MAX_TEXT = 20_000
"""Maximum characters shown of a turn, prompt or result."""

MAX_PASSAGE = 5_000
MAX_LINE = 2_000
"""Maximum for single-line texts: title, query, answer."""

_KEPT = "\u200c\u200d\ufe0f"
"""Zero-width non-joiner and joiner occur in correct Persian, Hindi and emoji; U+FE0F selects an emoji's coloured form."""

SUSPECT_RANGES = (
    (0x00, 0x08), (0x0B, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160),
    (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x2028, 0x202F), (0x2060, 0x206F), (0x3164, 0x3164),
    (0xD800, 0xDFFF), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB), (0xE0000, 0xE0FFF),
)  # fmt: skip
"""Inclusive ranges of code points that are invisible or change how others display; those in :data:`_KEPT` are let through."""

_SUSPECT = re.compile(
    f"(?![{_KEPT}])[{''.join(f'{re.escape(chr(a))}-{re.escape(chr(b))}' for a, b in SUSPECT_RANGES)}]"
)


def visible(text: str) -> str:
    """``text`` as safe HTML.

    Markup is escaped; control characters (NUL, ANSI escapes), bidi marks, invisible characters and lone surrogates become small
    labels with their code point. Newlines and tabs are kept.
    """
    out: list[str] = []
    end = 0
    text = text.replace("\r\n", "\n")
    for match in _SUSPECT.finditer(text):
        char = match[0]
        out.append(escape(text[end : match.start()]))
        out.append(f'<span class="mark" title="{escape(_name(char))}">{_label(char)}</span>')
        end = match.end()
    out.append(escape(text[end:]))
    return "".join(out)


def visible_text(text: str) -> str:
    """Plain-text version of :func:`visible`: suspect characters become labels in brackets."""
    return _SUSPECT.sub(lambda match: f"[{_label(match[0])}]", text.replace("\r\n", "\n"))


def suspect_table() -> dict[str, Any]:
    """The rules of :func:`visible` as data for JavaScript: ``ranges``, ``kept``, ``names``."""
    named = {
        f"{code:X}": name
        for first, last in SUSPECT_RANGES
        if first < 0xE0000  # tag names would be 90 % of the table
        for code in range(first, last + 1)
        if (name := unicodedata.name(chr(code), ""))
    }
    return {"ranges": SUSPECT_RANGES, "kept": _KEPT, "names": named}


def _label(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode control pictures: ␀ … ␟
    return "␡" if code == 0x7F else f"U+{code:04X}"


def _name(char: str) -> str:
    return f"U+{ord(char):04X} {unicodedata.name(char, '')}".rstrip()


def isolated(text: str, tag: str = "bdi", css: str = "") -> str:
    """``text`` made visible in its own element, which contains its writing direction."""
    attribute = f' class="{css}"' if css else ""
    return f'<{tag}{attribute} dir="auto">{visible(text)}</{tag}>'


def highlighted(text: str, words: Iterable[str]) -> str:
    """``text`` made visible, with each whole-word, case-insensitive match of ``words`` in ``<mark>``."""
    # A word longer than the text cannot match; compiling one of 1 MB takes seconds.
    wanted = sorted({word.strip() for word in words if 0 < len(word.strip()) <= len(text)}, key=len, reverse=True)
    if not wanted:
        return visible(text)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, wanted))})(?!\w)", re.IGNORECASE)
    out: list[str] = []
    end = 0
    for match in pattern.finditer(text):
        out.append(visible(text[end : match.start()]))
        out.append(f"<mark>{visible(match[0])}</mark>")
        end = match.end()
    out.append(visible(text[end:]))
    return "".join(out)


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], css: str = "") -> str:
    """A table of plain-text cells; the first cell of each row is a header."""
    head = "".join(f'<th scope="col">{visible(name)}</th>' for name in headings)
    body = "".join(_row(list(row)) for row in rows)
    attribute = f' class="{css}"' if css else ""
    return f'<div class="wide"><table{attribute}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(cells: list[str]) -> str:
    first, rest = cells[:1], cells[1:]
    return (
        "<tr>"
        + "".join(f'<th scope="row">{isolated(cell)}</th>' for cell in first)
        + "".join(f"<td>{isolated(cell)}</td>" for cell in rest)
        + "</tr>"
    )


STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f7f8fa; --ink: #1d2430; --soft: #5b6472; --line: #dfe3e8;
  --good: #1a7f4b; --bad: #b3372b; --accent: #2f62a8; --mark: #ffe69a; --mark-ink: #1d2430; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --card: #1c2128; --ink: #e5e9ef; --soft: #9aa4b2;
  --line: #323943; --good: #58c48b; --bad: #f0847a; --accent: #82aee8; --mark: #6b5510; --mark-ink: #fff3cf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 0 0 .25rem; } h4 { font-size: .95rem; margin: 0 0 .5rem; color: var(--accent); }
.wide { overflow-x: auto; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .4rem .9rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
table.settings td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
img.curve { width: 100%; height: auto; border-radius: .5rem; border: 1px solid var(--line); background: #fff; }
details > summary { cursor: pointer; color: var(--accent); margin: .25rem 0; }
section.question { border-top: 1px solid var(--line); padding: 1.25rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; margin-top: .75rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; min-width: 0; }
.turn { border-left: 3px solid var(--accent); padding-left: .75rem; margin: .75rem 0; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0;
  font: .86rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.passage { margin: .35rem 0 .6rem; font-size: .88rem; overflow-wrap: anywhere; }
.problem, .wrong { color: var(--bad); } .right { color: var(--good); } .verdict { font-weight: 600; }
.mark { font: .75em ui-monospace, monospace; color: var(--bad); border: 1px solid currentColor; border-radius: .2rem;
  padding: 0 .15rem; margin: 0 .05rem; unicode-bidi: isolate; direction: ltr; }
mark { background: var(--mark); color: var(--mark-ink); border-radius: .15rem; }
@media print { body { max-width: none; } article { break-inside: avoid; } }
"""
"""Page stylesheet, self-contained, following the system's light or dark mode."""


Verdict = Literal["right", "wrong", "unscored"]

STOP_WORDS: dict[StopReason, str] = {
    StopReason.ANSWER: "it gave its answer",
    StopReason.NO_ANSWER: "its last turn had neither a call nor an answer",
    StopReason.MALFORMED_CALL: "its tool call could not be parsed",
    StopReason.MAX_TURNS: "its last allowed turn was another search",
    StopReason.MAX_TURN_TOKENS: "a turn was cut at its token limit",
    StopReason.MAX_TRAJECTORY_TOKENS: "the next turn would have exceeded the episode's token limit",
    StopReason.NOT_EXTENDABLE: "the chat format cannot be extended after these tokens",
    StopReason.TIME_LIMIT: "it exceeded its time limit and was cut",
    StopReason.FAILED: "a service failed",
}

DROP_WORDS: dict[str, str] = {
    "constant_reward": "all episodes of its group got the same reward, so there is nothing to learn from",
    "too_few_episodes": "too few episodes of its group finished",
    "too_slow": "its group was too slow",
    "step_time_limit": "the step's time limit was reached",
    "failed": "it did not finish: a service failed, or a time limit was reached",
}

TOO_LONG = (StopReason.MAX_TURNS, StopReason.MAX_TURN_TOKENS, StopReason.MAX_TRAJECTORY_TOKENS)


def verdict(episode: Episode) -> Verdict:
    """Whether the answer is right; unscored if the episode failed or timed out, or there is no golden answer."""
    if not episode.is_complete or not episode.question.golden_answers:
        return "unscored"
    return "right" if episode.reward_parts.get("correct", 0.0) >= 0.5 else "wrong"


MARKS: dict[Verdict, str] = {"right": "✓", "wrong": "✗", "unscored": "–"}


def marked(episode: Episode, answer: str) -> str:
    """The answer with its verdict mark; unmarked without a golden answer."""
    return f"{MARKS[verdict(episode)]} {answer}" if episode.question.golden_answers else answer


def drop_words(reason: str) -> str:
    """Description of a drop reason; unknown ones are returned unchanged."""
    return DROP_WORDS.get(reason, reason)


def learning_words(
    episode: Episode,
    advantage: float | None,
    trained: bool | None,
    drop_reason: str | None,
    *,
    is_evaluation: bool = False,
) -> str:
    """Which tokens were trained on, and which were masked.

    Args:
        episode: the episode.
        advantage: of the episode; None if there is none.
        trained: None if unknown.
        drop_reason: why it was not trained on.
        is_evaluation: it belongs to an evaluation.
    """
    wrote, read = tokens(episode.action_token_count), tokens(episode.observation_token_count)
    counts = f"The model sampled {wrote} and read {read} (grey)."
    if not episode.question.golden_answers:
        return counts
    if is_evaluation:
        return f"Not trained on: evaluation episode. {counts}"
    if trained is False:
        why = f": {drop_words(drop_reason)}" if drop_reason else ""
        return f"Not trained on{why}. {counts}"
    masked = f"The {read} of prompt and search results (grey) are masked."
    if trained is None:
        return f"Only the {wrote} sampled by the model can be trained on. {masked}"
    by = f", with advantage {advantage:+.3g}" if advantage is not None and math.isfinite(advantage) else ""
    return f"Trained on the {wrote} sampled by the model{by}. {masked}"


def tokens(count: int) -> str:
    """``1 token``, ``1,200 tokens``."""
    return counted(count, "token")


def counted(count: int, noun: str) -> str:
    """A count with its noun, in the plural unless it is one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def source_words(step: int | None, label: str | None) -> str:
    """Origin of an episode: ``step 12``, ``evaluation "after RL"``."""
    if label is not None:
        return f"evaluation “{label}”"
    return "rollout" if step is None else f"step {step}"


def reward_words(episode: Episode) -> str:
    """Reward and parts: ``reward 1.1 (correct 1, format 1)``, or ``not scored``."""
    if not episode.is_complete or not episode.question.golden_answers:
        return "not scored"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in episode.reward_parts.items())
    return f"reward {episode.reward:.3g}" + (f" ({parts})" if parts else "")


Kind = Literal["thought", "call", "answer", "markup", "said"]

_OPENING: dict[str, Kind] = {"think": "thought", "tool_call": "call", "search": "call", "answer": "answer"}
_TAG = re.compile(r"<(/?)(think|tool_call|search|answer)>|<\|[A-Za-z0-9_]{1,40}\|>")


def segments(text: str, content: str = "") -> list[tuple[Kind, int]]:
    """Kinds of a turn's segments with their lengths in characters, which add up to the text's length.

    Args:
        text: of the turn, markup included.
        content: the turn without chat markup and reasoning. If ``text`` has no thought tags, what precedes its content is the
            reasoning.

    Tags belong to their segment; an unclosed one extends to the end. A closing ``</think>`` without an opening one ends a thought
    that began in the prompt. Takes linear time.
    """
    out: list[tuple[Kind, int]] = []
    inside: Kind | None = None
    closing = ""
    start = 0
    has_thought = False

    def add(kind: Kind, end: int) -> None:
        nonlocal start
        if end > start:
            if out and out[-1][0] == kind:
                out[-1] = (kind, out[-1][1] + end - start)
            else:
                out.append((kind, end - start))
        start = end

    for match in _TAG.finditer(text):
        name = match[2]
        if inside is not None:
            if name == closing and match[1]:
                add(inside, match.end())
                inside = None
        elif name is None:
            add("said", match.start())
            add("markup", match.end())
        elif not match[1]:
            add("said", match.start())
            inside, closing = _OPENING[name], name
            has_thought |= inside == "thought"
        elif name == "think" and not has_thought:
            out.clear()
            start = 0
            add("thought", match.end())
            has_thought = True
    add(inside or "said", len(text))
    return out if has_thought or not content else _before(text, content, out)


def _before(text: str, content: str, found: list[tuple[Kind, int]]) -> list[tuple[Kind, int]]:
    """``found``, with the text before the turn's content as thought."""
    place = text.find(content)
    if place <= 0:
        return found
    out: list[tuple[Kind, int]] = []
    at = 0
    for kind, length in found:
        ahead = min(max(place - at, 0), length)
        said = text[at : at + ahead]
        if kind == "said" and said.strip():
            out.append(("thought", ahead))
            if length > ahead:
                out.append((kind, length - ahead))
        else:
            out.append((kind, length))
        at += length
    return out


T = TypeVar("T")


def overlaid(
    text: str, kinds: Iterable[tuple[Kind, int]], pieces: Iterable[tuple[str, T]], limit: int
) -> Iterator[tuple[Kind, list[tuple[str, T]]]]:
    """The first ``limit`` characters by kind, each segment split at piece boundaries. A piece that spans two kinds is in both."""
    queue = iter(pieces)
    piece, value = next(queue, ("", None))
    left = min(limit, len(text))
    for kind, length in kinds:
        length = min(length, left)
        left -= length
        inside: list[tuple[str, T]] = []
        while length > 0:
            if not piece:
                following = next(queue, None)
                if following is None:
                    break
                piece, value = following
                continue
            taken = piece[:length]
            inside.append((taken, value))  # type: ignore[arg-type]
            piece = piece[len(taken) :]
            length -= len(taken)
        if inside:
            yield kind, inside


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
