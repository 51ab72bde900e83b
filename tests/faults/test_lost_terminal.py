"""A terminal, or a pipe, that goes away under a run: the run goes on to its end, and its outcome is the same."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from searchr1_async.local import LocalService
from searchr1_async.runs.resume import ResumePoint
from tests import tiny_world


@pytest.mark.parametrize(
    "progress", ["terminal", *(pytest.param(one, marks=pytest.mark.slow) for one in ("plain", "pipe"))]
)
def test_a_run_outlives_its_terminal(scripted_service: LocalService, tmp_path: Path, progress: str) -> None:
    """A real pty, closed as an ssh connection is that breaks under ``nohup`` or after ``disown``; and ``2>&1 | head -1``."""
    reader, writer = os.pipe() if progress == "pipe" else pty.openpty()
    program = [tmp_path, scripted_service.url, scripted_service.tokenizer_path, "12"]
    settings = json.dumps({"progress": True if progress == "terminal" else "plain"})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.training_child", *program, settings],
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
        env=tiny_world.child_environment() | {"TINKER_API_KEY": scripted_service.api_key, "TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(writer)
    try:
        seen = b""
        while b"train" not in seen:
            seen += os.read(reader, 4096)
        os.close(reader)
        said, _ = process.communicate(timeout=90)
    finally:
        process.kill()
        process.communicate()
    assert said.splitlines()[-2:] == ["ended finished", "finished 2"]
    assert process.returncode == 0
    point = ResumePoint.load(tmp_path / "run")
    assert point is not None
    assert point.step == 2
