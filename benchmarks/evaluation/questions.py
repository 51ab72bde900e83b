"""What the small model is trained on and asked, and how its episodes go."""

from __future__ import annotations

import hashlib
from pathlib import Path

import searchr1_async as sr

SUITES = {"nq": "test", "triviaqa": "test", "popqa": "test", "hotpotqa": "dev", "2wikimultihopqa": "dev"}
TRAINED_ON = {"nq": "dev", "popqa": "test", "2wikimultihopqa": "train", "hotpotqa": "train"}
PLAYING = {"format": "tags", "max_turns": 3, "max_tokens": 40, "max_trajectory_tokens": 1024}


def is_for_training(question: sr.Question) -> bool:
    """PopQA has one split only: half of it, by its ids' hashes, is trained on."""
    return question.data_source == "popqa" and hashlib.sha256(question.id.encode()).digest()[0] < 128


def answerable(folder: Path, suite: str, split: str, *, training: bool) -> list[sr.Question]:
    """The questions of a split that the corpus answers."""
    return [
        question
        for question in sr.load_questions(folder / f"{suite}.jsonl", split=split)
        if question.metadata["answerable"] and (suite != "popqa" or is_for_training(question) is training)
    ]
