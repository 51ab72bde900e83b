"""The quickstart in JupyterLab, worked in a real browser as a person works it: watched, asked, interrupted and read.

Screenshots go into ``$SEARCHR1_SCREENSHOTS``, or into the test's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.resume import ResumePoint
from tests.notebooks import small

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")

from playwright.sync_api import Page, expect

from tests.browser.lab import NotebookPage, chromium, find_chromium, running_lab

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install Debian's `chromium`, or name one in $CHROMIUM"),
]
NOTEBOOK = "01_quickstart.ipynb"
ANSWER_SECONDS = 1.0
"""In which another cell answers while the run goes on."""
ASKED = ("run.metrics.tail(1)", "6 * 7", "run.done, run.step", "run.view()")
"""Cells that a reader adds."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The quickstart with so many steps that it outlasts the test, and with what a reader asks meanwhile."""
    work = tmp_path / "work"
    work.mkdir()
    notebook = small.shrunk("01_quickstart", work, steps=2000)
    notebook.cells += [nbformat.v4.new_code_cell(source, id=f"asked-{place}") for place, source in enumerate(ASKED)]
    nbformat.write(notebook, work / NOTEBOOK)
    return work


@pytest.fixture
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    assert CHROMIUM is not None
    with chromium(CHROMIUM) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        yield page
        assert wrong == []


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("SEARCHR1_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_run_is_watched_asked_interrupted_and_read(folder: Path, page: Page, screenshots: Path) -> None:
    with running_lab(folder, small.environment(folder)) as lab:
        notebook = NotebookPage(page, lab, NOTEBOOK)
        # The file browser takes a third of the page, which no reader leaves it.
        notebook.hide_sidebar()
        try:
            start_the_run(notebook)
            see_it_change(notebook, screenshots)
            ask_meanwhile(notebook)
            in_other_windows(notebook, screenshots)
            interrupt(notebook, folder)
            read_episodes(notebook, screenshots)
        finally:
            page.screenshot(path=screenshots / "last.png")


def start_the_run(notebook: NotebookPage) -> None:
    for line in ("model = None", "HashingEmbedder()", "import searchr1_async as sr", "questions = sr.load_questions"):
        notebook.run(notebook.cell(line))
    # It returns at once: the run has hardly begun when the cell has its number.
    notebook.run(notebook.cell("run = sr.train("), seconds=30)
    expect(notebook.page.locator(".sr1-view")).to_be_visible(timeout=30_000)


def see_it_change(notebook: NotebookPage, screenshots: Path) -> None:
    view = notebook.page.locator(".sr1-view")
    view.scroll_into_view_if_needed()
    progress = view.locator(".sr1-progress")
    expect(progress).not_to_be_empty(timeout=60_000)
    notebook.page.screenshot(path=screenshots / "1_beginning.png")
    # Not before steps are done: the curves have something to show.
    notebook.page.wait_for_function(
        "count => document.querySelectorAll('.sr1-view .sr1-chart canvas').length >= count", arg=1, timeout=120_000
    )
    seen = [view.inner_text()]
    for _ in range(4):
        notebook.page.wait_for_function(
            "before => document.querySelector('.sr1-view').innerText !== before", arg=seen[-1], timeout=20_000
        )
        seen.append(view.inner_text())
    assert len(set(seen)) == len(seen)
    step_before = finished_steps(notebook)
    notebook.page.wait_for_function(
        "before => Number(/step ([\\d,]+)/i.exec(document.querySelector('.sr1-view').innerText)?.[1]) > before + 2",
        arg=step_before,
        timeout=60_000,
    )
    notebook.page.screenshot(path=screenshots / "2_running.png")
    assert painted_pixels(notebook.page) > 0, "the charts are blank"


def finished_steps(notebook: NotebookPage) -> int:
    found = notebook.page.wait_for_function(
        "() => /step ([\\d,]+)/i.exec(document.querySelector('.sr1-view').innerText)?.[1]", timeout=60_000
    )
    return int(str(found.json_value()).replace(",", ""))


def painted_pixels(page: Page) -> int:
    """Of the chart that has fewest: such as differ from its background."""
    return int(
        page.evaluate(
            """() => Math.min(...[...document.querySelectorAll('.sr1-view .sr1-chart canvas')].map(canvas => {
                const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
                let painted = 0;
                for (let at = 3; at < data.length; at += 4) painted += data[at] > 0;
                return painted;
            }))"""
        )
    )


def ask_meanwhile(notebook: NotebookPage) -> None:
    notebook.run(notebook.cell("async for event in run:"), seconds=120)
    seconds = [
        notebook.seconds_to_answer(notebook.cell(asked), answer)
        for asked, answer in (("6 * 7", "42"), ("run.metrics.tail(1)", "progress/batch"), ("6 * 7", "42"))
    ]
    print(f"other cells answered after {', '.join(f'{each:.3f} s' for each in seconds)}")  # noqa: T201 shown with -s
    assert max(seconds) < ANSWER_SECONDS


def in_other_windows(notebook: NotebookPage, screenshots: Path) -> None:
    page = notebook.page
    view = page.locator(".sr1-view")
    notebook.use_theme("JupyterLab Dark")
    view.scroll_into_view_if_needed()
    expect(view.locator(".sr1-chart canvas")).to_have_count(1)
    page.screenshot(path=screenshots / "3_dark.png")
    notebook.use_theme("JupyterLab Light")
    page.set_viewport_size({"width": 600, "height": 1000})
    view.scroll_into_view_if_needed()
    page.wait_for_function(FITS, timeout=10_000)
    page.screenshot(path=screenshots / "4_narrow.png")
    page.set_viewport_size({"width": 1280, "height": 1000})


FITS = """() => {
    const view = document.querySelector('.sr1-view');
    return view.scrollWidth <= view.clientWidth + 1;
}"""
"""Nothing sticks out of the view at its side."""
PAGE_FITS = "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def interrupt(notebook: NotebookPage, folder: Path) -> None:
    waiting = notebook.cell("result = await run")
    notebook.begin(waiting)
    expect(waiting.locator(".jp-InputArea-prompt")).to_have_text("[*]:")
    notebook.interrupt()
    notebook.expect_done(waiting, 90)
    notebook.expect_idle(30)
    asked = notebook.cell("run.done, run.step")
    notebook.run(asked)
    point = ResumePoint.load(folder / "runs" / "quickstart")
    assert point is not None
    assert point.step >= 3
    assert point.sampler_step == point.step, "the weights of the last step are kept for sampling"
    assert point.sampler_path is not None
    assert point.sampler_path.startswith("tinker://")
    assert RunRecords(folder / "runs" / "quickstart").metrics().height == point.step
    expect(asked.locator(".jp-OutputArea-output")).to_contain_text(f"(True, {point.step})")
    # The saved notebook keeps a picture of the run where its live view was.
    expect(notebook.cell("run = sr.train(").locator(".jp-OutputArea-output img")).to_be_visible(timeout=30_000)


def read_episodes(notebook: NotebookPage, screenshots: Path) -> None:
    page = notebook.page
    cell = notebook.cell("run.view()")
    notebook.run(cell)
    frame = cell.locator("iframe").content_frame
    expect(frame.locator("article")).to_be_visible(timeout=30_000)
    cell.locator("iframe").scroll_into_view_if_needed()
    everything = count(frame)
    assert everything > 20
    page.screenshot(path=screenshots / "5_viewer.png")
    frame.locator("button.flag", has_text="wrong").click()
    expect(frame.locator(".row .sign").first).to_have_class("sign wrong")
    assert 0 < count(frame) < everything
    frame.locator(".row").nth(1).click()
    expect(frame.locator("article")).to_contain_text("golden")
    page.screenshot(path=screenshots / "6_wrong.png")
    frame.locator("button.flag", has_text="wrong").click()
    assert count(frame) == everything
    notebook.use_theme("JupyterLab Dark")
    page.set_viewport_size({"width": 600, "height": 1000})
    cell.locator("iframe").scroll_into_view_if_needed()
    handle = cell.locator("iframe").element_handle()
    inside = handle.content_frame() if handle is not None else None
    assert inside is not None
    inside.wait_for_function(PAGE_FITS, timeout=10_000)
    page.screenshot(path=screenshots / "7_viewer_narrow_dark.png")


def count(frame: Any) -> int:
    return int(frame.locator(".total").inner_text().split()[0].replace(",", ""))
