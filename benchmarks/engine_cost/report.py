"""The tables of the engine's costs, and what was asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from benchmarks.engine_cost.looks import OTHER
from benchmarks.shared.client_figures import (
    CLIENT_COLUMNS,
    LATE_SIZE,
    Row,
    client_cells,
    lateness_goal,
    memory_goal,
)
from benchmarks.shared.report import Goal, goals_table, write_result

NAMES = {"train": "training, `max_staleness=1`", "rollouts": "rollouts alone", "sdk": "the SDK alone"}
CPU_GOAL = 4.0
"""Milliseconds an episode."""
NATIVE = "the rest of the process's growth: native buffers, gaps (below 0: imported before the first sample)"
_LISTED = 12


def report(rows: Sequence[Row], *, keep: bool) -> None:
    """Prints the tables; with ``keep`` also writes them to benchmarks/results/."""
    sections = [
        costs(rows),
        *([asked(rows)] if rows else []),
        *(section for section in (cpu(rows), lateness(rows), memory(rows)) if section),
        NOTES,
    ]
    if keep:
        write_result(
            "engine_cost",
            "What an episode costs the client",
            sections,
            pl.DataFrame(list(rows), infer_schema_length=None),
        )
    else:
        print("\n\n".join(sections))


def costs(rows: Sequence[Row]) -> str:
    """One line a run that nothing looked at."""
    lines = [
        f"| groups x 8 | client | episodes/s | {CLIENT_COLUMNS} | load before |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in _plain(rows).values():
        lines.append(
            f"| {row['groups']} | {NAMES[row['client']]} | {row['episodes'] / row['wall']:.1f} | {client_cells(row)} "
            f"| {row['load_before']:.1f} |"
        )
    return "\n".join(lines)


def asked(rows: Sequence[Row]) -> str:
    """The goals, and whether they are met."""
    plain = _plain(rows)
    sizes = sorted({groups for _, groups in plain})
    goals = []
    for size in sizes:
        if (train := plain.get(("train", size))) and (sdk := plain.get(("sdk", size))):
            ours = train["cpu_ms_an_episode"] - sdk["cpu_ms_an_episode"]
            what = f"at most {CPU_GOAL:g} ms of CPU an episode beside the SDK"
            goals.append(Goal(what, f"{size} x 8", f"{ours:.1f} ms", ours <= CPU_GOAL))
    if late := plain.get(("train", LATE_SIZE)):
        goals.append(lateness_goal(late, "training"))
    trained = [plain["train", size] for size in sizes if ("train", size) in plain]
    if len(trained) > 1:
        goals.append(memory_goal(trained[0], trained[-1], "training"))
    return goals_table(goals)


def cpu(rows: Sequence[Row]) -> str:
    """Milliseconds an episode by part: the shares of the profiled run, of the CPU of the run that nothing looked at."""
    columns: dict[int, dict[str, float]] = {}
    for row in _looked(rows, "cpu"):
        total = _plain(rows).get(("train", row["groups"]), row)["cpu_ms_an_episode"]
        samples = sum(seen["value"] for seen in row["looked"])
        columns[row["groups"]] = {seen["part"]: total * seen["value"] / samples for seen in row["looked"]}
    return _by_part("CPU of an episode by part, ms", columns, "{:.2f}")


def lateness(rows: Sequence[Row]) -> str:
    """Seconds in which the loop was late, by the callback that ran meanwhile in any thread."""
    lines = []
    for row in _looked(rows, "late"):
        lines += [
            f"The loop at {row['groups']} x 8 was late for {row['late_seconds']:.1f} s, the start included, while these "
            "callbacks of over 5 ms ran in our thread or in the SDK's (several may at once):",
            "",
            "| callback | seconds of lateness | times | longest |",
            "| --- | ---: | ---: | ---: |",
        ]
        for seen in row["looked"][:_LISTED]:
            name = "none: the machine, or many short callbacks" if seen["part"] == OTHER else f"`{seen['part']}`"
            lines.append(f"| {name} | {seen['value']:.2f} | {seen['count']} | {1000 * seen['longest']:.0f} ms |")
        lines.append("")
    return "\n".join(lines).strip()


def memory(rows: Sequence[Row]) -> str:
    """KB an episode in flight: Python's objects by the module that made them, and what the process grew beyond them in the run
    that nothing looked at."""
    columns: dict[int, dict[str, float]] = {}
    for row in _looked(rows, "memory"):
        each = row["in_flight"] * 1024
        columns[row["groups"]] = {seen["part"]: seen["value"] / each for seen in row["looked"]}
        if plain := _plain(rows).get(("train", row["groups"])):
            grown = plain["memory_growth"] / plain["in_flight"] / 1024
            columns[row["groups"]][NATIVE] = grown - sum(columns[row["groups"]].values())
    return _by_part("Memory an episode in flight by the module that made it, KB", columns, "{:.1f}")


def _by_part(title: str, columns: Mapping[int, Mapping[str, float]], form: str) -> str:
    if not columns:
        return ""
    parts = sorted({part for each in columns.values() for part in each})
    parts.sort(key=lambda part: -max(each.get(part, 0.0) for each in columns.values()))
    shown, rest = parts[:_LISTED], parts[_LISTED:]
    lines = [
        f"| {title} | {' | '.join(f'{size} x 8' for size in columns)} |",
        f"| --- | {' | '.join('---:' for _ in columns)} |",
    ]
    for part in shown:
        lines.append(f"| {part} | {' | '.join(form.format(each.get(part, 0.0)) for each in columns.values())} |")
    if rest:
        sums = (sum(each.get(part, 0.0) for part in rest) for each in columns.values())
        lines.append(f"| the rest | {' | '.join(map(form.format, sums))} |")
    totals = (sum(each.values()) for each in columns.values())
    lines.append(f"| **all** | {' | '.join(map(form.format, totals))} |")
    return "\n".join(lines)


def _plain(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    return {(row["client"], row["groups"]): row for row in rows if row["look"] is None}


def _looked(rows: Sequence[Row], look: str) -> list[Row]:
    return [row for row in rows if row["look"] == look]


NOTES = """How it was measured:

- Every run is a process of its own against a fresh service; all processes share the machine's cores. CPU, memory and lateness are those
  between the service's first sample and its last answer.
- `of that its own` is the part of the loop's lateness in which its thread computed, without waiting for a core or for the interpreter.
- The SDK alone sends the same number of requests with prompts of nearly the same lengths; what training has above it is the engine's,
  its search's, its records' and that of the training calls.
- A part of the CPU is decided by the stack: whatever runs below the SDK is the SDK's, else the innermost frame of ours decides.
- Memory by module is what Python allocated when it held most; a run that is traced is slower, so more or fewer episodes may wait."""
