"""Every notebook from top to bottom in a real kernel, with the embedded service that it starts itself and a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks import execute
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.resume import ResumePoint
from tests.notebooks import small


def run(name: str, folder: Path, **changes: Any) -> NotebookNode:
    notebook = small.shrunk(name, folder, **changes)
    execute.execute(notebook, folder, cell_timeout=120, environment=small.environment(folder))
    return notebook


def outputs(notebook: NotebookNode, beginning: str) -> list[NotebookNode]:
    """Of the one cell that has a line which begins so."""
    (cell,) = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and any(line.startswith(beginning) for line in cell.source.splitlines())
    ]
    return cell.outputs


def text(notebook: NotebookNode, beginning: str) -> str:
    return "".join(
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in outputs(notebook, beginning)
    )


def has(notebook: NotebookNode, beginning: str, kind: str) -> bool:
    return any(kind in output.get("data", {}) for output in outputs(notebook, beginning))


def test_quickstart(tmp_path: Path) -> None:
    notebook = run("01_quickstart", tmp_path)
    nbformat.validate(notebook)
    point = ResumePoint.load(tmp_path / "runs" / "quickstart")
    assert point is not None
    assert (point.step, point.sampler_step) == (3, 3)
    assert text(notebook, "result = await run") == "('finished', 3)"
    table = text(notebook, "print(sr.evaluation.comparison_table")
    assert all(stage in table for stage in ("untrained", "after warm-up", "after RL"))
    assert "exact_match" in text(notebook, "run.metrics")
    assert has(notebook, "run.plot", "image/png")
    assert has(notebook, "run.episode", "text/html")
    # What a saved notebook shows where the live view was.
    assert has(notebook, "run = sr.train", "image/png")
    execute.clean(notebook)
    assert list(execute.problems(notebook)) == []


def check_tinker(notebook: NotebookNode, folder: Path) -> None:
    assert "the stand-in" in text(notebook, "in_the_cloud")
    assert " ".join(text(notebook, "result = await run").split()).startswith("('finished', 2, 'tinker://")
    assert has(notebook, 'run.plot("reward")', "image/png")
    assert has(notebook, 'run.plot("timeline")', "image/png")
    staleness = RunRecords(folder / "runs" / "tinker").groups().collect()
    assert staleness.height >= 12
    assert "staleness" in text(notebook, "run.groups()")


def check_evaluate(notebook: NotebookNode, folder: Path) -> None:
    table = text(notebook, "report = await sr.evaluate")
    assert "12 questions" in table
    assert all(label in table for label in ("untrained", "trained", "direct", "rag"))
    assert "2 samples per question" in text(notebook, "print(*report.notes()")
    assert has(notebook, "report.plot()", "image/png")
    assert has(notebook, "report.plot_outcomes()", "image/png")
    assert "untrained" in text(notebook, "differences = report.comparisons")
    assert has(notebook, "changed = ", "text/html")
    assert "Windhoek" in text(notebook, "own_file")
    assert "report.html" in text(notebook, "report.save()")
    assert "trained" in text(notebook, "again = await sr.evaluate")


def check_corpus(notebook: NotebookNode, folder: Path) -> None:
    assert text(notebook, "questions = sr.load_questions(file") == "(75, 12)"
    assert has(notebook, "groups[0]", "text/html")
    metrics = RunRecords(folder / "runs" / "museum" / "run").metrics()
    assert metrics.height == 2
    assert "env/all/searches" in metrics.columns
    assert "after RL" in text(notebook, "print(sr.evaluation.comparison_table")
    assert has(notebook, 'run.plot("suites")', "image/png")


def check_reading(notebook: NotebookNode, folder: Path) -> None:
    assert has(notebook, "run.view()", "text/html")
    assert "stop_reason" in text(notebook, "episodes = run.episodes()")
    assert has(notebook, 'run.plot("reward_by_turns")', "image/png")
    assert has(notebook, 'run.plot("timeline"', "image/png")
    assert "drop_reason" in text(notebook, "    run.groups()")
    assert RunRecords(folder / "runs" / "quickstart").episodes().collect().height >= 2 * 6 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("02_train_on_tinker", check_tinker),
        ("03_evaluate", check_evaluate),
        ("04_your_own_corpus", check_corpus),
        ("05_read_the_episodes", check_reading),
    ],
)
def test_the_others(name: str, check: Callable[[NotebookNode, Path], None], tmp_path: Path) -> None:
    notebook = run(name, tmp_path)
    nbformat.validate(notebook)
    check(notebook, tmp_path)
    execute.clean(notebook)
    assert list(execute.problems(notebook)) == []
