"""The result of the GPU benchmark: tables of each model, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from benchmarks.gpu.figures import ACROSS, AGREEMENT, DEMO, NO_FIT, PRECISIONS, Row

TOLERANCE = 1e-3
"""In nats: the bound of every difference in float32."""
SCHEMA = {
    "model": pl.String,
    "part": pl.String,
    "figure": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "problem": pl.String,
}


def problems(rows: Sequence[Row]) -> list[str]:
    """What fails the benchmark, as sentences; none if it passed.

    A model that does not fit is none, as long as sampler and trainer of at least one model were compared in float32.
    """
    exact = [row for row in rows if row["part"] == "float32" and row["figure"] in (AGREEMENT, ACROSS)]
    found = [
        f"{row['model']} in float32: {row['figure']} is {row['value']:.1e}, the bound is {TOLERANCE:g}"
        for row in exact
        if row["value"] is not None and not row["value"] < TOLERANCE  # NaN fails too
    ]
    found += [
        f"{row['model']}, {row['part']}: {row['figure']}: {row['problem']}"
        for row in rows
        if row["problem"] not in (None, NO_FIT)
    ]
    if not any(row["figure"] == AGREEMENT and row["value"] is not None for row in exact):
        found.append("no model was checked for exactness: sampler and trainer were not compared in float32")
    return found


def body(rows: Sequence[Row], demos: Mapping[str, str]) -> list[str]:
    """The sections in Markdown; ``demos`` are the tables of the demo job's evaluations by model."""
    failed = problems(rows)
    verdict = (
        [f"**Failed**: {'; '.join(failed)}."] if failed else [f"Every difference in float32 is below {TOLERANCE:g}."]
    )
    sections = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        sections += [f"## {model}", _speeds([row for row in own if row["part"] != DEMO])]
        if demo := [row for row in own if row["part"] == DEMO]:
            sections.append("The demo job of `make run`, after its index was built:\n\n" + _listed(demo))
        if text := demos.get(model):
            sections.append(f"```\n{text}\n```")
    return verdict + sections


def _speeds(rows: Sequence[Row]) -> str:
    cells = {(row["figure"], row["part"]): _cell(row) for row in rows}
    lines = [f"| figure | {' | '.join(PRECISIONS)} |", f"| --- |{' ---: |' * len(PRECISIONS)}"]
    for figure in dict.fromkeys(row["figure"] for row in rows):
        lines.append("| " + " | ".join([figure, *(cells.get((figure, part), "–") for part in PRECISIONS)]) + " |")
    return "\n".join(lines)


def _listed(rows: Iterable[Row]) -> str:
    return "\n".join(f"- {row['figure']}: {_cell(row)}" for row in rows)


def _cell(row: Row) -> str:
    if row["value"] is None:
        return str(row["problem"]).replace("|", "/")
    interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['value']:,.0f}{interval}" if row["value"] >= 1000 else f"{row['value']:.3g}{interval}"
