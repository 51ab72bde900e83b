"""Draws for the live view, in a subprocess: ``python drawing.py charts|vega|picture``, JSON in, bytes out.

Out-of-process because vl-convert holds the GIL throughout: a picture would block the event loop for 2 s even from a thread. This
file imports nothing from the package, so the subprocess starts fast; :class:`Drawer` runs it.

``charts`` takes ``curves``, ``window`` and ``from_zero`` and returns JSON: ``page``, a Vega-Lite chart per curve, and ``picture``,
one chart of all curves. ``vega`` returns Vega as a gzipped ES module that exports ``vegaEmbed``. ``picture`` takes the data, and
optionally an existing chart, and returns a PNG.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import anyio

BLUE, RED, GREY = "#4c86d6", "#e0684b", "#8a93a1"
"""Visible on white and on black, and distinguishable with the common forms of colour blindness."""

Curve = Mapping[str, Any]
"""A curve's metric: ``name``, ``heading``, ``form`` (number format), ``is_share``, ``low``, ``high``, ``is_evaluated``."""

_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS")
PICTURE_WIDTH = 380
"""Per column, of two; the picture is 900 wide with axes."""


def panel(curve: Curve, window: int, *, from_zero: bool, x_title: str = "step") -> Any:
    """The chart of one curve, over the named data ``steps``, ``running`` and ``evaluations``.

    Args:
        window: half-width in steps of the moving mean (line) and standard deviation (band).
        from_zero: start the step axis at 0, where the untrained model's evaluation is.
    """
    import altair as alt

    name, known = curve["name"], f"isValid(datum[{curve['name']!r}])"
    x = (
        alt.X("step:Q")
        .axis(format="d", tickMinStep=1, tickCount=6, title=x_title, titleFontWeight="normal", grid=False)
        .scale(zero=from_zero, nice=False)
    )
    axis = alt.Axis(format=".0%" if curve["is_share"] else "~g", tickCount=5, title=None, minExtent=38)
    scale = alt.Scale(zero=curve["is_share"], nice=True)
    value = alt.Y(name, type="quantitative", axis=axis, scale=scale)
    tip = [
        alt.Tooltip("step:Q", format=".0f"),
        alt.Tooltip(name, type="quantitative", format=curve["form"], title=curve["heading"]),
    ]
    points = alt.Chart(alt.NamedData(name="steps")).transform_filter(known)
    moving: list[Any] = [{"op": "mean", "field": name, "as": "mean"}, {"op": "stdev", "field": name, "as": "spread"}]
    smooth = points.transform_window(
        window=moving, frame=[-window, window], sort=[alt.SortField("step")]
    ).transform_calculate(
        low=_bound("datum.mean - datum.spread", curve["low"], "max"),
        high=_bound("datum.mean + datum.spread", curve["high"], "min"),
    )
    layers = [
        smooth.mark_area(opacity=0.2, color=BLUE).encode(x=x, y=alt.Y("low:Q", axis=axis, scale=scale), y2="high:Q"),
        points.mark_circle(opacity=0.5, size=14, color=BLUE).encode(x=x, y=value, tooltip=tip),
        smooth.mark_line(color=BLUE, strokeWidth=2).encode(x=x, y=alt.Y("mean:Q", axis=axis, scale=scale)),
        alt.Chart(alt.NamedData(name="running"))
        .transform_filter(known)
        .mark_point(color=BLUE, size=60, strokeWidth=1.5)
        .encode(x=x, y=value, tooltip=tip),
    ]
    if curve["is_evaluated"]:
        layers += _evaluations(x, axis, scale)
    return alt.layer(*layers)


def _bound(expression: str, limit: float | None, choose: str) -> str:
    return expression if limit is None else f"{choose}({expression}, {limit})"


def _evaluations(x: Any, axis: Any, scale: Any) -> list[Any]:
    import altair as alt

    held_out = alt.Chart(alt.NamedData(name="evaluations"))
    tip = ["label:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("mean", "low", "high"))]
    return [
        held_out.mark_rule(color=RED, strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q", axis=axis, scale=scale), y2="high:Q"),
        held_out.mark_point(color=RED, fill=RED, shape="diamond", size=70, opacity=1).encode(
            x=x, y=alt.Y("mean:Q", axis=axis, scale=scale), tooltip=tip
        ),
    ]  # fmt: skip


def page_specs(curves: Sequence[Curve], window: int, *, from_zero: bool) -> dict[str, Any]:
    """A Vega-Lite chart per curve, as wide as its container."""
    specs = {
        curve["name"]: panel(curve, window, from_zero=from_zero).properties(width="container", height=150).to_dict()
        for curve in curves
    }
    for spec in specs.values():
        spec.pop("config", None)
        spec["autosize"] = {"type": "fit", "contains": "padding"}
    return specs


def picture_spec(curves: Sequence[Curve], window: int, *, from_zero: bool) -> dict[str, Any]:
    """All curves as one picture; :func:`filled` adds title and data."""
    import altair as alt

    panels = [
        panel(curve, window, from_zero=from_zero, x_title="optimiser step").properties(
            width=PICTURE_WIDTH, height=170, title=alt.TitleParams(curve["heading"], anchor="start", fontSize=13)
        )
        for curve in curves
    ]
    return _framed(alt.concat(*panels, columns=2, spacing=22))


def _framed(chart: Any) -> dict[str, Any]:
    import altair as alt

    title = alt.TitleParams(
        "",
        subtitle=[],
        anchor="start",
        fontSize=16,
        offset=14,
        subtitleFontSize=12,
        subtitleColor="#4b5563",
        subtitlePadding=4,
    )
    chart = chart.properties(title=title).configure(background="white", padding=12, font="sans-serif")
    chart = chart.configure_view(stroke=None).configure_axis(
        gridColor="#e5e7eb", domainColor=GREY, tickColor=GREY, labelFontSize=11
    )
    return chart.to_dict()


def filled(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """``spec`` with the task's ``title``, ``subtitle`` (lines), ``steps``, ``evaluations`` and ``suites``."""
    title = spec["title"] | {"text": task["title"], "subtitle": task["subtitle"]}
    rows = {name: task[name] for name in ("steps", "evaluations", "suites")} | {"running": []}
    return spec | {"title": title, "datasets": rows}


def suites_spec() -> dict[str, Any]:
    """Bars of an evaluation's suites."""
    import altair as alt

    rows = alt.Chart(alt.NamedData(name="suites"))
    y = alt.Y("suite:N", sort=None, title=None, axis=alt.Axis(labelLimit=260, ticks=False, domain=False))
    scale = alt.Scale(domain=[0, 1])
    share = alt.X("mean:Q", title="exact match", scale=scale, axis=alt.Axis(format=".0%"))
    bars = rows.mark_bar(color=BLUE, height=16).encode(y=y, x=share)
    intervals = rows.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, color=RED)
    texts = rows.mark_text(align="left", dx=5, dy=-10, fontSize=11).encode(
        y=y, x=share, text=alt.Text("mean:Q", format=".1%")
    )
    chart = alt.layer(bars, intervals.encode(y=y, x=alt.X("low:Q", scale=scale), x2="high:Q"), texts)
    return _framed(chart.properties(width=620, height=alt.Step(34)))


def vega() -> bytes:
    """Vega, Vega-Lite and vega-embed as one gzipped ES module."""
    import vl_convert

    source = vl_convert.javascript_bundle("export { vegaEmbed };")
    return gzip.compress(source.encode(), 6)


def picture(task: dict[str, Any], scale: float = 2.0) -> bytes:
    """The picture as PNG."""
    import vl_convert

    spec = task.get("spec") or (_curves_spec(task) if task["steps"] else suites_spec())
    return fewer_colours(vl_convert.vegalite_to_png(filled(spec, task), scale=scale))


def _curves_spec(task: dict[str, Any]) -> dict[str, Any]:
    return picture_spec(task["curves"], task["window"], from_zero=task["from_zero"])


def fewer_colours(png: bytes) -> bytes:
    """The same PNG with at most 256 colours, less than half the size of 24-bit."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


class DrawingError(Exception):
    """Drawing failed. The view logs it and continues without; it never reaches the run."""


@dataclass(frozen=True, slots=True)
class Charts:
    """What a page needs to draw its curves."""

    page: Mapping[str, Any]
    """A Vega-Lite chart per curve."""
    picture: Mapping[str, Any]
    """One chart of all curves, for the final picture."""
    vega: bytes
    """Gzipped ES module."""


class Drawer:
    """Draws in a subprocess; Vega is bundled once and cached.

    Raises:
        DrawingError: from both methods, if the subprocess fails.
    """

    def __init__(self) -> None:
        self._vega = b""

    async def charts(self, window: int, curves: Sequence[Curve], *, from_zero: bool) -> Charts:
        """The charts of a page; arguments as in :func:`page_specs`. Takes 2 to 5 s in the background."""
        said: list[bytes] = []

        async def specs() -> None:
            said.append(await run("charts", {"curves": list(curves), "window": window, "from_zero": from_zero}))

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(specs)
                if not self._vega:
                    self._vega = await run("vega", {})
        except* DrawingError as group:
            raise group.exceptions[0] from None
        return Charts(**json.loads(said[0]), vega=self._vega)

    async def picture(self, task: Mapping[str, Any]) -> bytes:
        """A PNG. Takes 2 to 3 s."""
        return await run("picture", task)


async def run(what: Literal["charts", "vega", "picture"], task: Mapping[str, Any]) -> bytes:
    """The subprocess's output for ``task``. Cancelling kills it."""
    if not sys.executable:
        raise DrawingError("sys.executable is empty, so the drawing process cannot be started")
    drawing = _Drawing(what, json.dumps(task).encode())
    try:
        # Own limiter: drawing must not use up the engine's worker threads.
        return await anyio.to_thread.run_sync(drawing.run, limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True)
    except OSError as error:
        raise DrawingError(f"the drawing process did not start: {error}") from error
    except BaseException:
        drawing.abandon()
        raise


class _Drawing:
    """One subprocess, run from a thread: on Windows a notebook's event loop has no asyncio subprocesses."""

    def __init__(self, what: str, task: bytes) -> None:
        # -P: keeps the script's folder off sys.path, whose modules would shadow others.
        self._command = [sys.executable, "-P", __file__, what]
        self._what, self._task = what, task
        self._process: subprocess.Popen[bytes] | None = None
        self._is_abandoned = False

    def run(self) -> bytes:
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=_environment(),
            start_new_session=True,  # a notebook's stop button interrupts the kernel's whole process group
        ) as process:
            self._process = process
            if self._is_abandoned:  # abandoned during startup
                process.kill()
            out, said = process.communicate(self._task)
        if process.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise DrawingError(f"drawing {self._what} failed: {last[0]}")
        return out

    def abandon(self) -> None:
        """Kill the process; its thread then cleans up."""
        self._is_abandoned = True
        if self._process is not None:
            self._process.kill()


def _environment() -> dict[str, str]:
    """The environment without likely secrets."""
    return {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRETS)}


def main() -> None:
    task = json.load(sys.stdin)
    if sys.argv[1] == "charts":
        curves, window, from_zero = task["curves"], task["window"], task["from_zero"]
        specs = {"page": page_specs(curves, window, from_zero=from_zero), "picture": _curves_spec(task)}
        out = json.dumps(specs).encode()
    else:
        out = vega() if sys.argv[1] == "vega" else picture(task)
    sys.stdout.buffer.write(out)


if __name__ == "__main__":
    main()
