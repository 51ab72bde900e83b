"""The notebooks as they are in the repository: valid, with their outputs, and with nothing in them of the machine that ran them."""

from __future__ import annotations

from dataclasses import asdict

import nbformat
import pytest

import searchr1_async as sr
from notebooks import execute
from searchr1_async.config import RECIPE
from searchr1_async.config.concerns import DEFAULT_RANK
from searchr1_async.models import find_model
from tests.notebooks import small


def test_there_are_no_others() -> None:
    assert tuple(path.stem for path in execute.paths([])) == small.NAMES


@pytest.mark.parametrize("name", small.NAMES)
def test_a_notebook_is_valid_and_shows_what_it_came_to(name: str) -> None:
    notebook = small.committed(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert list(execute.problems(notebook)) == []
    assert any("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


@pytest.mark.parametrize("name", small.NAMES)
def test_every_cell_of_code_follows_words_or_another(name: str) -> None:
    notebook = small.committed(name)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert "parameters" in notebook.cells[1].metadata.tags
    assert max(len(cell.source) for cell in notebook.cells if cell.cell_type == "markdown") < 1200


def test_the_cloud_settings_are_the_defaults_as_the_notebook_says() -> None:
    (cell,) = [cell for cell in code_cells(small.committed("02_train_on_tinker")) if cell.source.startswith("cloud = ")]
    given: dict[str, object] = {}
    exec(cell.source, given)
    cloud = given["cloud"]
    assert isinstance(cloud, dict)
    defaults = sr.TrainConfig().flat()
    model = find_model(cloud["model"])
    assert model is not None
    # What a config leaves to the model and to the weights that a run starts from.
    assert (defaults["thinking"], defaults["lora_rank"], defaults["format"]) == (None, None, None)
    defaults |= {"thinking": model.format.default != "off", "lora_rank": DEFAULT_RANK}
    defaults["format"] = sr.TrainConfig().episode.format_name
    # And what it leaves to the service: in the cloud, the recipe's sizes.
    sizes = asdict(RECIPE)
    assert all(defaults[name] is None for name in sizes)
    defaults |= sizes
    assert {name: defaults[name] for name in cloud if name != "model"} == {
        name: value for name, value in cloud.items() if name != "model"
    }


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
