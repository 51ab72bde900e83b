"""The live view as a widget: sends frames, rows and charts to the page, and receives button presses."""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from searchr1_async.watch.live.child import Charts
from searchr1_async.watch.live.output import Output
from searchr1_async.watch.live.view import News
from searchr1_async.watch.live.words import Frame

_FOLDER = Path(__file__).parent
_BUTTONS = ("pause", "resume", "stop", "hello")


@cache
def widget_class() -> type[Any]:
    """The widget class, created lazily so that the package works without anywidget.

    Raises:
        ImportError: anywidget is not installed.
    """
    import anywidget
    import traitlets

    class LiveViewWidget(anywidget.AnyWidget):
        _esm = (_FOLDER / "live.js").read_text(encoding="utf-8")
        _css = (_FOLDER / "live.css").read_text(encoding="utf-8")
        frame = traitlets.Dict().tag(sync=True)
        has_controls = traitlets.Bool(False).tag(sync=True)

    return LiveViewWidget


class WidgetSurface:
    """A widget in the output of the current cell.

    The frame is a trait, so a reopened page has the latest one. Rows and charts are messages, so only new data is sent and none is
    saved with the notebook. A page that lacks data sends ``hello``.

    Args:
        title: shown to readers without the widget.
        has_controls: show buttons.
    """

    seconds_between = 0.25
    has_curves = True

    def __init__(self, title: str, *, has_controls: bool) -> None:
        self._widget = widget_class()(has_controls=has_controls)
        self._pressed: Callable[[str], None] | None = None
        self._widget.on_msg(self._received)
        data, metadata = self._widget._repr_mimebundle_()
        # Fallback for viewers without widgets and for notebooks whose kernel was killed.
        data["text/plain"] = f"{title}: live view, shown only in a notebook with widgets."
        data["text/html"] = f"<p>{html.escape(data['text/plain'])}</p>"
        self._output = Output(data, metadata)

    def on_press(self, pressed: Callable[[str], None]) -> None:
        """Set the callback for buttons; it may run in another thread."""
        self._pressed = pressed

    def draw(self, frame: Frame, news: News | None) -> None:
        if news is not None:
            rows = {"kind": "rows", "first": news.first, "rows": news.rows, "evaluations": news.evaluations}
            self._widget.send(rows)
        self._widget.frame = dict(frame)

    def add_charts(self, charts: Charts | None) -> None:
        if charts is None:
            self._widget.send({"kind": "no charts"})
        else:
            self._widget.send({"kind": "charts", "specs": dict(charts.page)}, buffers=[charts.vega])

    def close(self, text: str, png: bytes | None) -> None:
        self._output.settle(text, png)
        self._widget.close()

    def _received(self, widget: Any, content: object, buffers: object) -> None:
        button = content.get("press") if isinstance(content, dict) else None
        if self._pressed is not None and button in _BUTTONS:
            self._pressed(button)
