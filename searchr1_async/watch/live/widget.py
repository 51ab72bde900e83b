"""The live view as a widget: a page's part that is told frames, rows and charts, and tells which button was pressed."""

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
    """The widget's class, made where it is first needed: the package works without anywidget.

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
    """Draws on a widget in the output of the cell in which it is made.

    The frame is a trait, so that a page that is opened anew has the last one; rows and charts are messages, so that only what is
    new is sent and nothing of it is saved with the notebook. A page that lacks some says ``hello``.

    Args:
        title: what a reader without the widget sees.
        has_controls: buttons are shown.
    """

    seconds_between = 0.25
    has_curves = True

    def __init__(self, title: str, *, has_controls: bool) -> None:
        self._widget = widget_class()(has_controls=has_controls)
        self._pressed: Callable[[str], None] | None = None
        self._widget.on_msg(self._received)
        data, metadata = self._widget._repr_mimebundle_()
        # What a viewer without widgets shows, and a notebook whose kernel was killed.
        data["text/plain"] = f"{title}: a live view, which only a notebook with widgets shows."
        data["text/html"] = f"<p>{html.escape(data['text/plain'])}</p>"
        self._output = Output(data, metadata)

    def on_press(self, pressed: Callable[[str], None]) -> None:
        """Who is told of buttons; maybe from another thread, where the kernel answers widgets in one."""
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
