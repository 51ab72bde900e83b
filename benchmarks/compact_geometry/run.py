"""Whether rows that extend real vectors are as hard to search as real ones: what lies near them, and what inverted lists find.

    python -m benchmarks compact_geometry --data FOLDER --work FOLDER

Real rows are held against as many rows made of a part of them: of a quarter, of a sixteenth, of a sixty-fourth. Neighbours of real
questions count as well as neighbours of rows. Result: benchmarks/results/compact_geometry.md.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.shared.extended_vectors import SPREAD, Extension, neighbours
from benchmarks.shared.real_vectors import real_vectors
from benchmarks.shared.report import write_result
from searchr1_async.search import Vectors

K = 20
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""Of the lists that are probed."""
LISTS = 512
PARTS = (4, 16, 64)


def intrinsic_dimension(similarities: Vectors) -> float:
    """The local intrinsic dimension of rows of length 1: maximum likelihood over each row's neighbours (Levina and Bickel 2004),
    averaged as MacKay and Ghahramani correct it.

    Args:
        similarities: ``[rows, k]`` of the nearest others, nearest first.
    """
    distances = np.sqrt(np.maximum(2 - 2 * similarities.astype(np.float64), 1e-12))
    inverse = (
        np.log(distances[:, -1:] / distances[:, :-1]).mean(axis=1) * (distances.shape[1] - 1) / (distances.shape[1] - 2)
    )
    kept = inverse[(distances[:, 0] > 1e-4) & (inverse > 0)]
    return float(1 / kept.mean())


def measure(rows: Vectors, queries: Vectors, name: str, seed: int = 1) -> dict[str, Any]:
    """What lies near rows and questions, and what inverted lists find of it."""
    import faiss

    draw = np.random.default_rng(seed)
    own = draw.choice(len(rows), min(2000, len(rows)), replace=False)
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows)
    near = flat.search(rows[own], K + 1)[0][:, 1:]
    asked, exact = flat.search(queries, K)
    quantiser = faiss.IndexFlatIP(rows.shape[1])
    lists = faiss.IndexIVFFlat(quantiser, rows.shape[1], LISTS, faiss.METRIC_INNER_PRODUCT)
    lists.cp.niter, lists.cp.seed, lists.cp.spherical, lists.cp.max_points_per_centroid = 8, seed, True, 64
    lists.train(rows)
    lists.add(rows)
    found: dict[str, Any] = {
        "rows": name,
        "count": len(rows),
        **{f"nearest_{share}": float(np.quantile(near[:, 0], share / 100)) for share in (10, 50, 90)},
        "dimension": intrinsic_dimension(near),
        "question_nearest": float(np.median(asked[:, 0])),
        "question_gap": float(np.median(asked[:, 0] - asked[:, 9])),
        "question_dimension": intrinsic_dimension(asked),
    }
    for share in SHARES:
        lists.nprobe = round(LISTS * share)
        best = lists.search(queries, 3)[1]
        found[f"recall_{share:.3f}"] = float((exact[:, :3, None] == best[:, None, :]).any(axis=2).mean())
    return found


def of_part(vectors: Vectors, part: int, spread: float, rows: int) -> Vectors:
    """So many rows made of one in ``part`` of the real ones, which are left out where they are few enough."""
    chosen = np.random.default_rng(0).permutation(len(vectors))[: len(vectors) // part]
    base = np.ascontiguousarray(vectors[chosen])
    extension = Extension(base, neighbours(base), spread)
    return np.concatenate([part for _, _, part in extension.blocks(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--as-is", action="store_true", help="take the passages whose vectors are there")
    parser.add_argument("--spreads", type=float, nargs="+", default=[SPREAD])
    parser.add_argument("--parts", type=int, nargs="+", default=list(PARTS))
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args()
    real = asyncio.run(real_vectors(options.data, options.work, limit=10**6 if options.as_is else None))
    queries = real.queries[:: max(1, len(real.queries) // 1000)]
    count = min(50_000, len(real.vectors))
    vectors = real.vectors[np.random.default_rng(2).permutation(len(real.vectors))[:count]]
    rows = [measure(vectors, queries, "real")]
    for part in options.parts:
        rows.append(measure(vectors[: count // part], queries, f"real, one in {part}"))
        for spread in options.spreads:
            made = of_part(vectors, part, spread, count)
            rows.append(measure(made, queries, f"made of one in {part}, m = {spread:g}"))
            print(rows[-1], file=sys.stderr, flush=True)
    body = [table(rows), NOTES]
    if options.keep:
        write_result("compact_geometry", "Real vectors, and rows made of them", body, pl.DataFrame(rows))
    else:
        print("\n\n".join(body))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a set of rows."""
    lines = [
        "| rows | count | nearest other: 10 %, 50 %, 90 % | local dimension | a question's nearest | less its 10th | its local dimension "
        "| recall@3 at " + " | at ".join(f"1/{round(1 / share)}" for share in SHARES) + " |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(SHARES),
    ]
    for row in rows:
        lines.append(
            f"| {row['rows']} | {row['count']:,} | {row['nearest_10']:.3f}, {row['nearest_50']:.3f}, {row['nearest_90']:.3f} "
            f"| {row['dimension']:.1f} | {row['question_nearest']:.3f} | {row['question_gap']:.3f} | {row['question_dimension']:.1f} | "
            + " | ".join(f"{row[f'recall_{share:.3f}']:.3f}" for share in SHARES)
            + " |"
        )
    return "\n".join(lines)


NOTES = f"""- Similarities are cosines. The local dimension is the maximum likelihood over the {K} nearest (Levina and Bickel 2004), of 2,000
  rows, or of a thousand real questions over all rows.
- Recall@3 is that of {LISTS} inverted lists of the exact vectors, of which the share above is probed, for a thousand real questions.
- Rows "made of one in 4" are what benchmarks/shared/extended_vectors.py makes of a quarter of the real rows, in as large a number as all
  real rows: they ought to look like these."""
