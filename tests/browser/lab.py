"""JupyterLab in a folder of its own, and headless Chromium that looks at it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

_PLUGINS = {
    # Every cell stays in the page, so that what is off the screen can be measured too.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}


def find_chromium() -> str | None:
    """``$CHROMIUM``, or one where distributions put it; None where there is none."""
    names = (os.environ.get("CHROMIUM"), "/usr/bin/chromium", "/usr/bin/chromium-browser", "google-chrome", "chromium")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Lab:
    url: str
    token: str
    folder: Path

    def address(self, notebook: str) -> str:
        return f"{self.url}/lab/tree/{notebook}?token={self.token}&reset"


@contextmanager
def running_lab(folder: Path, environment: Mapping[str, str]) -> Iterator[Lab]:
    """A JupyterLab over ``folder`` that asks nothing of the network; ended with its kernels.

    Args:
        folder: its root; what Jupyter keeps for itself goes beside it, into ``<folder>.jupyter``.
        environment: all variables of the server, and of its kernels.

    Raises:
        RuntimeError: it ended, or did not answer within a minute; with what it wrote.
    """
    own = folder.with_name(f"{folder.name}.jupyter")
    for name, values in _PLUGINS.items():
        file = (own / "settings" / name).with_suffix(".jupyterlab-settings")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    token, port = secrets.token_hex(16), _free_port()
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--expose-app-in-browser",
        "--ServerApp.ip=127.0.0.1",
    ]
    options = {
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.allow_root": True,
        "ServerApp.root_dir": folder,
        "LabApp.news_url": "",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.extension_manager": "readonly",
    }
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    process = subprocess.Popen(
        [*command, *(f"--{name}={value}" for name, value in options.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        # The token as a variable: a command line can be read by every user of the machine.
        env={**environment, **{name: str(own / place) for name, place in folders.items()}, "JUPYTER_TOKEN": token},
    )
    said: list[str] = []
    is_up = threading.Event()
    reader = threading.Thread(target=_read, args=(process, said, is_up))
    reader.start()
    assert process.stderr is not None
    try:
        is_up.wait(60)
        if not any(_is_greeting(line) for line in said):
            raise RuntimeError(f"JupyterLab did not come up:\n{''.join(said)}")
        yield Lab(f"http://127.0.0.1:{port}", token, folder)
    finally:
        process.send_signal(signal.SIGTERM)  # it ends its kernels before itself
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stderr.close()


def _read(process: subprocess.Popen[str], said: list[str], is_up: threading.Event) -> None:
    """Takes in all that the server says, so that it never waits for a reader."""
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if _is_greeting(line):
            is_up.set()
    is_up.set()


def _is_greeting(line: str) -> bool:
    return "is running at:" in line


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def chromium(executable: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"],
        )
        try:
            yield browser
        finally:
            browser.close()


class NotebookPage:
    """A notebook that is open in JupyterLab, worked as a person works it: cells are clicked, keys are pressed."""

    def __init__(self, page: Page, lab: Lab, notebook: str) -> None:
        self.page = page
        page.goto(lab.address(notebook))
        self.panel = page.locator(".jp-NotebookPanel")
        self.cells = self.panel.locator(".jp-Cell")
        expect(self.panel).to_be_visible(timeout=60_000)
        # The indicator shows an idle kernel before there is one, and what is run then is lost.
        page.wait_for_function(_IS_CONNECTED, timeout=60_000)
        self.expect_idle(60)
        # The cell's number of milliseconds from Shift+Enter to the first output, taken where a person would see it.
        page.evaluate(_STOPWATCH)

    def expect_idle(self, seconds: float) -> None:
        """The kernel is up and runs nothing."""
        idle = self.panel.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")
        expect(idle).to_have_count(1, timeout=seconds * 1000)

    def cell(self, text: str) -> Locator:
        """The one cell of code with a line that holds ``text``."""
        found = self.panel.locator(".jp-CodeCell").filter(has=self.page.locator(".jp-InputArea-editor", has_text=text))
        expect(found).to_have_count(1)
        return found

    def begin(self, cell: Locator) -> None:
        """Runs a cell, and waits for nothing."""
        cell.locator(".jp-InputArea-prompt").click()
        self.page.keyboard.press("Shift+Enter")

    def run(self, cell: Locator, seconds: float = 60) -> None:
        """Runs a cell to its end.

        Raises:
            AssertionError: it raised, or took longer.
        """
        self.begin(cell)
        self.expect_done(cell, seconds)
        expect(cell.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)

    def expect_done(self, cell: Locator, seconds: float) -> None:
        """The cell shows a number, not ``[*]`` and not ``[ ]``."""
        prompt = cell.locator(".jp-InputArea-prompt")
        expect(prompt).to_have_text(_NUMBERED, timeout=seconds * 1000)

    def seconds_to_answer(self, cell: Locator, text: str, deadline: float = 30) -> float:
        """Runs a cell and measures in the page from Shift+Enter until its output holds ``text``."""
        cell.scroll_into_view_if_needed()
        handle = cell.element_handle()
        assert handle is not None
        self.page.evaluate("([cell, text]) => window.stopwatch(cell, text)", [handle, text])
        self.begin(cell)
        measured = self.page.wait_for_function("() => window.measured", timeout=deadline * 1000)
        return float(measured.json_value()) / 1000

    def interrupt(self) -> None:
        """The button ■."""
        self.panel.locator("[data-command='notebook:interrupt-kernel']").first.click()

    def hide_sidebar(self) -> None:
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")

    def use_theme(self, name: str) -> None:
        """``JupyterLab Light`` or ``JupyterLab Dark``."""
        self.page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
        expect(self.page.locator("body")).to_have_attribute("data-jp-theme-name", name)


_NUMBERED = re.compile(r"\[\d+\]:")
_IS_CONNECTED = """() => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel?.connectionStatus === 'connected' && kernel.status === 'idle' && kernel.hasPendingInput === false;
}"""
_STOPWATCH = """() => {
window.stopwatch = (cell, text) => {
    window.measured = null;
    let began = null;
    const key = event => {
        if (event.key === 'Enter' && event.shiftKey) {
            began = performance.now();
            document.removeEventListener('keydown', key, true);
        }
    };
    document.addEventListener('keydown', key, true);
    const area = cell.querySelector('.jp-Cell-outputWrapper');
    const observer = new MutationObserver(() => {
        if (began !== null && area.textContent.includes(text)) {
            window.measured = performance.now() - began;
            observer.disconnect();
        }
    });
    observer.observe(area, {childList: true, subtree: true, characterData: true});
};
}"""
