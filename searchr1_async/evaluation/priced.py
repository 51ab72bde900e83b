"""Costs per question: turns, searches, tokens, seconds and dollars. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from searchr1_async.billing import Billing, TokenUsage, billing_of, is_tinker_host
from searchr1_async.evaluation.manifest import Manifest, SystemRecord
from searchr1_async.records.scores import ALL_SUITES, COSTS
from searchr1_async.runs.evaluation import Evaluation

COST_SCHEMA = pl.Schema(
    {
        "system": pl.String,
        "suite": pl.String,  # also "all" if there are several
        "questions": pl.Int64,
        "episodes": pl.Int64,  # finished ones; failed ones count only in dollars
        **dict.fromkeys(COSTS, pl.Float64),  # per question over all its samples, averaged
        "seconds_p95": pl.Float64,  # per episode
        "dollars": pl.Float64,  # per question; null if the price is unknown
        "dollars_total": pl.Float64,
        "cost": pl.String,  # the total as text
    }
)


def priced_costs(systems: Sequence[tuple[Evaluation, SystemRecord | None]], manifest: Manifest | None) -> pl.DataFrame:
    """One row per system and suite, with schema :data:`COST_SCHEMA`."""
    rows = []
    for evaluation, record in systems:
        costs, billing = evaluation.costs(), _billing(record, manifest)
        for (suite,), own in costs.group_by("suite", maintain_order=True):
            by_cost = {row["cost"]: row for row in own.iter_rows(named=True)}
            cost = billing.cost(_used(evaluation.scores, str(suite)))
            questions = own["questions"][0]
            rows.append(
                {
                    "system": evaluation.label,
                    "suite": suite,
                    "questions": questions,
                    "episodes": own["episodes"][0],
                    **{name: by_cost[name]["question_mean"] for name in COSTS},
                    "seconds_p95": by_cost["seconds"]["p95"],
                    "dollars": None if cost.dollars is None or not questions else cost.dollars / questions,
                    "dollars_total": cost.dollars,
                    "cost": "not known" if cost.dollars is None else cost.text,
                }
            )
    return pl.DataFrame(rows, schema=COST_SCHEMA)


def _used(scores: pl.DataFrame, suite: str) -> TokenUsage:
    """Tokens of a suite's episodes, including failed ones, which are billed too."""
    is_all = suite == ALL_SUITES and suite not in scores["suite"]
    own = scores if is_all else scores.filter(suite=suite)
    prompt, cached, sampled = own.select(pl.col("prompt_tokens", "cached_prompt_tokens", "sampled_tokens").sum()).row(0)
    return TokenUsage(prompt or 0, cached or 0, sampled or 0)


def _billing(record: SystemRecord | None, manifest: Manifest | None) -> Billing:
    if record is None or manifest is None:
        return Billing(reason="the model and the service were not recorded")
    service = manifest.service
    # Older manifests record only an explicit address.
    is_tinker = service.get("tinker", is_tinker_host(service.get("host")))
    return billing_of(record.model, is_embedded=bool(service.get("embedded")), is_tinker=is_tinker)
