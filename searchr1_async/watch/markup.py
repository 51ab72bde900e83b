"""What all views of an episode share: safe HTML of untrusted text, segments of a turn, words for outcomes, styles. Pure."""

from __future__ import annotations

import math
import re
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

from searchr1_async.episodes.prompts import ANSWER, SEARCH, THINK, TOOL_CALL
from searchr1_async.episodes.table import EpisodeRow
from searchr1_async.episodes.types import Episode, StopReason

MAX_TEXT = 20_000
"""Maximum characters shown of a turn, prompt or result."""

MAX_PASSAGE = 5_000
MAX_LINE = 2_000
"""Maximum for single-line texts: title, query, answer."""

KEPT = "\u200c\u200d\ufe0f"
"""Zero-width non-joiner and joiner occur in correct Persian, Hindi and emoji; U+FE0F selects an emoji's coloured form."""
SUSPECT_RANGES = (
    (0x00, 0x08), (0x0B, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160),
    (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x2028, 0x202F), (0x2060, 0x206F), (0x3164, 0x3164),
    (0xD800, 0xDFFF), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB), (0xE0000, 0xE0FFF),
)  # fmt: skip
"""Inclusive ranges of code points that are invisible or change how others display; those in :data:`KEPT` are let through."""
_SUSPECT = re.compile(f"(?![{KEPT}])[{''.join(f'{re.escape(chr(a))}-{re.escape(chr(b))}' for a, b in SUSPECT_RANGES)}]")


def visible(text: str) -> str:
    """``text`` as safe HTML.

    Markup is escaped; control characters (NUL, ANSI escapes), bidi marks, invisible characters and lone surrogates become small
    labels with their code point. Newlines and tabs are kept.
    """
    html = escape(text.replace("\r\n", "\n"))
    return _SUSPECT.sub(lambda match: f'<span class="mark">{_label(match[0])}</span>', html)


def visible_text(text: str) -> str:
    """Plain-text version of :func:`visible`: suspect characters become labels in brackets."""
    return _SUSPECT.sub(lambda match: f"[{_label(match[0])}]", text.replace("\r\n", "\n"))


def _label(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode control pictures: ␀ … ␟
    return "␡" if code == 0x7F else f"U+{code:04X}"


def one_line(text: str) -> str:
    """``text`` on one line, with control characters escaped."""
    return "".join(char if char.isprintable() else " " if char in "\n\r\t" else ascii(char)[1:-1] for char in text)


def shown(text: str, most: int = 300) -> str:
    """Untrusted ``text`` on one line, invisible characters escaped, truncated."""
    return one_line(text[:most]).strip() + ("…" if len(text) > most else "")


def milliseconds(seconds: float) -> str:
    """Format a short time."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else duration(seconds)


def duration(seconds: float) -> str:
    """Format seconds: ``4.2 s``, ``38 s``, ``4 min 05 s``, ``2 h 07 min``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def isolated(text: str, tag: str = "bdi", css: str = "") -> str:
    """``text`` made visible in its own element, which contains its writing direction."""
    attribute = f' class="{css}"' if css else ""
    return f'<{tag}{attribute} dir="auto">{visible(text)}</{tag}>'


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

TOO_LONG = (StopReason.MAX_TURNS, StopReason.MAX_TURN_TOKENS, StopReason.MAX_TRAJECTORY_TOKENS)


def verdict(episode: Episode) -> Verdict:
    """Whether the answer is right; unscored if the episode failed or timed out, or there is no golden answer."""
    if not episode.is_complete or not episode.question.golden_answers:
        return "unscored"
    return "right" if episode.reward_parts.get("correct", 0.0) >= 0.5 else "wrong"


MARKS: dict[Verdict, str] = {"right": "✓", "wrong": "✗", "unscored": "–"}


def learning_words(row: EpisodeRow) -> str:
    """Which tokens were trained on, and which were masked."""
    episode = row.episode
    counts = f"The model sampled {tokens(episode.action_token_count)} and read {tokens(episode.observation_token_count)} (grey)."
    if not episode.question.golden_answers:
        return counts
    if row.label is not None or row.trained is False:
        why = "evaluation" if row.label is not None else (row.drop_reason or "").replace("_", " ")
        return f"{counts} Not trained on" + (f": {why}." if why else ".")
    by = f", with advantage {row.advantage:+.3g}" if row.advantage is not None else ""
    return f"{counts} {'Trained' if row.trained else 'Only trainable'} on what it sampled{by}; what it read is masked."


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

_KINDS: dict[str, Kind] = {THINK.name: "thought", TOOL_CALL.name: "call", SEARCH.name: "call", ANSWER.name: "answer"}
_SEGMENT = re.compile(rf"<({'|'.join(_KINDS)})>.*?(?:</\1>|\Z)|<\|[A-Za-z0-9_]{{1,40}}\|>", re.DOTALL)
_OPENS, _CLOSES = f"<{THINK.name}>", f"</{THINK.name}>"


def segments(text: str, content: str = "") -> list[tuple[Kind, int]]:
    """Kinds of a turn's segments with their lengths in characters, which add up to the text's length.

    Args:
        text: of the turn, markup included.
        content: the turn without chat markup and reasoning. If ``text`` has no thought tags, what precedes its content is the
            reasoning.

    Tags belong to their segment; an unclosed one extends to the end. A closing ``</think>`` without an opening one ends a thought
    that began in the prompt. Takes linear time.
    """
    opened, closed = text.find(_OPENS), text.find(_CLOSES)
    out: list[tuple[Kind, int]] = []
    at = 0
    if closed >= 0 and (opened < 0 or closed < opened):
        at = closed + len(_CLOSES)
        out.append(("thought", at))
    content_at = text.find(content) if opened < 0 and not at else 0
    for match in [*_SEGMENT.finditer(text, at), None]:
        end = len(text) if match is None else match.start()
        thought = max(0, min(content_at, end) - at)
        plain: tuple[tuple[Kind, int], ...] = (("thought", thought), ("said", end - at - thought))
        out += [part for part in plain if part[1]]
        at = end
        if match is not None:
            out.append((_KINDS.get(match[1], "markup"), match.end() - at))
            at = match.end()
    return out


_ASSETS = Path(__file__).with_name("assets")


@cache
def asset(name: str) -> str:
    """The text of a bundled file."""
    return (_ASSETS / name).read_text(encoding="utf-8")


@cache
def template(name: str) -> Any:
    """A bundled Jinja template: in HTML every value but ``Markup`` becomes :func:`visible`, in text :func:`visible_text`."""
    import jinja2
    from markupsafe import Markup

    def finalize(value: Any) -> str:
        if not name.endswith(".html"):
            return visible_text(str(value))
        return value if isinstance(value, Markup) else Markup(visible(str(value)))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=name.endswith(".html"),
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def themed_style(root: str, rules: str) -> str:
    """CSS for a cell's output, scoped to the class ``root``.

    Follows the notebook's theme if it is declared (JupyterLab, Notebook 7, VS Code, Colab), else the system's.
    """
    return f"""{root} {{ color-scheme: light dark; {asset("colours.css")} {rules} }}
[data-jp-theme-light="true"] {root}, .vscode-light {root}, html[theme="light"] {root} {{ color-scheme: light; }}
[data-jp-theme-light="false"] {root}, .vscode-dark {root}, html[theme="dark"] {root} {{ color-scheme: dark; }}"""


PAGE_COLOURS = f":root {{ color-scheme: light dark; {asset('colours.css')} }}\n"
STYLE = PAGE_COLOURS + asset("report.css")
"""Page stylesheet, self-contained, following the system's light or dark mode."""
