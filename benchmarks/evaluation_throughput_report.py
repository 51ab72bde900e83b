"""The evaluation benchmark's table, what was asked of it, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.report import RESULTS, write_result

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
        ["![wall, floor and places in use](evaluation_throughput.svg)", *body],
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
            f"| {1000 * row['lag_p99']:.0f} ({1000 * row['lag_max']:.0f}) ms "
            f"| {1000 * row['lag_own_p99']:.0f} ({1000 * row['lag_own_max']:.0f}) ms "
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


NOTES = """How it was measured:

- Every run evaluates the same episodes, each in a process of its own against a fresh service. What a turn says and how long it takes
  depends on the question alone; that each episode was played once and to its end is checked in the service's log, and that the
  contender counted as many right answers as were given. All processes share the machine's cores.
- `places` are the samples that the service serves at a time; whatever else it is sent waits in its line, first come first served.
- `wall` is the whole call: connecting, playing, scoring, the files and the report of ours; what the recipe's command does.
- `floor` is what no schedule of the drawn turns and searches on so many places beats, with all suites at once
  (benchmarks/evaluation_throughput_floor.py has the proof). `ideal client` is a simulated one that loses no time at all but does not
  know how long turns will take, in one pool or suite by suite: what it needs beyond the floor is the wait for the last episodes.
- `places in use` is their mean from the first sample to the end of the last.
- How long the suites' episodes are is a model of such questions (benchmarks/evaluation_throughput_load.py): bamboogle's have 2
  turns, those of musique 3 to 5. Suites have 500 questions each here, though bamboogle itself has 125.
- The loop is looked at every 10 ms; `of that its own` is the part that the loop's own thread was computing.
- tinker-cookbook 0.5.8 runs its recipe's `offline_eval.cli_main`. It was told where Chroma is, which it writes out as
  `localhost:8000`; otherwise what benchmarks/results/throughput.md says of it holds here too. It keeps no episodes and draws no
  intervals; ours does both within the time."""


def picture(rows: Sequence[Row], path: Path) -> None:
    """The wall of each run with the floor as a line on it, and the places in use over time."""
    import altair as alt

    sizes = list(dict.fromkeys((row["places"], row["questions"]) for row in rows))
    scale = alt.Scale(domain=list(COLORS), range=list(COLORS.values()))
    columns = []
    for places, questions in sizes:
        shown = [row for row in rows if (row["places"], row["questions"]) == (places, questions)]
        most = max(row["wall"] for row in shown)
        time_axis = alt.Scale(domain=[0, 1.12 * most], nice=False)
        columns.append(
            alt.vconcat(_walls(shown, scale, time_axis), _use(shown, scale, time_axis), spacing=14).properties(
                title=f"{places} places, 7 x {questions} questions"
            )
        )
    chart = (
        alt.hconcat(*columns, spacing=26)
        .resolve_scale(x="independent", y="independent", color="shared")
        .configure(background="white", font="sans-serif")
        .configure_view(stroke=None)
        .configure_legend(orient="bottom", title=None, labelLimit=300, direction="horizontal")
        .configure_title(fontSize=12)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.save(str(path))


def _walls(rows: Sequence[Row], colors: Any, seconds: Any) -> Any:
    import altair as alt

    frame = pl.DataFrame(
        {
            "way": [name_of(row) for row in rows],
            "wall": [row["wall"] for row in rows],
            "floor": [row["floor"] for row in rows],
            "said": [f"{row['wall']:.0f} s, {row['wall'] / row['floor']:.2f} x floor" for row in rows],
        }
    )
    base = alt.Chart(frame).encode(y=alt.Y("way:N", title=None, axis=None, sort=list(COLORS)))
    bars = base.mark_bar(height=16).encode(
        x=alt.X("wall:Q", scale=seconds, title=None, axis=None), color=alt.Color("way:N", scale=colors)
    )
    lines = base.mark_tick(color="black", thickness=2, size=22).encode(x=alt.X("floor:Q", scale=seconds))
    words = base.mark_text(align="left", dx=5, baseline="bottom", dy=-9, fontSize=10).encode(
        x=alt.datum(0), text="said:N"
    )
    return (bars + lines + words).properties(width=270, height=36 * len(rows))


def _use(rows: Sequence[Row], colors: Any, seconds: Any) -> Any:
    import altair as alt

    frame = pl.concat(
        [
            pl.DataFrame(
                {
                    "way": [name_of(row)] * len(row["use_over_time"]),
                    "seconds": [
                        row["wall"] * (place + 0.5) / len(row["use_over_time"])
                        for place in range(len(row["use_over_time"]))
                    ],
                    "use": row["use_over_time"],
                }
            )
            for row in rows
        ]
    )
    return (
        alt.Chart(frame)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("seconds:Q", scale=seconds, title="seconds"),
            y=alt.Y(
                "use:Q", title="places in use", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%", tickCount=5)
            ),
            color=alt.Color("way:N", scale=colors),
        )
        .properties(width=270, height=150)
    )
