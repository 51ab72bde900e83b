"""What makes a notebook small enough for a test: the tiny world as files, and the parameters that point to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from notebooks import execute
from tests import tiny_world

_PLAYING: dict[str, Any] = {
    "format": "tags",
    "instructions": tiny_world.INSTRUCTIONS,
    "max_tokens": 12,
    "max_turns": 2,
    "max_trajectory_tokens": 128,
}
_PLAYING_BY_NOTEBOOK: dict[str, dict[str, Any]] = {
    "03_evaluate": {"max_trajectory_tokens": 256},  # its baselines show worked examples
    "04_your_own_corpus": {"max_tokens": 48, "max_trajectory_tokens": 768},
}
_WARM_UP = asdict(tiny_world.WARM_UP)
_SIZES: dict[str, Any] = {
    "warm_up": _WARM_UP,
    "steps": 2,
    "group_size": 4,
    "groups_per_batch": 6,
    "learning_rate": 1e-3,
    "held_out_questions": 12,
}
_BY_NOTEBOOK: dict[str, dict[str, Any]] = {
    "01_quickstart": _SIZES | {"steps": 3, "warm_up": _WARM_UP | {"steps": 4}, "held_out_questions": 6},
    "02_train_on_tinker": {
        "stand_in": {
            "group_size": 4,
            "groups_per_batch": 6,
            "minibatches": 2,
            "steps": 2,
            "learning_rate": 1e-3,
            "lora_rank": 16,
            "warm_up": _WARM_UP,
        }
    },
    "03_evaluate": _SIZES | {"samples": 2},
    "04_your_own_corpus": _SIZES | {"paintings": 30, "warm_up": _WARM_UP | {"steps": 2}},
    "05_read_the_episodes": _SIZES,
}
NAMES = tuple(_BY_NOTEBOOK)


def committed(name: str) -> NotebookNode:
    """The notebook as it is in the repository, with its outputs."""
    return nbformat.read(execute.FOLDER / f"{name}.ipynb", as_version=4)


def shrunk(name: str, folder: Path, **changes: Any) -> NotebookNode:
    """The notebook without outputs and with the tiny world's parameters, for a kernel with :func:`environment`.

    Args:
        name: of the notebook, without its ending.
        folder: where the world's files are written.
        changes: of the parameters.
    """
    _write_world(folder)
    values: dict[str, Any] = {
        "suite": str(folder / "questions.jsonl"),
        "corpus": str(folder / "corpus.jsonl"),
        **_BY_NOTEBOOK[name],
        **changes,
    }
    # By a name within the notebook's folder: the view says it, and no saved output may hold a path of a machine.
    model = "tiny-model"
    if not (link := folder / model).exists():
        link.symlink_to(_any_text_model(folder) if name == "04_your_own_corpus" else tiny_world.model_folder())
    if name == "02_train_on_tinker":
        values["stand_in"] = {**values["stand_in"], "model": model}
    else:
        values["model"] = model
    playing_values = _PLAYING | _PLAYING_BY_NOTEBOOK.get(name, {})
    playing = "stand_in_playing" if name == "02_train_on_tinker" else "playing"
    lines = [
        "from searchr1_async.config import LocalOptions",
        "from searchr1_async.testing import HashingEmbedder",
        "embedder = HashingEmbedder()",
        f'{playing} = {playing_values!r} | {{"local": LocalOptions(threads=1, dtype="float32", device="cpu")}}',
        *(f"{key} = {value!r}" for key, value in values.items()),
    ]
    notebook = execute.with_parameters(committed(name), "\n".join(lines))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def environment(folder: Path) -> dict[str, str]:
    """Of a kernel: it finds the package and the tests, keeps its caches in ``folder`` and has no keys."""
    keys = ("TINKER_API_KEY", "TINKER_BASE_URL", "GEMINI_API_KEY", "GOOGLE_API_KEY")
    kept = {name: value for name, value in tiny_world.child_environment().items() if name not in keys}
    return kept | {"XDG_CACHE_HOME": str(folder / "cache"), "IPYTHONDIR": str(folder / "ipython")}


def _any_text_model(folder: Path) -> Path:
    """A model that knows every letter and has learned nothing, for a corpus that is not of the tiny world."""
    from searchr1_async.testing import make_tiny_model  # torch

    return make_tiny_model(folder / "any-text", context=1024)


def _write_world(folder: Path) -> None:
    facts = [
        {"id": f"{relation}-{place}", "title": "", "text": f"{relation} {place} {thing}"}
        for (relation, place), thing in tiny_world.make_facts().items()
    ]
    training, held_out = tiny_world.make_questions()
    questions = [
        {
            "id": question.id,
            "question": question.question,
            "golden_answers": list(question.golden_answers),
            "data_source": question.data_source,
            "search_queries": list(question.metadata["search_queries"]),
            "split": split,
        }
        for split, members in (("train", training), ("held_out", held_out))
        for question in members
    ]
    _write_jsonl(folder / "corpus.jsonl", facts)
    _write_jsonl(folder / "questions.jsonl", questions)


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
