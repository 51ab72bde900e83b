"""What the warm-up and reinforcement learning bought a small model, beside the baselines, on five Wikipedia suites.

    pip install wordllama tinker-cookbook
    python -m benchmarks evaluation --data FOLDER --work runs/evaluation

FOLDER holds `nq.jsonl`, `triviaqa.jsonl`, `popqa.jsonl`, `hotpotqa.jsonl`, `2wikimultihopqa.jsonl` (`id`, `question`,
`golden_answers`, `split`, `answerable`) and `corpus.parquet` (`id`, `title`, `text`). One command trains and measures, and goes on
where it was. The questions asked are those that the corpus is known to answer; none of them was trained on.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from pathlib import Path

import searchr1_async as sr
from benchmarks.evaluation.questions import PLAYING, SUITES, TRAINED_ON, answerable
from benchmarks.shared.report import write_result
from benchmarks.shared.wordllama_embedder import WordLlamaEmbedder


def make_search(options: argparse.Namespace) -> sr.Search:
    """Over the whole corpus; the closest passage alone is shown, cut to what so small a model reads in reasonable time."""
    return sr.Search.local(
        options.data / "corpus.parquet",
        path=options.work / "index",
        embedder=WordLlamaEmbedder(),
        n_results=1,
        max_passage_words=40,
    )


async def train(options: argparse.Namespace) -> sr.TrainingResult:
    """The run that is measured: a warm-up of 10 steps, and 24 steps of reinforcement learning."""
    questions = [
        q for suite, split in TRAINED_ON.items() for q in answerable(options.data, suite, split, training=True)
    ]
    return await sr.train(
        questions,
        make_search(options),
        options.work / "run",
        sr.TrainConfig(
            warm_up=sr.WarmUp(steps=10),
            group_size=8,
            groups_per_batch=8,
            minibatches=4,
            steps=24,
            time_limit=3000,
            learning_rate=1e-4,
            lora_rank=16,
            seed=2,
            checkpoint_every=6,
            **PLAYING,
        ),
        resume=True,
        progress="plain",
    )


def warmed_up(result: sr.TrainingResult) -> sr.System:
    """The weights after the warm-up, which the run kept as its first."""
    assert result.checkpoint is not None
    path = result.checkpoint.rpartition("/")[0] + "/start"
    return sr.System(checkpoint=path, service_folder=result.out_dir / "service")


async def measure(options: argparse.Namespace, result: sr.TrainingResult) -> sr.Report:
    """Every system on every suite."""
    suites = {suite: answerable(options.data, suite, split, training=False) for suite, split in SUITES.items()}
    out = options.work / "report"
    return await sr.evaluate(
        suites,
        make_search(options),
        systems={
            "untrained": None,
            "warmed up": warmed_up(result),
            "after RL": result.out_dir,
            "direct": sr.System(method="direct"),
            "one retrieval (rag)": sr.System(method="rag"),
            # Its prompt of 900 tokens asks for thoughts first.
            "recipe's prompt": sr.System(
                method="recipe", format="hermes", limits=sr.config.EpisodeLimits(3, 120, 2048)
            ),
        },
        out_dir=out,
        resume=(out / "manifest.json").exists(),
        config=sr.EvalConfig(limit=options.limit, samples=options.samples, **PLAYING),
        progress="plain",
    )


def body_of(report: sr.Report, result: sr.TrainingResult) -> list[str]:
    """What is kept: what was learned, and the report as Markdown without the questions themselves."""
    run = (
        f"The run: SmolLM2-135M-Instruct, warm-up of 10 steps, {result.steps} steps of reinforcement learning in "
        f"{result.seconds / 60:.0f} minutes, on questions of NQ (dev), PopQA (the half that is not asked), 2WikiMultihopQA and "
        "HotpotQA (train). TriviaQA was never trained on. Search: all 54,909 passages, WordLlama vectors, the closest passage "
        "cut to 40 words: it holds a golden answer for about a third of the questions, an upper bound for one search."
    )
    gain = sr.evaluation.compare(report["warmed up"], report["after RL"])
    low, high = gain.interval
    learned = (
        f"What reinforcement learning added to the warm-up, over all questions: {100 * gain.mean:+.1f} points "
        f"[{100 * low:+.1f}, {100 * high:+.1f}], p = {gain.p_value:.2g} ({gain.method}), {gain.improved} better and "
        f"{gain.worsened} worse. " + ("" if gain.p_value < 0.05 else "That may be chance: nothing is claimed for it.")
    )
    sections = re.split(r"^(?=##+ )", report.markdown(), flags=re.MULTILINE)
    # Without the parts that quote questions.
    kept = (part for part in sections if not re.match(r"### (Episodes of |.* questions? changed)", part))
    return [run, learned, "".join(kept)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--limit", type=int, default=120, help="questions a suite")
    parser.add_argument("--samples", type=int, default=1)
    options = parser.parse_args()
    result = asyncio.run(train(options))
    report = asyncio.run(measure(options, result))
    print(report.save())
    write_result("evaluation", "A small model on five suites", body_of(report, result), report.frame())
