"""The throughput benchmark's table, what was asked of it, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from benchmarks.shared.client_figures import (
    CLIENT_COLUMNS,
    LATE_SIZE,
    Row,
    client_cells,
    lateness_goal,
    memory_goal,
)
from benchmarks.shared.report import RESULTS, Goal, goals_table, write_result

NAMES = {
    ("ours", "synchronous"): "ours, synchronous",
    ("ours", "streaming"): "ours, streaming (`max_staleness=0`)",
    ("ours", "asynchronous"): "ours, `max_staleness=1`",
    ("cookbook", "synchronous"): "cookbook, synchronous",
    ("cookbook", "streaming"): "cookbook, `stream_minibatch_config`",
    ("cookbook", "asynchronous"): "cookbook, `async_config` (1 step off)",
}
NAMES |= {
    ("before", mode): f"before, {name.removeprefix('ours, ')}" for (who, mode), name in NAMES.items() if who == "ours"
}
COLORS = {"ours": "#2a6fbb", "before": "#8fb3d9", "cookbook": "#c9803a"}


def report(rows: Sequence[Row], *, keep: bool, in_flight: int | None, note: str = "") -> None:
    """Prints what was measured; with ``keep`` also writes it to benchmarks/results/, with the picture and the note."""
    if in_flight:
        print(in_flight_line(rows, in_flight))
        return
    body = [table(rows), requests_table(rows), asked(rows), f"{NOTES}\n{_conditions(rows, note)}"]
    if not keep:
        print("\n\n".join(body))
        return
    picture(rows, RESULTS / "throughput.svg")
    title = "Training at the service's own speed"
    write_result("throughput", title, ["![wall a step](throughput.svg)", *body], pl.DataFrame(list(rows)))


def _conditions(rows: Sequence[Row], note: str) -> str:
    """The losses of the asynchronous ways and what else the machine did, as lines of the notes."""
    losses = sorted({row["loss"] or "each contender's own default" for row in rows if row["mode"] == "asynchronous"})
    load = ", ".join(f"{row['load_before']:.1f}" for row in rows)
    lines = [f"- Loss of the asynchronous ways: {', '.join(losses)}."] if losses else []
    lines.append(f"- Load average of the last minute before each run, in the order of the first table: {load}.")
    return "\n".join([*lines, *([f"- {note}"] if note else [])])


def in_flight_line(rows: Sequence[Row], wanted: int) -> str:
    """Whether so many episodes were played at once."""
    if not rows:
        return f"| {wanted:,} episodes in flight | NO: the run failed |"
    row = rows[0]
    return (
        f"| {row['in_flight']:,} of {wanted:,} episodes in flight at once, all trained on | "
        f"{'yes' if row['in_flight'] == wanted else 'NO'} | {row['wall']:.1f} s, floor {row['floor']:.1f} s | "
        f"{row['memory_growth'] / row['in_flight'] / 1024:.0f} KB an episode | loop late by {1000 * row['lag_max']:.0f} ms at most |"
    )


def table(rows: Sequence[Row]) -> str:
    """One line a run."""
    lines = [
        f"| groups x 8 | way | episodes/s | wall a step | floor a step | wall/floor | {CLIENT_COLUMNS} |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['groups']} | {NAMES[row['contender'], row['mode']]} | {row['episodes_a_second']:.1f} "
            f"| {row['wall'] / row['steps']:.1f} s | {row['floor'] / row['steps']:.1f} s | {row['wall'] / row['floor']:.2f} "
            f"| {client_cells(row)} |"
        )
    return "\n".join(lines)


def requests_table(rows: Sequence[Row]) -> str:
    """What each run sent."""
    lines = [
        "| groups x 8 | way | steps | HTTP to the service | sample requests (samples) | embedding | Chroma | forward_backward | optimizer | saves "
        "| examples | training tokens, of the episodes' own |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['groups']} | {NAMES[row['contender'], row['mode']]} | {row['steps']} | {row['service_requests']:,} "
            f"| {row['sample_requests']:,} ({row['samples']:,}) | {row['embedding_requests']:,} | {row['chroma_requests']:,} "
            f"| {row['forward_backwards']} | {row['optimizer_steps']} | {row['saves']} | {row['examples']:,} "
            f"| {row['training_tokens'] / 1e6:.2f} M ({row['training_tokens'] / row['tokens_of_episodes']:.2f}) |"
        )
    return "\n".join(lines)


def asked(rows: Sequence[Row]) -> str:
    """What was asked of ours, and whether it holds."""
    by = {(row["contender"], row["mode"], row["groups"]): row for row in rows}
    sizes = sorted({row["groups"] for row in rows})
    goals = [goal for size in sizes for goal in _goals_at(by, size)]
    goals += [
        lateness_goal(row, row["mode"]) for row in rows if row["contender"] == "ours" and row["groups"] == LATE_SIZE
    ]
    for mode in ("streaming", "asynchronous"):
        small, large = by.get(("ours", mode, sizes[0])), by.get(("ours", mode, sizes[-1])) if len(sizes) > 1 else None
        if small and large:
            ratio = large["cpu_ms_an_episode"] / small["cpu_ms_an_episode"]
            what = f"{mode}: CPU an episode does not grow with the batch (at most 1.1 times)"
            goals += [
                memory_goal(small, large, mode),
                Goal(what, f"{sizes[0]} to {sizes[-1]} x 8", f"{ratio:.2f} times", ratio <= 1.1),
            ]
    return goals_table(goals)


def _goals_at(by: Mapping[tuple[str, str, int], Row], groups: int) -> Iterator[Goal]:
    """Asked of ours at one size: beside the floor, and beside the cookbook's ways."""
    size = f"{groups} x 8"
    streaming, pipelined = by.get(("ours", "streaming", groups)), by.get(("ours", "asynchronous", groups))
    if streaming:
        ratio = streaming["wall"] / streaming["floor"]
        yield Goal("streaming within 12 % of its floor", size, f"{ratio - 1:+.1%}", ratio <= 1.12)
    for mode in ("streaming", "asynchronous"):
        peer = by.get(("cookbook", mode, groups))
        if pipelined and peer:
            rate = pipelined["episodes_a_second"] / peer["episodes_a_second"]
            cpu = peer["cpu_ms_an_episode"] / pipelined["cpu_ms_an_episode"]
            what = f"`max_staleness=1`: 2 times the episodes/s of the cookbook's {mode}, for 1/5 of its client CPU"
            yield Goal(what, size, f"{rate:.2f} times, 1/{cpu:.1f} of the CPU", rate >= 2 and cpu >= 5)
    if streaming and (peer := by.get(("cookbook", "streaming", groups))):
        cpu = peer["cpu_ms_an_episode"] / streaming["cpu_ms_an_episode"]
        what = "streaming: at most 1/5 of the cookbook's streaming in client CPU"
        yield Goal(what, size, f"1/{cpu:.1f}", cpu >= 5)


NOTES = """How it was measured:

- Every run trains the same episodes in the same batches, in a process of its own against a fresh service. What a turn says and how
  long it takes depends on the question and the episode alone. All processes share the machine's cores.
- A run is measured from the service's first sample to the moment when the weights behind the last optimizer step can be
  sampled from (the cookbook's asynchronous way publishes none behind its last step: to its final checkpoint there); CPU, memory
  and the loop's lateness are those of that time. CPU and memory are the contender's own and those of its children.
- The floor is computed from what the service drew, for each way by its own formula (benchmarks/throughput/floor.py): on-policy,
  each batch's groups, released when their last member has played its drawn turns and searches (each sampled singly), go through a
  trainer that does one thing at a time, then optimizer and save; synchronous, training follows the last release;
  `max_staleness=1`, the later of the trainer's own work and the longest episode that must be in each batch. With all first
  turns of a group in one request, the floor is `floor_first_turn_shared` in the table's file. Groups of constant reward need no
  training in it. A search costs 0.2 s in it where no other episode asks the same, else nothing.
- The loop is looked at every 10 ms; `of that its own` is the part that the loop's own thread was computing, without waiting for a
  core or for the interpreter.
- From 512 episodes in flight on, ours rolls out in worker processes (`workers="auto"`). The loop is that of the process in which the
  user works, and HTTP requests are counted in this process alone.
- What tinker-cookbook 0.6.1 was given, through its configuration and the environment, with none of its code changed: a
  tokenizer of this machine is registered under the model's name; the questions lie where the recipe downloads them to;
  `GOOGLE_VERTEX_BASE_URL` names the stand-in and `GOOGLE_APPLICATION_CREDENTIALS` a service account whose tokens come from this
  machine. Its other settings are the recipe's; it speaks Vertex AI and ours the Developer API. Its chat format is `qwen3_instruct`,
  plain ChatML without thinking, as ours.
- The recipe trains on groups of constant reward too; ours leaves them out, as is its default."""


def picture(rows: Sequence[Row], path: Path) -> None:
    """Wall a step by size and way, with the floor as a line on each bar."""
    import altair as alt

    panels = []
    for size in sorted({row["groups"] for row in rows}):
        values = [
            {
                "way": f"{row['contender']} {row['mode']}",
                "contender": row["contender"],
                "wall": row["wall"] / row["steps"],
                "floor": row["floor"] / row["steps"],
            }
            for row in rows
            if row["groups"] == size
        ]
        base = alt.Chart(alt.Data(values=values)).encode(y=alt.Y("way:N", sort=None, title=None))
        wall = alt.X("wall:Q", title="s a step")
        colours = alt.Scale(domain=list(COLORS), range=list(COLORS.values()))
        bars = base.mark_bar().encode(x=wall, color=alt.Color("contender:N", scale=colours, legend=None))
        floors = base.mark_tick(color="black", thickness=2, size=22).encode(x="floor:Q")
        texts = base.mark_text(align="left", dx=3).encode(x=wall, text=alt.Text("wall:Q", format=".0f"))
        panels.append(alt.layer(bars, floors, texts).properties(title=f"{size} x 8", width=220, height=alt.Step(26)))
    chart = alt.hconcat(*panels, title="Wall a step; the black line is the floor")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.save(path)
