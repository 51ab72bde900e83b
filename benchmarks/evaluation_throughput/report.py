"""The evaluation benchmark's table, what was asked of it, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.evaluation_throughput.load import MOST_QUESTIONS
from benchmarks.shared.client_figures import lag_cells
from benchmarks.shared.report import RESULTS, write_result

Row = Mapping[str, Any]
NAMES = {
    ("ours", "pool"): "ours, all suites in one pool",
    ("ours", "suites"): "ours, suite by suite",
    ("cookbook", "suites"): "cookbook, suite by suite",
}
COLORS = {
    "ours, all suites in one pool": "#2a6fbb",
    "ours, suite by suite": "#7fb0e0",
    "cookbook, suite by suite": "#c9803a",
}
ASKED = 1.10
"""Wall over floor, of one pool of 7 x 500."""


def name_of(row: Row) -> str:
    """The way, in words."""
    return NAMES[row["contender"], row["mode"]]


def report(rows: Sequence[Row], *, keep: bool) -> None:
    """Prints what was measured; with ``keep`` also writes it to benchmarks/results/, with the picture."""
    body = [table(rows), costs(rows), asked(rows), NOTES]
    if not keep or not rows:
        print("\n\n".join(body))
        return
    picture(rows, RESULTS / "evaluation_throughput.svg")
    write_result(
        "evaluation_throughput",
        "Evaluation at the service's own speed",
        ["![places in use, with the floor](evaluation_throughput.svg)", CAPTION, *body],
        pl.DataFrame(list(rows)),
    )


def table(rows: Sequence[Row]) -> str:
    """One line a run: how long it took, and what it could have taken."""
    lines = [
        "| places | questions | way | wall | floor | wall/floor | ideal client | episodes/s | places in use | before the first sample, "
        "after the last |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ideal = row["ideal" if row["mode"] == "pool" else "ideal_by_suite"]
        lines.append(
            f"| {row['places']} | 7 x {row['questions']} | {name_of(row)} | {row['wall']:.1f} s | {row['floor']:.1f} s "
            f"| {row['wall'] / row['floor']:.3f} | {ideal:.1f} s | {row['episodes_a_second']:.1f} | {row['places_in_use']:.1%} "
            f"| {row['before_first_sample']:.1f} s, {row['after_last_sample']:.1f} s |"
        )
    return "\n".join(lines)


def costs(rows: Sequence[Row]) -> str:
    """One line a run: what it cost the client and sent."""
    lines = [
        "| places | questions | way | client CPU an episode | peak memory (growth) | loop late, p99 (max) | of that its own "
        "| HTTP to the service (turns) | embedding | Chroma |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['places']} | 7 x {row['questions']} | {name_of(row)} | {row['cpu_ms_an_episode']:.1f} ms "
            f"| {row['memory_peak'] / 2**20:.0f} MB ({row['memory_growth'] / 2**20:.0f} MB) "
            f"| {lag_cells(row)} "
            f"| {row['service_requests']:,} ({row['turns']:,}) | {row['embedding_requests']:,} | {row['chroma_requests']:,} |"
        )
    return "\n".join(lines)


def asked(rows: Sequence[Row]) -> str:
    """What was asked of ours, and whether it holds."""
    lines = ["| asked | places | questions | measured | holds |", "| --- | ---: | ---: | ---: | --- |"]
    by = {(row["contender"], row["mode"], row["places"], row["questions"]): row for row in rows}
    for (contender, mode, places, questions), row in by.items():
        if (contender, mode) != ("ours", "pool"):
            continue
        ratio = row["wall"] / row["floor"]
        # With fewer even a client that takes no time waits longer for the last episodes.
        if questions == MOST_QUESTIONS:
            lines.append(
                f"| one pool within 10 % of the floor | {places} | 7 x {questions} | {ratio - 1:+.1%} | {'yes' if ratio <= ASKED else 'NO'} |"
            )
        for other in (("ours", "suites"), ("cookbook", "suites")):
            peer = by.get((*other, places, questions))
            if peer:
                faster = peer["wall"] / row["wall"]
                lines.append(
                    f"| one pool before {NAMES[other]} | {places} | 7 x {questions} | {faster:.2f} times as fast "
                    f"| {'yes' if faster > 1 else 'NO'} |"
                )
    return "\n".join(lines)


CAPTION = "The areas are the places in use from the call to its return; the black line is the floor."
NOTES = """How it was measured:

- Every run evaluates the same episodes, each in a process of its own against a fresh service. What a turn says and how long it takes
  depends on the question alone; that each episode was played once and to its end is checked in the service's log, and that the
  contender counted as many right answers as were given. All processes share the machine's cores.
- `places` are the samples that the service serves at a time; whatever else it is sent waits in its line, first come first served.
- `wall` is the whole call: connecting, playing, scoring, the files and the report of ours; what the recipe's command does. A fresh
  process imports torch (with the tokenizer), tinker, Chroma's client and Gemini's before; those seconds are in the table's file.
- `floor` is what no schedule of the drawn turns and searches on so many places beats, with all suites at once
  (benchmarks/evaluation_throughput/floor.py has the proof). `ideal client` is a simulated one that takes no time for anything and
  serves turns first come first served, in one pool or suite by suite. It does not know how long turns will take, as no client
  does; so what it needs beyond the floor is the wait for the last episodes.
- `places in use` is their mean from the first sample to the end of the last. Where they are far from full all the
  time, it is not the places that limit but this machine's cores, which the client shares with the service, Chroma and the stand-in.
- How long the suites' episodes are is a model of such questions (benchmarks/evaluation_throughput/load.py): bamboogle's have 2
  turns, those of musique 3 to 5. Suites have 500 questions each here, though bamboogle itself has 125.
- The loop is looked at every 10 ms; `of that its own` is the part that the loop's own thread was computing.
- tinker-cookbook 0.6.1 runs its recipe's `offline_eval.cli_main`. Its Chroma address was set, which it writes as
  `localhost:8000`; otherwise what benchmarks/results/throughput.md says of it holds here too. It keeps no episodes and draws no
  intervals; ours does both within the time."""


def picture(rows: Sequence[Row], path: Path) -> None:
    """A row a way, a column a size: the places in use from the call to its return, with the floor as a line."""
    import altair as alt

    sizes = list(dict.fromkeys((row["places"], row["questions"]) for row in rows))
    columns = []
    for places, questions in sizes:
        shown = [row for row in rows if (row["places"], row["questions"]) == (places, questions)]
        seconds = alt.Scale(domain=[0, 1.02 * max(row["wall"] for row in shown)], nice=False)
        panels = [_use(row, seconds, is_last=number == len(shown) - 1) for number, row in enumerate(shown)]
        title = alt.Title(f"{places} places, 7 x {questions} questions", fontSize=13, anchor="start")
        columns.append(alt.vconcat(*panels, spacing=10).properties(title=title))
    chart = (
        alt.hconcat(*columns, spacing=24)
        .configure(background="white", font="sans-serif")
        .configure_view(stroke=None)
        .configure_axis(grid=False)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.save(str(path))


def _use(row: Row, seconds: Any, *, is_last: bool) -> Any:
    """One run: an area that ends where the call returned."""
    import altair as alt

    use = row["use_over_time"]
    step = row["wall"] / len(use)
    frame = pl.DataFrame({"seconds": [step * number for number in range(len(use) + 1)], "use": [*use, use[-1]]})
    heading = f"{name_of(row)}: {row['wall']:.0f} s, {row['wall'] / row['floor']:.2f} x floor"
    area = (
        alt.Chart(frame)
        .mark_area(interpolate="step-after", color=COLORS[name_of(row)])
        .encode(
            x=alt.X("seconds:Q", scale=seconds, title="seconds" if is_last else None, axis=alt.Axis(labels=is_last)),
            y=alt.Y(
                "use:Q",
                title="places in use" if is_last else None,
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format=".0%", values=[0, 0.5, 1]),
            ),
        )
    )
    line = alt.Chart().mark_rule(color="black", strokeWidth=1.5).encode(x=alt.datum(row["floor"]))
    title = alt.Title(heading, fontSize=11, fontWeight="normal", anchor="start", offset=3)
    return (area + line).properties(width=270, height=70, title=title)
