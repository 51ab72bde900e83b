"""A long real run on questions of Wikipedia: does reinforcement learning help on real text, too?

    python -m benchmarks suites --data FOLDER --suites 2wikimultihopqa hotpotqa popqa

FOLDER holds `<suite>.jsonl` (`question`, `golden_answers`, `data_source`, `id`, `gold_passages`, `type`) and `corpus.parquet`
(`id`, `title`, `text`). Used are the questions with one or two known gold passages and a short answer that must be read in them: not yes
or no, and nothing that stands in the question, such as one of two names, where a guess is often right. The corpus is cut to the gold passages and as many
others as asked for, so that it can be embedded in minutes. One run trains on all suites together; questions held out of each are
measured before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import polars as pl

import searchr1_async as sr
from benchmarks.shared.report import write_result
from searchr1_async.evaluation import Evaluation, comparison_table
from searchr1_async.records.run_records import RunRecords

MAX_TOKENS = 48
"""New tokens a turn. A question of HotpotQA, searched as it stands, takes up to 50; with 28 most searches were cut."""
PASSAGE_WORDS = 56
"""Words shown of a passage; the answers stand deeper in these passages than in the Factbook's."""


WHOLE = "all"
"""The suite and kind of rows that are of all."""


def choose_questions(path: Path, titles: dict[str, str]) -> list[sr.Question]:
    """The suite's usable questions, with the searches of their demonstrations."""
    chosen = []
    for question in sr.load_questions(path):
        gold = [titles.get(str(one)) for one in question.metadata.get("gold_passages") or ()]
        if len(gold) in (1, 2) and None not in gold and has_to_be_read(question):
            searches = plan_searches(question.question, [str(title) for title in gold])
            chosen.append(replace(question, metadata={**question.metadata, "search_queries": searches}))
    return chosen


def has_to_be_read(question: sr.Question) -> bool:
    """Whether the answer is short, and neither yes or no nor in the question."""
    answers = [answer.lower() for answer in question.golden_answers]
    guessed = any(answer in {"yes", "no"} or answer in question.question.lower() for answer in answers)
    return not guessed and min(len(answer.split()) for answer in answers) <= 4


def plan_searches(question: str, titles: list[str]) -> list[str]:
    """A search for the passage that the question names best (or, if it names none, for the question), then for the other."""
    asked = _words(question)
    first, *others = sorted(titles, key=lambda title: -len(_words(title) & asked) / len(_words(title) or {""}))
    return [first if _words(first) and _words(first) <= asked else question, *others]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def write_corpus(corpus: pl.DataFrame, questions: list[sr.Question], distractors: int, target: Path) -> int:
    """The gold passages of the questions and a sample of the others, as one Parquet file; returns their number."""
    gold = {str(one) for question in questions for one in question.metadata["gold_passages"]}
    is_gold = pl.col("id").is_in(sorted(gold))
    others = corpus.filter(~is_gold)
    chosen = pl.concat([corpus.filter(is_gold), others.sample(min(distractors, others.height), seed=0)])
    chosen.write_parquet(target)
    return chosen.height


Kinds = dict[tuple[str, str], str]
"""The kind of a question by suite and id."""


async def run_suites(options: argparse.Namespace) -> tuple[sr.TrainingResult, Kinds, int]:
    """Warm-up, reinforcement learning and the measurements around them; with the questions' kinds, and the number of passages.

    Raises:
        ValueError: a suite has no question left to train on.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    corpus = pl.read_parquet(options.data / "corpus.parquet").select(pl.col("id").cast(pl.String), "title", "text")
    titles = dict(corpus.select("id", "title").iter_rows())
    held_out: list[sr.Question] = []
    training: list[sr.Question] = []
    for suite in options.suites:
        questions = choose_questions(options.data / f"{suite}.jsonl", titles)
        random.Random(options.seed).shuffle(questions)
        if not questions[options.held_out : options.most]:
            raise ValueError(f"{suite} has {len(questions)} usable questions: hold out fewer than {options.held_out}")
        held_out += questions[: options.held_out]
        training += questions[options.held_out : options.most]
    questions = held_out + training
    print(f"{len(training)} questions to train on, {len(held_out)} held out", flush=True)
    file = options.folder / "corpus.parquet"
    passages = write_corpus(corpus, questions, options.distractors, file)
    search = sr.Search.local(file, path=options.folder / "index", n_results=1, max_passage_words=PASSAGE_WORDS)
    config = sr.TrainConfig(
        warm_up=sr.WarmUp(steps=options.warm_up_steps),
        format="tags",
        group_size=16,
        groups_per_batch=8,
        steps=options.steps,
        time_limit=options.time_limit,
        learning_rate=options.learning_rate,
        lora_rank=16,
        max_turns=3,
        max_tokens=MAX_TOKENS,
        max_trajectory_tokens=1024,
        seed=options.seed,
    )
    run = sr.train(training, search, options.folder / "run", config, resume=True, held_out=held_out)
    return await run, {(one.data_source, one.id): one.metadata.get("type") or WHOLE for one in questions}, passages


def by_part(evaluations: tuple[Evaluation, ...], kinds: Kinds) -> pl.DataFrame:
    """One row an evaluation, suite and kind of question, and one for each whole suite and for all; shares from 0 to 1.

    `gold`: the share of the gold passages shown; `read`: exact match where all were shown, on `read_of` questions.
    """
    rows = []
    for evaluation in evaluations:
        kind = [kinds[key] for key in evaluation.scores.select("suite", "question_id").iter_rows()]
        asked = evaluation.scores.with_columns(kind=pl.Series(kind, dtype=pl.String))
        parts = {(WHOLE, WHOLE): asked}
        parts |= {(str(suite), WHOLE): own for (suite,), own in asked.group_by("suite")}
        parts |= {(str(suite), str(kind)): own for (suite, kind), own in asked.group_by("suite", "kind")}
        for (suite, kind), whole in sorted(parts.items(), key=lambda part: part[0]):
            own = whole.filter(~pl.col("failed"))
            shown = own.filter(pl.col("gold_recall") == 1)
            rows.append(
                {
                    "stage": evaluation.label,
                    "suite": suite,
                    "kind": kind,
                    "questions": whole.height,
                    "failed": whole.height - own.height,
                    "exact_match": own["exact_match"].mean(),
                    "answer_seen": own["answer_in_passage"].mean(),
                    "gold": own["gold_recall"].mean(),
                    "read": shown["exact_match"].mean(),
                    "read_of": shown.height,
                    "searches": own["searches"].mean(),
                }
            )
    return pl.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suites", nargs="+", default=["2wikimultihopqa", "hotpotqa", "popqa"])
    parser.add_argument("--folder", type=Path, default=Path("runs/suites"))
    parser.add_argument("--held-out", type=int, default=100, help="questions of each suite")
    parser.add_argument("--most", type=int, default=500, help="questions of a suite, those held out among them")
    parser.add_argument("--distractors", type=int, default=1000)
    parser.add_argument("--warm-up-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--time-limit", type=float, default=3600)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    began = time.monotonic()
    result, kinds, passages = asyncio.run(run_suites(options))
    minutes = (time.monotonic() - began) / 60
    table = by_part(result.evaluations, kinds)
    metrics = RunRecords(result.out_dir).metrics()
    training = metrics["env/all/correct"].drop_nulls().to_list() if result.steps else []
    tenths = [training[len(training) * n // 10 : len(training) * (n + 1) // 10] for n in range(10)]
    curve = ", ".join(f"{sum(part) / len(part):.3f}" for part in tenths if part)
    body = [
        f"{passages} passages, {result.steps} steps, {minutes:.0f} minutes in this session.\n\n```\n{comparison_table(result.evaluations)}\n```",
        f"Exact match of the training episodes, by tenths of the steps: {curve}",
        "## By kind of question\n\n" + markdown(table),
    ]
    write_result("suites", "A long run on questions of Wikipedia", body, table)


def markdown(table: pl.DataFrame) -> str:
    """The table with shares in percent."""
    shares = pl.col("exact_match", "answer_seen", "gold", "read")
    shown = table.with_columns((shares * 100).round(1), pl.col("searches").round(2))
    lines = [shown.columns, ["---"] * shown.width, *(map(str, row) for row in shown.iter_rows())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
