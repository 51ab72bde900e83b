"""What is kept of an executed notebook, and what is found in one that must not be kept."""

from __future__ import annotations

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from notebooks import execute

VIEW = "application/vnd.jupyter.widget-view+json"


def notebook_of(*outputs: NotebookNode, source: str = "1", tags: tuple[str, ...] = ()) -> NotebookNode:
    cell = new_code_cell(source, outputs=list(outputs), execution_count=1, metadata={"tags": list(tags)})
    return new_notebook(cells=[new_markdown_cell("# A title"), cell])


def data_of(notebook: NotebookNode) -> list[dict[str, str]]:
    return [dict(output.data) for output in notebook.cells[1].outputs]


def test_a_widget_leaves_its_picture_or_nothing() -> None:
    view = {VIEW: {"model_id": "a"}, "text/plain": "Live()"}
    notebook = notebook_of(
        new_output("display_data", view),
        new_output("display_data", view | {"image/png": "aGk="}),
        new_output("execute_result", {"text/plain": "1"}, execution_count=1),
    )
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    assert {"its metadata hold the state of widgets"} <= set(execute.problems(notebook))
    execute.clean(notebook)
    assert data_of(notebook) == [{"image/png": "aGk="}, {"text/plain": "1"}]
    assert list(execute.problems(notebook)) == []
    nbformat.validate(notebook)


def test_a_viewers_page_leaves_its_text() -> None:
    page = {"text/html": "<iframe srcdoc='page'></iframe>", "text/plain": "500 episodes"}
    notebook = notebook_of(new_output("display_data", page), new_output("display_data", {"text/html": "<b>small</b>"}))
    execute.clean(notebook)
    assert data_of(notebook) == [{"text/plain": "500 episodes"}, {"text/html": "<b>small</b>"}]


def test_metadata_are_the_same_from_every_machine() -> None:
    notebook = notebook_of(tags=("parameters",))
    notebook.metadata["language_info"] = {"name": "python", "version": "3.13.1"}
    notebook.cells[1].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    execute.clean(notebook)
    assert "version" not in notebook.metadata.language_info
    assert notebook.cells[1].metadata == {"tags": ["parameters"]}


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (new_output("error", ename="ValueError", evalue="no", traceback=[]), "raised ValueError"),
        (new_output("stream", name="stdout", text="kept in /home/ada/runs"), "path of a machine"),
        (new_output("display_data", {"text/html": "<a href='/tmp/x'>"}), "path of a machine"),
        (new_output("display_data", {"application/vnd.vegalite.v5+json": {"name": "/Users/ada/x"}}), "path of a machine"),
        (new_output("stream", name="stderr", text="x.py:3: UserWarning: old"), "a warning"),
        (new_output("display_data", {VIEW: {"model_id": "a"}}), "a widget"),
        (new_output("stream", name="stdout", text="x" * execute.MAX_BYTES), "bytes"),
    ],
)  # fmt: skip
def test_what_must_not_be_kept_is_named(output: NotebookNode, found: str) -> None:
    (problem,) = execute.problems(notebook_of(output))
    assert found in problem


@pytest.mark.parametrize(
    "text",
    ["runs/tmp/x", "https://example.org/home/ada", "3 /work", "either/or", "env/all/reward", "~/work/x", "</tmp>"],
)
def test_what_is_no_path_of_a_machine_is_kept(text: str) -> None:
    assert list(execute.problems(notebook_of(new_output("stream", name="stdout", text=text)))) == []


def test_a_cell_that_was_not_run_is_named() -> None:
    notebook = notebook_of()
    notebook.cells[1].execution_count = None
    assert list(execute.problems(notebook)) == ["cell 1 was not run"]


def test_parameters_go_behind_the_cell_that_is_tagged_so() -> None:
    notebook = notebook_of(source="steps = 4", tags=("parameters",))
    changed = execute.with_parameters(notebook, "steps = 1")
    assert [cell.source for cell in changed.cells] == ["# A title", "steps = 4", "steps = 1"]
    assert len(notebook.cells) == 2
    with pytest.raises(ValueError, match="0 cells"):
        execute.with_parameters(notebook_of(), "steps = 1")


def test_notebooks_are_chosen_by_how_their_names_begin() -> None:
    assert [path.stem for path in execute.paths(["03", "01"])] == ["01_quickstart", "03_evaluate"]
    with pytest.raises(ValueError, match="'09'"):
        execute.paths(["09"])
