"""The model card of exported weights: what they are, what they learned from, what they scored, how to load them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import polars as pl

from searchr1_async.evaluation.result import Evaluation
from searchr1_async.learn.checkpoints import ResumePoint
from searchr1_async.run_folder import load_evaluations, training_questions
from searchr1_async.watch.records import RunRecords


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says of the weights themselves."""

    name: str
    """Of the exported folder."""
    base_model: str
    """Hub name of the base model, or the name of its folder."""
    format: str
    """``"peft"`` or ``"merged"``."""
    rank: int
    step: int | None
    """Optimiser steps done; None where nobody knows."""
    is_head_adapted: bool
    note: str = ""
    """On the base weights, where they are not those that the hub has under this name."""


def model_card(facts: CardFacts, run: Path | None) -> str:
    """The card as Markdown with the hub's YAML header. No path of this machine is in it.

    Args:
        run: the run's folder, for its data, settings and scores; None where the weights are of no run at hand.

    Raises:
        RunFolderError: a file of the run cannot be read.
    """
    lines = [*_header(facts), "", f"# {facts.name}", "", *_summary(facts), ""]
    if run is not None:
        point = ResumePoint.load(run)
        lines += ["## Data", "", *_data(run), "", "## Scores", "", *_scores(run, facts.step), ""]
        lines += ["## Settings", "", *_settings(point.settings if point is not None else {}), ""]
    lines += ["## Loading", "", *_loading(facts), ""]
    return "\n".join(lines)


def _header(facts: CardFacts) -> list[str]:
    return [
        "---",
        f"base_model: {facts.base_model}",
        f"library_name: {'peft' if facts.format == 'peft' else 'transformers'}",
        "pipeline_tag: text-generation",
        f"base_model_relation: {'adapter' if facts.format == 'peft' else 'finetune'}",
        "tags: [lora, reinforcement-learning, search]",
        "---",
    ]


def _summary(facts: CardFacts) -> list[str]:
    kind = "A LoRA adapter" if facts.format == "peft" else "Merged weights of a LoRA adapter"
    after = "" if facts.step is None else f" after {facts.step} optimiser steps of reinforcement learning"
    lines = [
        f"{kind} (rank {facts.rank}) for `{facts.base_model}`{after}: the model answers questions with a search tool. "
        f"Trained with searchr1_async, exported on {date.today().isoformat()}."
    ]
    return [*lines, "", facts.note] if facts.note else lines


def _data(run: Path) -> list[str]:
    questions = training_questions(run)
    if not questions:
        return ["The run has no questions on record."]
    counts = Counter(question.data_source or "unnamed" for question in questions)
    rows = [f"| {_cell(source)} | {count:,} |" for source, count in sorted(counts.items())]
    return [f"{len(questions):,} questions to train on:", "", "| Source | Questions |", "|---|---:|", *rows]


def _scores(run: Path, step: int | None) -> list[str]:
    found = load_evaluations(RunRecords(run))
    if not found:
        return ["The run measured nothing on held-out questions."]
    rows = [row for evaluation in found for row in _score_rows(evaluation, is_this=evaluation.step == step)]
    return [
        "Exact match on the run's held-out questions, with the 95 % interval over questions. **Bold**: the weights in this "
        "folder. The best of several measured steps was chosen on these questions, so its figure is too high.",
        "",
        "| Measurement | Step | Suite | Questions | Exact match | 95 % interval |",
        "|---|---:|---|---:|---:|---|",
        *rows,
    ]


def _score_rows(evaluation: Evaluation, *, is_this: bool) -> Iterator[str]:
    bold = "**" if is_this and evaluation.label != "untrained" else ""
    for suite in evaluation.suites:
        one = evaluation.estimate("exact_match", suite)
        questions = evaluation.by_question.filter(pl.col("suite") == suite).height
        step = "" if evaluation.step is None else str(evaluation.step)
        label, name = _cell(evaluation.label), _cell(suite or "unnamed")
        interval = f"{one.low:.3f} to {one.high:.3f}"
        yield f"| {label} | {step} | {name} | {questions} | {bold}{one.mean:.3f}{bold} | {interval} |"


def _settings(settings: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {_cell(_shown(value))} |" for name, value in _flat(settings) if name != "search"]
    return ["| Setting | Value |", "|---|---|", *rows] if rows else ["The run has no settings on record."]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    """As text; of a path only its last part, since the rest is of the machine that trained."""
    if not isinstance(value, str):
        return "default" if value is None else str(value)
    is_path = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith(("~", "."))
    return PureWindowsPath(value).name if is_path and "\n" not in value else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _loading(facts: CardFacts) -> list[str]:
    base, name = facts.base_model, facts.name
    if facts.format == "merged":
        return _code(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ) + _code("sh", f"vllm serve {name}", f"python -m sglang.launch_server --model-path {name}")
    lines = _code(
        "python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ) + _code(
        "sh",
        f"vllm serve {base} --enable-lora --max-lora-rank {facts.rank} --lora-modules search={name}",
        f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths search={name}",
    )
    if facts.is_head_adapted:
        lines += [
            "The adapter changes the output head. Where the base model ties its head to its embedding, do not merge it with PEFT's "
            '`merge_and_unload`, which changes the embedding too: export it again with `format="merged"`.',
        ]
    return lines


def _code(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```", ""]
