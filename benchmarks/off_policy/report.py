"""The figures of one off-policy run, and the benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import polars as pl

from benchmarks.shared.report import write_result
from searchr1_async import Episode
from searchr1_async.billing import sampling_usage, total_usage
from searchr1_async.records.run_records import RunRecords

_LAST_STEPS = 3
"""Of a run: its training questions' exact match is the mean over these."""
_MEANS = {
    "kl_v1": "optim/kl_sample_train_v1",
    "kl_v2": "optim/kl_sample_train_v2",
    "seconds_a_step": "time/total",
    "staleness_mean": "env/all/staleness",
}
"""Columns of a row that are means of a metric over the steps."""


def prompt_tokens(episodes: Iterable[Episode]) -> tuple[int, int]:
    """Prompt tokens of all turns, each turn's whole prompt counted, and those of them that were no cache hits."""
    used = total_usage(map(sampling_usage, episodes))
    return used.prompt, used.prompt - used.cached


def row_of(records: RunRecords) -> dict[str, Any]:
    """What a finished run's records say of its learning; None where the service reported no such figure."""
    metrics = records.metrics().sort("progress/batch")
    steps = metrics.height

    def figure(name: str, reduce: str) -> float | None:
        if name not in metrics.columns or metrics[name].null_count() == steps:
            return None
        return float(getattr(metrics[name], reduce)())

    prompts, fresh = map(
        sum, zip(*(prompt_tokens(records.load_episodes(step + 1)) for step in range(steps)), strict=True)
    )
    return {
        **{column: figure(name, "mean") for column, name in _MEANS.items()},
        "kl_v2_max": figure("optim/kl_sample_train_v2", "max"),
        "ratio_min": figure("optim/ratio_min", "min"),
        "ratio_max": figure("optim/ratio_max", "max"),
        "staleness_max": figure("env/all/staleness_max", "max"),
        "seconds": figure("time/total", "sum"),
        "training_exact_match": float(metrics["env/all/correct"].tail(_LAST_STEPS).mean() or 0.0),  # pyright: ignore
        "prompt_tokens_a_step": prompts / steps,
        "prefilled_tokens_a_step": fresh / steps,
    }


def report(rows: pl.DataFrame, *, keep: bool, note: str) -> None:
    """Prints the tables; with ``keep`` also writes them to benchmarks/results/."""
    if rows.is_empty():
        print("no run finished")
        return
    notes = f"{NOTES}\n- Load average of the last minute before each run: {_span(rows['load_before'], '.1f')}."
    body = [learning_table(rows), in_flight_table(rows), each_run(rows), notes + (f"\n- {note}" if note else "")]
    body = [part for part in body if part]
    if keep:
        write_result("off_policy", "Learning from old weights", body, rows)
    else:
        print("\n\n".join(body))


def learning_table(rows: pl.DataFrame) -> str:
    """One line a staleness bound and loss, over the seeds."""
    lines = [
        "| `max_staleness` | loss | seeds | exact match before | after (each seed) | KL sampler to trainer (v2, worst step) "
        "| ratio, lowest and highest | staleness of a turn, mean (most) | s a step | s in all |",
        "| ---: | --- | ---: | ---: | --- | --- | --- | ---: | ---: | ---: |",
    ]
    snapshots = rows.filter(pl.col("weights") == "snapshot")
    for (staleness, loss), group in snapshots.group_by("staleness", "loss", maintain_order=True):
        each = ", ".join(f"{value:.2f}" for value in group.sort("seed")["exact_match_after"])
        lines.append(
            f"| {staleness} | `{loss}` | {group.height} | {_mean(group['exact_match_before'], '.2f')} "
            f"| {_mean(group['exact_match_after'], '.2f')} ({each}) "
            f"| {_mean(group['kl_v2'], '.2g')} ({_extreme(group['kl_v2_max'], 'max', '.2g')}) "
            f"| {_extreme(group['ratio_min'], 'min', '.2g')} to {_extreme(group['ratio_max'], 'max', '.2g')} "
            f"| {_mean(group['staleness_mean'], '.1f')} ({_extreme(group['staleness_max'], 'max', '.0f')}) "
            f"| {_mean(group['seconds_a_step'], '.1f')} | {_mean(group['seconds'], '.0f')} |"
        )
    return "\n".join(lines)


def in_flight_table(rows: pl.DataFrame) -> str:
    """In-flight weights beside snapshots at equal staleness and loss; empty where none were run."""
    lines = [
        "| `max_staleness` | loss | `weights_in_flight` | s a step | prompt tokens a step | of these prefilled, not cached "
        "| exact match after | KL (v2) |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    both = rows.filter(pl.col("weights") == "inflight").select("seed", "staleness", "loss").unique()
    compared = rows.join(both, on=["seed", "staleness", "loss"], how="semi").sort("staleness", "loss", "weights")
    for (staleness, loss, weights), group in compared.group_by("staleness", "loss", "weights", maintain_order=True):
        lines.append(
            f"| {staleness} | `{loss}` | `{weights}` | {_mean(group['seconds_a_step'], '.1f')} "
            f"| {_mean(group['prompt_tokens_a_step'], ',.0f')} | {_mean(group['prefilled_tokens_a_step'], ',.0f')} "
            f"| {_mean(group['exact_match_after'], '.2f')} | {_mean(group['kl_v2'], '.2g')} |"
        )
    return "\n".join(lines) if both.height else ""


def each_run(rows: pl.DataFrame) -> str:
    """One line a run."""
    lines = [
        "| seed | `max_staleness` | loss | `weights_in_flight` | steps | exact match before | after | in training, last "
        f"{_LAST_STEPS} steps | KL v1 | KL v2 | ratio | s |",
        "| ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows.iter_rows(named=True):
        ratio = "not reported" if row["ratio_max"] is None else f"{row['ratio_min']:.2g} to {row['ratio_max']:.2g}"
        kl = " | ".join("none" if row[name] is None else f"{row[name]:.2g}" for name in ("kl_v1", "kl_v2"))
        lines.append(
            f"| {row['seed']} | {row['staleness']} | `{row['loss']}` | `{row['weights']}` | {row['steps']} "
            f"| {row['exact_match_before']:.2f} | {row['exact_match_after']:.2f} | {row['training_exact_match']:.2f} "
            f"| {kl} | {ratio} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _mean(values: pl.Series, form: str) -> str:
    mean = values.cast(pl.Float64).mean()
    return "not reported" if mean is None else format(mean, form)


def _extreme(values: pl.Series, reduce: str, form: str) -> str:
    value = getattr(values.cast(pl.Float64), reduce)()
    return "not reported" if value is None else format(value, form)


def _span(values: pl.Series, form: str) -> str:
    return f"{_extreme(values, 'min', form)} to {_extreme(values, 'max', form)}"


NOTES = """How it was measured:

- All runs of a seed start from one warm-up and learn from the same questions in the same order. Exact match is of sampled episodes
  (temperature 1), one a question, on questions of countries that no run is trained on.
- KL is `optim/kl_sample_train_v2`: half the mean over sampled tokens of the squared difference between the log-probability under the
  weights that sampled a token and under those that learn from it, as a mean over the steps; v1 is the mean difference.
- The ratio is a token's probability in the trainer over that in the sampler; lowest and highest over all tokens and steps.
  It is not 1 at staleness 0 either: where the service samples and trains in bfloat16, the two passes round differently.
- A turn's staleness is its group's batch's; with in-flight weights it is an upper bound.
- Seconds are those of the steps (`time/total`): playing, learning and publishing, without warm-up and held-out questions.
- Prompt tokens are those of all episodes that the steps' batches held, dropped groups included; each turn's whole prompt counts.
  Prefilled ones are those that the service did not report as cache hits."""
