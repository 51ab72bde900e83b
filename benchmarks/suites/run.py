"""A short real run on other question suites: the same API over questions and passages in files.

    python -m benchmarks suites --data FOLDER --suites popqa hotpotqa

FOLDER holds `<suite>.jsonl` (`question`, `golden_answers`, `data_source`, `id`, `gold_passages`) and `corpus.parquet`
(`id`, `title`, `text`). The questions used are those whose gold passages are known; the corpus is cut to these
passages and as many others as asked for, so that it can be embedded in minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path

import polars as pl

import searchr1_async as sr
from benchmarks.shared.report import write_result

SHOWN = {"hotpotqa": (56, 60), "2wikimultihopqa": (56, 60)}
"""New tokens a turn and words of the passage, by suite. A question of HotpotQA, searched as it stands, takes up to 50 tokens
(with 28 most searches were cut), and its answers stand deeper in the passages."""
SHOWN_OTHERWISE = (28, 40)


def choose_questions(path: Path, count: int, seed: int) -> list[sr.Question]:
    """Questions with known gold passages and short answers, shuffled."""
    questions = [
        question
        for question in sr.load_questions(path)
        if question.metadata.get("gold_passages") and min(len(a.split()) for a in question.golden_answers) <= 4
    ]
    random.Random(seed).shuffle(questions)
    return questions[:count]


def write_corpus(folder: Path, questions: list[sr.Question], distractors: int, target: Path) -> int:
    """The gold passages of the questions and a sample of the others, as one Parquet file; returns their number."""
    corpus = pl.read_parquet(folder / "corpus.parquet").select("id", "title", "text")
    gold = {str(p) for question in questions for p in question.metadata.get("gold_passages") or ()}
    is_gold = pl.col("id").cast(pl.String).is_in(sorted(gold))
    others = corpus.filter(~is_gold)
    chosen = pl.concat([corpus.filter(is_gold), others.sample(min(distractors, others.height), seed=0)])
    chosen.write_parquet(target)
    return chosen.height


async def run_suite(suite: str, options: argparse.Namespace) -> tuple[sr.TrainingResult, int]:
    """Warm-up, reinforcement learning and the measurements around them, on one suite."""
    out = options.folder / suite
    out.mkdir(parents=True, exist_ok=True)
    questions = choose_questions(options.data / f"{suite}.jsonl", options.training + options.held_out, options.seed)
    held_out, training = questions[: options.held_out], questions[options.held_out :]
    corpus = out / "corpus.parquet"
    passages = write_corpus(options.data, questions, options.distractors, corpus)
    max_tokens, passage_words = SHOWN.get(suite, SHOWN_OTHERWISE)
    search = sr.Search.local(corpus, path=out / "index", n_results=1, max_passage_words=passage_words)
    run = sr.train(
        training,
        search,
        out / "run",
        sr.TrainConfig(
            warm_up=sr.WarmUp(steps=options.warm_up_steps),
            format="tags",
            group_size=8,
            groups_per_batch=8,
            steps=options.steps,
            time_limit=options.time_limit,
            learning_rate=1e-4,
            lora_rank=16,
            max_turns=3,
            max_tokens=max_tokens,
            max_trajectory_tokens=1024,
            seed=options.seed,
        ),
        resume=True,
        held_out=held_out,
    )
    return await run, passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suites", nargs="+", default=["popqa", "hotpotqa"])
    parser.add_argument("--folder", type=Path, default=Path("runs/suites"))
    parser.add_argument("--training", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument("--distractors", type=int, default=1000)
    parser.add_argument("--warm-up-steps", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--time-limit", type=float, default=240)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    table: list[dict[str, object]] = []
    body: list[str] = []
    for suite in options.suites:
        began = time.monotonic()
        result, passages = asyncio.run(run_suite(suite, options))
        minutes = (time.monotonic() - began) / 60
        for evaluation in result.evaluations:
            low, high = evaluation.exact_match_interval
            table.append(
                {
                    "suite": suite,
                    "stage": evaluation.label,
                    "questions": evaluation.questions,
                    "exact_match": evaluation.exact_match,
                    "low": low,
                    "high": high,
                    "answer_in_passage": evaluation.answer_in_passage,
                    "steps": result.steps,
                    "minutes": minutes,
                }
            )
        body.append(
            f"## {suite}: {passages} passages, {result.steps} steps, {minutes:.1f} minutes in all\n\n```\n"
            f"{sr.evaluation.comparison_table(result.evaluations)}\n```"
        )
    write_result("suites", "Short runs on other suites", body, pl.DataFrame(table))
