"""Which weights of its three parts make a real vector find the most answers in the top 3 (benchmarks/shared/real_vectors.py).

pip install wordllama
python -m benchmarks compact_vectors --data FOLDER --work FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from benchmarks.shared.real_vectors import SUITES, WEIGHTS, embedded_parts, holds_answer, nearest
from benchmarks.shared.report import write_result


async def compare_weights(data: Path, work: Path, *, compute: bool, choices: Sequence[Sequence[float]]) -> pl.DataFrame:
    """For each choice of weights the share of questions, by suite, with a golden answer in the top 3."""
    passages, questions, of_passages, of_questions = await embedded_parts(data, work, compute=compute)
    asked = [number for number, question in enumerate(questions) if question.metadata.get("answerable")]
    rows = []
    for weights in choices:
        found = nearest(of_questions.joined(weights)[asked], of_passages.joined(weights), 3)
        right = [
            holds_answer(questions[number], [passages[row] for row in top])
            for number, top in zip(asked, found, strict=True)
        ]
        for suite in SUITES:
            own = [
                is_right
                for number, is_right in zip(asked, right, strict=True)
                if questions[number].data_source == suite
            ]
            rows.append(
                {
                    "weights": " : ".join(f"{w:g}" for w in weights),
                    "suite": suite,
                    "questions": len(own),
                    "right": sum(own),
                }
            )
    return pl.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--as-is", action="store_true", help="embed nothing more: take the passages whose vectors are there"
    )
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args()
    choices = [
        (1, 0, 0),
        (0, 1, 0),
        WEIGHTS,
        (0.8, 0.5, 0.2),
        (0.7, 0.6, 0.35),
        (0.9, 0.4, 0.15),
        (0.6, 0.6, 0.5),
    ]
    table = asyncio.run(compare_weights(options.data, options.work, compute=not options.as_is, choices=choices))
    table = table.with_columns((pl.col("right") / pl.col("questions")).round(4).alias("share"))
    total = table.group_by("weights", maintain_order=True).agg(
        (pl.col("right").sum() / pl.col("questions").sum()).round(4).alias("all")
    )
    shown = table.pivot("suite", index="weights", values="share").join(total, on="weights")
    with pl.Config(tbl_rows=50):
        print(shown)
    if options.keep:
        rows = ["| " + " | ".join(map(str, row)) + " |" for row in shown.iter_rows()]
        head = [
            "| " + " | ".join(["MiniLM : WordLlama : title", *shown.columns[1:]]) + " |",
            "| --- " * len(shown.columns) + "|",
        ]
        body = [
            "The share of questions that the corpus answers with a golden answer in the top 3, by exact search, for each choice of "
            "the weights of the three parts.",
            "\n".join(head + rows),
        ]
        write_result("compact_vectors", "Vectors of 768 numbers from models that come by pip", body, shown)
