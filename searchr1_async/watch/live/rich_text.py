"""The live view as HTML and plain text, for notebooks without widgets."""

from __future__ import annotations

from html import escape

from searchr1_async.watch.html import visible
from searchr1_async.watch.live.child import Charts
from searchr1_async.watch.live.output import Output
from searchr1_async.watch.live.view import News
from searchr1_async.watch.live.words import Frame

_HEADINGS = {
    "reward": "reward",
    "exact_match": "exact match",
    "turns": "turns per episode",
    "valid_calls": "valid calls",
}


class RichTextSurface:
    """Draws on the output of the current cell, at most once per second because each update sends everything."""

    seconds_between = 1.0
    has_curves = False

    def __init__(self, title: str) -> None:
        self._output = Output({"text/plain": title})

    def draw(self, frame: Frame, news: News | None) -> None:
        self._output.update({"text/html": as_html(frame), "text/plain": as_text(frame)})

    def add_charts(self, charts: Charts | None) -> None:
        raise NotImplementedError("rich text has no curves")

    def close(self, text: str, png: bytes | None) -> None:
        self._output.settle(text, png)


def as_text(frame: Frame) -> str:
    """The frame as plain lines."""
    lines = [
        f"{frame['title']} ({frame['badge']})",
        " · ".join(part for part in (frame["progress"], frame["status"]) if part),
    ]
    lines += [f"{bar['name']}: {bar['text']}" for bar in frame["bars"]]
    lines += [f"{alert['kind']}: {alert['text']}" for alert in frame["alerts"]]
    lines += [f"{_HEADINGS[name]}: {text}" for name, text in frame["curves"].items() if text]
    for stack in frame["stacks"]:
        lines.append(f"{stack['title']}: " + ", ".join(f"{part['count']:,} {part['name']}" for part in stack["parts"]))
    for section in frame["sections"]:
        lines.append(f"{section['title']}: " + ", ".join(f"{label} {value}" for label, value in section["rows"]))
    return "\n".join(lines)


def as_html(frame: Frame) -> str:
    """The frame as HTML. All text is escaped; colours follow the notebook's theme."""
    parts = [
        f"<p style='margin:0'><b>{visible(frame['title'])}</b> ({visible(frame['badge'])})</p>",
        f"<p style='margin:0 0 .4em'>{visible(frame['progress'])} <span style='opacity:.7'>{visible(frame['status'])}</span></p>",
    ]
    for bar in frame["bars"]:
        parts.append(
            f"<p style='margin:0'>{visible(bar['name'])}: <progress max='1' value='{bar['share']:.3f}' "
            f"style='vertical-align:middle'></progress> {visible(bar['text'])}</p>"
        )
    for alert in frame["alerts"]:
        edge = "#d9822b" if alert["kind"] == "warning" else "#4c86d6"
        parts.append(
            f"<p style='margin:.3em 0;padding:.1em .6em;border-left:3px solid {edge}'>{visible(alert['text'])}</p>"
        )
    rows = [("Curves", [(_HEADINGS[name], text) for name, text in frame["curves"].items() if text])]
    rows += [
        (stack["title"], [(part["name"], f"{part['count']:,}") for part in stack["parts"]]) for stack in frame["stacks"]
    ]
    rows += [(section["title"], [(label, value) for label, value in section["rows"]]) for section in frame["sections"]]
    cells = "".join(_table(title, pairs) for title, pairs in rows if pairs)
    parts.append(f"<div style='display:flex;flex-wrap:wrap;gap:.4em 2em;align-items:flex-start'>{cells}</div>")
    return f"<div style='font-size:var(--jp-ui-font-size1,13px)'>{''.join(parts)}</div>"


def _table(title: str, pairs: list[tuple[str, str]]) -> str:
    style = escape("padding:0 1em 0 0;text-align:left;background:none;border:none;font-weight:normal", quote=True)
    rows = "".join(
        f"<tr style='background:none'><th scope='row' style='{style};opacity:.7'>{visible(label)}</th>"
        f"<td style='{style}'>{visible(value)}</td></tr>"
        for label, value in pairs
    )
    return f"<div><b>{visible(title)}</b><table style='margin:0;border:none'>{rows}</table></div>"
