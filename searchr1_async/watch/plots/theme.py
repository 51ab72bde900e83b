"""How charts look, and how a notebook shows them: in one place.

No chart has a configuration of its own: a chart that has one cannot be laid beside another (``a.plot("reward") |
b.plot("reward")``). Colours of text and paper are left to Vega-Lite, so that a saved file is black on white, and
JupyterLab's dark theme shows light on dark.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.watch.curve import CALLS, GREY, HELD_OUT, SEEN, TRAINING, TURNS

if TYPE_CHECKING:
    import altair as alt

"""Those of the learning curve: told apart in the common forms of colour blindness."""

SERIES = (TRAINING, SEEN, TURNS, CALLS, GREY, HELD_OUT)
"""In this order where a chart has several lines."""

NOTE_COLOUR = "#808893"
"""Of words within a chart: readable on white (3.6:1) and on the dark theme's #333 (3.5:1)."""

FAINT = "rgba(128, 136, 147, 0.4)"
"""Of what is there and asks for no attention, on either paper."""

GRID_COLOUR = "#9aa1ab"

MAX_ROWS = 5000
"""Rows of data that a chart holds at most: a notebook keeps them in its file."""

WIDTH, HEIGHT = 460, 240
"""Of one panel, in pixels."""

RENDERER = "searchr1_async"
VEGA_LITE_5 = "https://vega.github.io/schema/vega-lite/v5.json"
MIME_TYPE = "application/vnd.vegalite.v5+json"
"""What JupyterLab and VS Code draw by themselves, without the network; Altair's own default loads scripts from one."""

PICTURE_BYTES = 150_000


def axis(title: str | None = None, **options: Any) -> alt.Axis:
    """An axis in the house's manner: a light grid, no ticks, text of 11 and 12 pixels."""
    import altair as alt

    settings: dict[str, Any] = {
        "title": title,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": GRID_COLOUR,
        "gridOpacity": 0.3,
        "domainColor": GRID_COLOUR,
        "tickColor": GRID_COLOUR,
        "labelOverlap": True,
    }
    return alt.Axis(**(settings | options))


def values_axis(title: str | None = None, **options: Any) -> alt.Axis:
    """An axis at the left, as wide in every panel, so that panels above each other are aligned."""
    return axis(title, **{"minExtent": 34, "tickCount": 6} | options)


def steps_axis(title: str | None = "optimiser step", **options: Any) -> alt.Axis:
    """An axis of whole numbers."""
    return axis(title, **{"grid": False, "tickMinStep": 1, "format": ",d"} | options)


def legend(**options: Any) -> alt.Legend:
    """A legend above the chart, which takes no width from it."""
    import altair as alt

    settings: dict[str, Any] = {
        "title": None,
        "orient": "top",
        "labelFontSize": 11,
        "labelLimit": 320,
        "symbolOpacity": 1,
    }
    return alt.Legend(**(settings | options))


def heading(text: str, subtitle: str | list[str] = "") -> alt.TitleParams:
    """A title at the left, with what is to be read from the chart in words below it."""
    import altair as alt

    lines = [subtitle] if isinstance(subtitle, str) else subtitle
    lines = [plain_text(line) for line in lines if line]
    settings: dict[str, Any] = {"anchor": "start", "fontSize": 13, "offset": 8}
    if lines:
        settings |= {"subtitle": lines, "subtitleFontSize": 11, "subtitlePadding": 4}
    return alt.TitleParams(plain_text(text), **settings)


def table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a chart takes them. Given as plain values, Altair checks each against its schema: 3 s for 5,000 rows."""
    return pl.DataFrame(rows, infer_schema_length=None)


def plain_text(text: str, longest: int = 200) -> str:
    """A text of unknown origin as a chart can show it: one line, nothing unseen, not too long."""
    cut = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return "".join(char if char.isprintable() else " " if char in "\n\r\t" else ascii(char)[1:-1] for char in cut)


def empty_chart(text: str, *, title: str = "") -> alt.Chart:
    """A chart that says in words why there is nothing in it."""
    import altair as alt

    lines = _wrapped(plain_text(text, 600))
    values = [{"line": number, "text": line} for number, line in enumerate(lines)]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_text(fontSize=13, color=NOTE_COLOUR)
        .encode(
            y=alt.Y("line:Q", axis=None, scale=alt.Scale(domain=[len(lines) + 1.5, -2.5])),
            text=alt.Text("text:N"),
        )
    )
    return chart.properties(width=WIDTH, height=120, **({"title": heading(title)} if title else {}))


def _wrapped(text: str, width: int = 66) -> list[str]:
    from textwrap import wrap

    return wrap(text, width) or [""]


def enable_renderer() -> bool:
    """Make a notebook show charts without the network, and on GitHub; True if this renderer is the active one now.

    Each output holds the chart for JupyterLab and VS Code (which draw it, with its tooltips) and a picture of it for
    everything else. A renderer that the user has chosen is left as it is: only Altair's ``default`` is replaced.
    """
    import altair as alt

    if RENDERER not in alt.renderers.names():
        alt.renderers.register(RENDERER, mime_bundle)
    if alt.renderers.active == "default":
        alt.renderers.enable(RENDERER)
    return alt.renderers.active == RENDERER


def mime_bundle(spec: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """What a notebook keeps of a chart: the chart itself, a picture of it, and its title in words."""
    bundle: dict[str, Any] = {MIME_TYPE: {**spec, "$schema": VEGA_LITE_5}, "text/plain": _words(spec)}
    if (picture := _picture(spec)) is not None:
        bundle["image/png"] = base64.b64encode(picture).decode()
    return bundle


def _picture(spec: dict[str, Any]) -> bytes | None:
    """PNG at twice the size, or once where it would be over 150 KB; None where it cannot be drawn."""
    import vl_convert

    try:
        picture = _in_few_colours(vl_convert.vegalite_to_png(spec, scale=2))
        return picture if len(picture) <= PICTURE_BYTES else _in_few_colours(vl_convert.vegalite_to_png(spec, scale=1))
    except ValueError:  # a user's change that Vega-Lite refuses: the notebook shows its own message
        return None


def _in_few_colours(picture: bytes) -> bytes:
    """The same picture with a palette of 256 colours: 30 KB where it was 110, and nobody sees it."""
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    with Image.open(BytesIO(picture)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _words(spec: dict[str, Any]) -> str:
    return "\n".join(dict.fromkeys(_titles(spec))) or "a chart"


def _titles(spec: dict[str, Any]) -> Iterator[str]:
    """The titles of a chart and of its panels, in order."""
    title = spec.get("title")
    if isinstance(title, dict):
        subtitle = title.get("subtitle") or []
        yield from map(str, [title.get("text", ""), *([subtitle] if isinstance(subtitle, str) else subtitle)])
    elif title:
        yield str(title)
    for panels in ("vconcat", "hconcat", "concat", "layer"):
        for panel in spec.get(panels, ()):
            yield from _titles(panel)
