"""``docs/metrics.md`` from the table of metrics: ``python -m tests.records.metrics_page > docs/metrics.md``."""

import sys

from searchr1_async.records.metrics import METRICS


def render_table() -> str:
    """``docs/metrics.md``."""
    lines = ["| name | label | unit | bounds | better | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for metric in METRICS.values():
        name = f"`{metric.column}`" + (f" (`{metric.alias}`)" if metric.alias else "")
        unit = metric.unit or ("fraction" if metric.is_share else "")
        low, high = metric.low, metric.high
        bounds = "" if low is None else f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
        lines.append(f"| {name} | {metric.label} | {unit} | {bounds} | {metric.better} | {metric.meaning} |")
    return _DOCS.format(table="\n".join(lines))


_DOCS = """# Metrics of a step

Columns of `run.metrics`, in the event `StepFinished`, and in trackers. The table is
`searchr1_async/records/metrics.csv`; this page is written from it, and a test compares them.

`env/<suite>/…` has the same names as `env/all/…`, over the episodes of one suite (a suite named `all` is `env/all_/…`). Means are
over finished episodes and missing where there are none. `run.plot` accepts a column, its name without `env/all/`, or the second
name in brackets. An evaluation's exact match, with its 95 % interval, is `exact_match`, `exact_match_low` and `exact_match_high` in
`EvaluationFinished`, and `exact_match/<suite>` for one suite.

{table}
"""


if __name__ == "__main__":
    sys.stdout.write(render_table())
