"""The model card of exported weights: training data, settings, scores and loading instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import polars as pl

from searchr1_async.episodes.formats import make_dialect
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.episodes.types import Passage, Question
from searchr1_async.errors import ModelError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.checkpoints import ResumePoint
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.runs.folder import load_evaluations, training_questions
from searchr1_async.runs.weights import kept_record

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for ``--max-lora-rank`` (``vllm/config/lora.py``)."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    name: str
    base_model: str
    """Hub name of the base model, or the name of its folder."""
    format: str
    """``"peft"`` or ``"merged"``."""
    rank: int
    step: int | None
    """Optimiser step of the weights; None if unknown."""
    is_head_adapted: bool
    note: str = ""
    """Remark if the base weights differ from the hub's under this name."""


def model_card(facts: CardFacts, run: Path | None, tokenizer: Any) -> str:
    """The card as Markdown with the hub's YAML header. Contains no path or address of this machine.

    ``run`` is the run's folder, for data, settings and scores. Raises RunFolderError if one of its files cannot be read.
    """
    point = None if run is None else ResumePoint.load(run)
    settings: Mapping[str, Any] = {} if point is None else point.settings
    lines = [*_header(facts), "", f"# {facts.name}", "", *_summary(facts, settings), ""]
    lines += ["## Loading", "", *_loading(facts), ""]
    if run is not None and point is not None:
        lines += ["## Prompt", "", *_prompt(point, tokenizer), "", "## Data", "", *_data(run), "", *_search(run), ""]
        lines += ["## Scores", "", *_scores(run, facts.step), "", "## Settings", "", *_settings(point), ""]
    return "\n".join(lines).rstrip() + "\n"


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


def _summary(facts: CardFacts, settings: Mapping[str, Any]) -> list[str]:
    made = f"A LoRA adapter (rank {facts.rank}) for `{facts.base_model}`"
    if facts.format == "merged":
        made = f"`{facts.base_model}` with a LoRA adapter (rank {facts.rank}) merged into it"
    warm_up = settings.get("warm_up")
    stages = [f"a supervised warm-up of {warm_up['steps']} steps on demonstrations"] if warm_up else []
    if facts.step is not None:
        stages.append(f"{facts.step} optimiser steps of reinforcement learning")
    lines = [
        f"{made}, trained to answer questions with a search tool{': ' if stages else ''}{', then '.join(stages)}. "
        f"Trained with searchr1_async, exported on {date.today().isoformat()}."
    ]
    return [*lines, "", facts.note] if facts.note else lines


def _prompt(point: ResumePoint, tokenizer: Any) -> list[str]:
    """An example episode with placeholders, in the run's chat and tool-call format."""
    settings = point.settings
    try:
        dialect = make_dialect(
            settings.get("format") or "hermes",
            point.base_model,
            tokenizer,
            renderer_name=settings.get("renderer"),
            thinking=settings.get("thinking", AS_TEMPLATE),
            instructions=settings.get("instructions"),
        )
        prompt, call = dialect.start(Question("", "QUESTION")), dialect.write_call(["QUERY"])
        found = dialect.extend(prompt, call, ["QUERY"], [[Passage("", "TITLE", "PASSAGE")]]) or []
        text = dialect.decode([*prompt, *call, *found, *dialect.write_answer("ANSWER")])
    except ModelError as error:  # does not prevent the export
        return [f"The prompt is not available: {error}"]
    written = "An episode with one search. The model generates the search and the answer; the rest is its input."
    return [written, "", "````text", text, "````"]


def _data(run: Path) -> list[str]:
    questions = training_questions(run)
    if not questions:
        return ["The run has no recorded questions."]
    counts = Counter(question.data_source or "unnamed" for question in questions)
    rows = [f"| {_cell(source)} | {count:,} |" for source, count in sorted(counts.items())]
    return [
        f"Reinforcement learning used {len(questions):,} questions:",
        "",
        "| Source | Questions |",
        "|---|---:|",
        *rows,
    ]


def _search(run: Path) -> list[str]:
    """The search settings. Indexes not built from a corpus stay unnamed: their name may be an address."""
    record = kept_record(run)
    if record is None:
        return []
    count, words = record["n_results"], record["max_passage_words"]
    shown = "the closest passage" if count == 1 else f"the {count} closest passages"
    cut = "" if words is None else f", {'' if count == 1 else 'each '}cut at {words} words"
    where = ""
    if record["passages"] is not None:
        where = f" of the {record['passages']:,} in `{_shown(record['source'])}`, embedded by `{_shown(record['embedder'])}`"
    return [f"A query returns {shown}{where}{cut}."]


def _scores(run: Path, step: int | None) -> list[str]:
    found = load_evaluations(RunRecords(run))
    if not found:
        return ["The run was not evaluated on held-out questions."]
    rows = [row for evaluation in found for row in _score_rows(evaluation, is_this=evaluation.step == step)]
    return [
        "Exact match on the run's held-out questions, with the 95 % interval over questions. **Bold**: the weights in this "
        "folder. If the best step was selected on these questions, its score is biased upwards.",
        "",
        "| Evaluation | Step | Suite | Questions | Exact match | 95 % interval |",
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


def _settings(point: ResumePoint) -> list[str]:
    settings = dict(_flat(point.settings))
    settings.pop("search", None)  # a fingerprint
    if point.loss is not None:  # the loss the run chose by default
        settings["learning.loss"] = point.loss
    rows = [f"| {name} | {_cell(_shown(value))} |" for name, value in settings.items()]
    return ["| Setting | Value |", "|---|---|", *rows] if rows else ["The run has no recorded settings."]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    """As text; a path is reduced to its last part, to hide the training machine's folders."""
    if not isinstance(value, str):
        return "default" if value in (None, {}) else str(value)
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
    max_rank = next((rank for rank in _VLLM_RANKS if rank >= facts.rank), facts.rank)
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
        f"vllm serve {base} --enable-lora --max-lora-rank {max_rank} --lora-modules search={name}",
        f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths search={name}",
    )
    if facts.is_head_adapted:
        lines += [
            "The adapter changes the output head. If the base model ties its head to its embedding, do not merge it with PEFT's "
            '`merge_and_unload`, which also changes the embedding: export with `format="merged"` instead. Do the same for servers '
            "that do not support adapters on the head.",
        ]
    return lines


def _code(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```", ""]
