"""Runs the notebooks of this folder from top to bottom, in place, and keeps only what belongs into them::

    python notebooks/execute.py            # all, in their order
    python notebooks/execute.py 01 03      # those whose names begin so

Each runs in a kernel of its own, with this folder as its working directory, so that ``runs/quickstart`` of the first is
found by the others. What is saved is the same on every machine but for the figures: no paths, no widgets, no times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionComplete
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
MAX_BYTES = 500_000
"""Of a notebook with its outputs: what GitHub still shows, and what a clone of this repository can bear."""

_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|tmp|work|Users|usr|opt|var|private|mnt|content)/[\w.-]|\b[A-Z]:\\\\?\w"
)
_WARNING = re.compile(r"\b\w*Warning\b:|Traceback \(most recent call last\)")


def with_parameters(notebook: NotebookNode, source: str) -> NotebookNode:
    """A copy with ``source`` in a cell of its own after the one that is tagged ``parameters`` (papermill's convention).

    Raises:
        ValueError: no cell, or several, are tagged so.
    """
    copy = nbformat.reads(nbformat.writes(notebook), as_version=4)
    places = [place for place, cell in enumerate(copy.cells) if "parameters" in cell.metadata.get("tags", [])]
    if len(places) != 1:
        raise ValueError(f"{len(places)} cells are tagged 'parameters': there must be one")
    injected = nbformat.v4.new_code_cell(source, id="injected", metadata={"tags": ["injected-parameters"]})
    copy.cells.insert(places[0] + 1, injected)
    return copy


def execute(
    notebook: NotebookNode, folder: Path, *, cell_timeout: float, environment: Mapping[str, str] | None = None
) -> None:
    """Runs every cell, in a new kernel that works in ``folder``; outputs go into ``notebook``.

    Args:
        notebook: changed in place, also where a cell fails.
        folder: the kernel's working directory.
        cell_timeout: seconds that one cell may take.
        environment: all variables of the kernel; by default this process's.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        nbclient.exceptions.CellTimeoutError: a cell took too long.
    """
    client = _Client(
        notebook,
        kernel_name="python3",
        timeout=cell_timeout,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute(env=dict(os.environ if environment is None else environment))


class _Client(NotebookClient):
    """Lets a cell's output change while a later cell runs, as every notebook's page does.

    A live view stands in the cell that started the run, and is replaced by its picture while another cell waits for the run.
    NotebookClient hears only what answers the cell that runs.
    """

    async def _async_poll_output_msg(self, parent_msg_id: str, cell: NotebookNode, cell_index: int) -> None:
        assert self.kc is not None
        is_over = False
        while not is_over:
            message: dict[str, Any] = await self.kc.iopub_channel.get_msg(timeout=None)
            is_answer = message["parent_header"].get("msg_id") == parent_msg_id
            if is_answer or message["msg_type"] == "update_display_data":
                try:
                    self.process_message(message, cell, cell_index)
                except CellExecutionComplete:
                    is_over = True


def clean(notebook: NotebookNode) -> None:
    """Takes out of an executed notebook what is of no use to its readers, or differs from machine to machine."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": _KERNEL, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    )
    for cell in notebook.cells:
        kept = {name: cell.metadata[name] for name in ("tags",) if name in cell.metadata}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_empty(_without_live_parts(output))]


def _without_live_parts(output: NotebookNode) -> NotebookNode:
    """The output in place, without the widget (its kernel is gone) and without a page that no saved notebook shows."""
    data = output.get("data")
    if data is not None:
        output.metadata = nbformat.from_dict({})
        if _WIDGET_VIEW in data:
            # Its text says only which widget it was.
            for name in (_WIDGET_VIEW, "text/plain"):
                data.pop(name, None)
        if "<iframe" in "".join(data.get("text/html", "")):  # it would be stripped
            del data["text/html"]
    return output


def _is_empty(output: NotebookNode) -> bool:
    return output.output_type in ("display_data", "execute_result") and not output.data


def problems(notebook: NotebookNode) -> Iterator[str]:
    """What must not be in a saved notebook, in words; nothing for one that is as it should be."""
    if len(nbformat.writes(notebook).encode()) > MAX_BYTES:
        yield f"it has over {MAX_BYTES:,} bytes"
    if "widgets" in notebook.metadata:
        yield "its metadata hold the state of widgets"
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        if cell.source.strip() and cell.execution_count is None:
            yield f"cell {place} was not run"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {place} raised {output.ename}"
            if _WIDGET_VIEW in output.get("data", {}):
                yield f"cell {place} shows a widget, which is empty without its kernel"
            for text in _texts(output):
                if found := _MACHINE_PATH.search(text):
                    yield f"cell {place} names a path of a machine: {_around(text, found)}"
                if found := _WARNING.search(text):
                    yield f"cell {place} shows a warning: {_around(text, found)}"


def _texts(output: NotebookNode) -> Iterator[str]:
    """All that an output says; not its pictures."""
    if output.output_type == "stream":
        yield output.text
    for kind, content in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            yield content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _around(text: str, found: re.Match[str]) -> str:
    return repr(text[max(found.start() - 30, 0) : found.end() + 50])


def paths(beginnings: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of these; all of them for none.

    Raises:
        ValueError: no notebook begins so.
    """
    every = sorted(FOLDER.glob("*.ipynb"))
    for beginning in beginnings:
        if not any(path.name.startswith(beginning) for path in every):
            raise ValueError(f"no notebook begins with {beginning!r}: there are {', '.join(p.stem for p in every)}")
    return [path for path in every if not beginnings or path.name.startswith(tuple(beginnings))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks from top to bottom and keep their outputs.")
    parser.add_argument("notebooks", nargs="*", help="beginnings of their names; all of them by default")
    parser.add_argument("--cell-timeout", type=float, default=3600, help="seconds that a cell may take (%(default)s)")
    options = parser.parse_args()
    # The package of this checkout, also where another is installed.
    package = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    }
    is_bad = False
    for path in paths(options.notebooks):
        notebook = nbformat.read(path, as_version=4)
        began = time.monotonic()
        try:
            execute(notebook, FOLDER, cell_timeout=options.cell_timeout, environment=package)
        finally:
            # Also what a failed one came to: it says where and why.
            clean(notebook)
            nbformat.write(notebook, path)
        found = list(problems(notebook))
        is_bad = is_bad or bool(found)
        sys.stdout.write(f"{path.name}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1000:,.0f} KB\n")
        sys.stdout.writelines(f"  {problem}\n" for problem in found)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
