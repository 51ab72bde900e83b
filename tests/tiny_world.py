"""A small world for whole runs: made-up facts, questions on them, and a model to learn them.

The model has about 0.1 million weights and 92 words. It learns to copy two words of the question into a search,
and one word of the passage into its answer: all that a search-using model does, in a minute on one core.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import searchr1_async as sr
from searchr1_async.config import Config
from searchr1_async.config.base import places_of
from searchr1_async.testing import HashingEmbedder, make_tiny_model

PLACES = tuple("".join(syllables) for syllables in itertools.product(("ba", "ko", "mi", "tu"), ("rin", "dor", "sel")))
THINGS = tuple(
    "".join(syllables) for syllables in itertools.product(("fa", "ge", "lo", "ni", "pu", "za"), ("lux", "mek"))
)
RELATIONS = ("capital", "river", "mountain", "language")
SearchKind = TypeVar("SearchKind", bound=sr.Search)

INSTRUCTIONS = "search then answer"
FOREIGN_TAGS = ("tool", "give")


def make_facts() -> dict[tuple[str, str], str]:
    chance = random.Random("facts")
    return {(relation, place): chance.choice(THINGS) for relation in RELATIONS for place in PLACES}


def make_questions() -> tuple[list[sr.Question], list[sr.Question]]:
    """Questions to train on and held-out ones: 36 and 12, of different facts."""
    questions = [
        sr.Question(
            id=f"{relation}-{place}",
            question=f"{relation} of {place}?",
            golden_answers=(thing,),
            data_source="world",
            metadata={"search_queries": (f"{relation} {place}",)},
        )
        for (relation, place), thing in make_facts().items()
    ]
    random.Random("questions").shuffle(questions)
    return questions[:36], questions[36:]


def make_search(folder: Path, *, search_class: type[SearchKind] = sr.Search, **options: Any) -> SearchKind:
    """A real embedded Chroma over the facts; the nearest passage alone is shown."""
    passages = [
        sr.Passage(f"{relation}-{place}", "", f"{relation} {place} {thing}")
        for (relation, place), thing in make_facts().items()
    ]
    settings: dict[str, Any] = {"embedder": HashingEmbedder(), "n_results": 1} | options
    return cast(SearchKind, search_class.local(passages, path=folder, **settings))


@functools.cache
def model_folder() -> Path:
    """The model's folder, made once a process and deleted at its end."""
    scratch = tempfile.TemporaryDirectory(prefix="tiny-world-")
    atexit.register(scratch.cleanup)
    folder = Path(scratch.name)
    words = [*INSTRUCTIONS.split(), *FOREIGN_TAGS, *RELATIONS, *PLACES, *THINGS]
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_key_value_heads": 4}
    make_tiny_model(folder, words=words, byte_level=False, context=256, **sizes)
    _pretrain(folder)
    return folder


def _pretrain(folder: Path, steps: int = 80, batch: int = 16) -> None:
    """Teaches the random model to copy, on random facts and with other tags: what a base model brings along."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    call, reply = FOREIGN_TAGS
    words = (RELATIONS, PLACES, THINGS)
    relation, place, thing = (kind[0] for kind in words)
    parts = (
        f"<|im_start|>system\n{INSTRUCTIONS}<|im_end|>\n<|im_start|>user\n{relation} of {place}?<|im_end|>\n"
        "<|im_start|>assistant\n",
        f"<{call}>{relation} {place}</{call}>",
        f"\n<information>{relation} {place} {thing}</information>\n",
        f"<{reply}>{thing}</{reply}>",
    )
    encoded = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
    template_T = torch.tensor([token for tokens in encoded for token in tokens])
    first_ids = tokenizer.convert_tokens_to_ids([kind[0] for kind in words])
    # What is copied counts 20 times what is only the form; what is merely read counts nothing.
    weights_T = torch.tensor(
        [
            float(part % 2) * (1.0 if token in first_ids else 0.05)
            for part, tokens in enumerate(encoded)
            for token in tokens
        ]
    )[1:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        for _ in range(steps):
            tokens_BT = template_T.repeat(batch, 1)
            for kind in words:
                ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(kind)))
                drawn_B1 = ids[torch.randint(len(ids), (batch, 1))]
                tokens_BT = torch.where(template_T == ids[0], drawn_B1, tokens_BT)
            logits_BTV = model(input_ids=tokens_BT).logits[:, :-1]
            losses_BT = torch.nn.functional.cross_entropy(
                logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none"
            )
            loss = (losses_BT * weights_T).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)


PLAYING: dict[str, Any] = {
    "format": "tags",
    "instructions": INSTRUCTIONS,
    "max_tokens": 12,
    "max_turns": 2,
    "max_trajectory_tokens": 128,
    "local": sr.config.LocalOptions(threads=1, dtype="float32", device="cpu"),
    "progress": False,
}
"""How episodes of this world are played."""

SETTINGS: dict[str, Any] = PLAYING | {
    "lora_rank": 32,
    "group_size": 8,
    "groups_per_batch": 12,
    "minibatches": 4,
    "learning_rate": 1e-3,
}
"""What every run of this world is given, unless a test says otherwise."""

WARM_UP = sr.WarmUp(steps=20, batch_size=16, learning_rate=4e-3)
"""Leaves the model right in about 4 of 10 samples."""


def given(kind: type[Config], *settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The keywords of a call: those of its settings as ``config``, the others as they are."""
    values = {name: value for mapping in (*settings, more) for name, value in mapping.items()}
    names = {*places_of(kind), *(each.name for each in fields(kind))}
    config = kind(**{name: value for name, value in values.items() if name in names})
    return {"config": config} | {name: value for name, value in values.items() if name not in names}


def served() -> dict[str, Any]:
    """The way to :func:`shared_service`; ``TINKER_API_KEY`` must be set to its key besides."""
    model = str(model_folder())
    return {"service": shared_service().url, "model": model, "tokenizer": model}


def served_settings(**changes: Any) -> dict[str, Any]:
    """Settings of a small quick run on :func:`shared_service`."""
    return SETTINGS | served() | {"group_size": 4, "groups_per_batch": 6, "minibatches": 2} | changes


@dataclass(frozen=True)
class StandaloneService:
    url: str
    api_key: str


@functools.cache
def shared_service() -> StandaloneService:
    """One service for all tests of a process that need no service of their own; it ends with the process."""
    scratch = tempfile.TemporaryDirectory(prefix="tiny-service-")
    api_key = "tml-tiny-world"
    command = [sys.executable, "-m", "searchr1_async.local", "--model", str(model_folder()), "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32", "--device", "cpu", "--folder", scratch.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment() | {"TINKER_API_KEY": api_key},
        start_new_session=True,
    )

    def end() -> None:
        process.terminate()
        process.communicate(timeout=20)
        scratch.cleanup()

    atexit.register(end)
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    assert " at http://" in line, line
    return StandaloneService(line.rpartition(" at ")[2].strip(), api_key)


def child_environment() -> dict[str, str]:
    """For processes that tests start: they find the package and the tests, and keep to one thread."""
    root = str(Path(__file__).parents[1])
    return dict(os.environ) | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def service_processes(parent: int | None = None) -> list[int]:
    """The ids of running embedded services that ``parent`` (by default this process) has started."""
    listing = subprocess.run(
        ["ps", "-ewwo", "pid=", "-o", "ppid=", "-o", "args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    wanted = str(os.getpid() if parent is None else parent)
    return [
        int(row[0])
        for row in rows
        if len(row) == 3 and row[1] == wanted and "-m searchr1_async.local --child" in row[2]
    ]


def tasks_left() -> set[asyncio.Task[Any]]:
    """Tasks of this event loop, but for the one that asks and the test runner's own."""
    tasks = {task for task in asyncio.all_tasks() if "TestRunner" not in task.get_coro().__qualname__}
    return tasks - {asyncio.current_task()}


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(found.strip()) and not found.strip().startswith("Z")
