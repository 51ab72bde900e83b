"""What an evaluation cost a question: turns, searches, tokens, seconds and dollars. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from searchr1_async.evaluation.figures import COSTS
from searchr1_async.evaluation.manifest import Manifest, SystemRecord
from searchr1_async.evaluation.result import Evaluation
from searchr1_async.watch.prices import Cost, cost_of

COST_SCHEMA = pl.Schema(
    {
        "system": pl.String,
        "suite": pl.String,  # with several suites also "all"
        "questions": pl.Int64,
        "episodes": pl.Int64,  # finished ones: the others are not counted
        **dict.fromkeys(COSTS, pl.Float64),  # means of a question, all its samples together
        "seconds_p95": pl.Float64,  # of one episode
        "dollars": pl.Float64,  # a question; null where the price is not known
        "dollars_total": pl.Float64,
        "cost": pl.String,  # the total in words
    }
)


def priced_costs(systems: Sequence[tuple[Evaluation, SystemRecord | None]], manifest: Manifest | None) -> pl.DataFrame:
    """A row for each system and suite, as a frame of exactly :data:`COST_SCHEMA`."""
    rows = []
    for evaluation, record in systems:
        costs = evaluation.costs()
        for (suite,), own in costs.group_by("suite", maintain_order=True):
            by_cost = {row["cost"]: row for row in own.iter_rows(named=True)}
            total = {name: int(by_cost[name]["total"] or 0) for name in ("prompt_tokens", "sampled_tokens")}
            price = _price(record, manifest, total)
            questions = own["questions"][0]
            rows.append(
                {
                    "system": evaluation.label,
                    "suite": suite,
                    "questions": questions,
                    "episodes": own["episodes"][0],
                    **{name: by_cost[name]["question_mean"] for name in COSTS},
                    "seconds_p95": by_cost["seconds"]["p95"],
                    "dollars": None if price is None or not questions else price.dollars / questions,
                    "dollars_total": None if price is None else price.dollars,
                    "cost": "not known" if price is None else price.text,
                }
            )
    return pl.DataFrame(rows, schema=COST_SCHEMA)


def _price(record: SystemRecord | None, manifest: Manifest | None, total: dict[str, int]) -> Cost | None:
    if record is None or manifest is None:
        return None
    is_embedded = bool(manifest.service.get("embedded"))
    return cost_of(record.model, is_embedded, **total, trained_tokens=0)
