"""The command line, as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import searchr1_async as sr
from searchr1_async.cli import main
from searchr1_async.episodes.types import GroupOutcome
from searchr1_async.records.run_records import RunRecords
from tests import tiny_world
from tests.watch.builders import group

COMMAND = [sys.executable, "-m", "searchr1_async"]


def test_the_package_is_a_command() -> None:
    found = subprocess.run(
        [*COMMAND, "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=tiny_world.child_environment(),
    )
    assert found.returncode == 0, found.stderr
    for name in ("run", "atlas", "ask", "eval", "export", "view", "index", "serve", "wiki18"):
        assert name in found.stdout


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("run", "--out-dir --seed --steps --time-limit --held-out --group-size --threads"),
        ("index", "--path --host --port --ssl --collection --token-from --embedder"),
        (
            "wiki18",
            "--folder --compact --embedder --recall --questions --keep",
        ),
    ],
)
def test_help_names_the_options(command: str, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in options.split():
        assert option in shown


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["atlas", "--steps", "many"]])
def test_a_wrong_command_line_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"searchr1_async {sr.__version__}\n"


def test_bad_settings_end_with_one_line_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["atlas", "--out-dir", str(tmp_path / "run"), "--group-size", "1"]) == 1
    reported = capsys.readouterr().err
    assert reported.startswith("ConfigurationError: group_size is 1")
    assert len(reported.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def closed_pipe() -> int:
    """The write end of a pipe that nobody reads, as behind ``| head``."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("arguments", "status"),
    [pytest.param(["--help"], 0, marks=pytest.mark.slow), (["view", "RUN"], 0), (["view", "NOTHING"], 1)],
)
def test_a_closed_output_pipe_does_not_break_the_command(tmp_path: Path, arguments: list[str], status: int) -> None:
    RunRecords(tmp_path / "RUN").write_step(1, [GroupOutcome(0, group())], {})
    reported = tmp_path / "reported"
    writer = closed_pipe()
    with reported.open("wb") as other:
        out, err = (writer, other) if status == 0 else (other, writer)
        found = subprocess.run(
            [*COMMAND, *arguments],
            stdout=out,
            stderr=err,
            timeout=120,
            check=False,
            cwd=tmp_path,
            env=tiny_world.child_environment(),
        )
    os.close(writer)
    assert found.returncode == status
    assert reported.read_text() == ""
    if arguments[-1] == "RUN":
        assert (tmp_path / "RUN" / "view.html").exists()


def test_an_interrupt_during_import_is_one_line() -> None:
    """Importing a command takes seconds, and Ctrl-C interrupts whichever module is being read."""
    code = """
import signal, sys
class Interrupting:
    def find_spec(self, name, *rest):
        if name == "searchr1_async.episodes.prompts":
            signal.raise_signal(signal.SIGINT)
from searchr1_async.cli import entry
signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may run in the background of a shell
sys.meta_path.insert(0, Interrupting())
sys.argv = ["searchr1", "view", "RUN"]
entry()
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=tiny_world.child_environment(),
    )
    assert (found.returncode, found.stdout, found.stderr) == (-signal.SIGINT, "", "\nStopped.\n")


INTERRUPTED = """
import sys
from pathlib import Path
import searchr1_async as sr
import searchr1_async.cli.atlas as job
import searchr1_async.cli as command
from searchr1_async.events import StepFinished
from tests import tiny_world

# The command itself, on the small world: its search, questions and model.
train, world = job.train, Path(sys.argv[1])


def small_train(questions, search, out_dir, config, **settings):
    def tell(event):
        if isinstance(event, StepFinished):
            print("step", event.step, flush=True)

    small = {**tiny_world.SETTINGS, "model": sys.argv[2], "warm_up": None, "steps": config.length.steps}
    settings |= {**tiny_world.given(sr.TrainConfig, small), "held_out": (), "demonstrations": (), "on_event": tell}
    return train(tiny_world.make_questions()[0], tiny_world.make_search(world / "index"), out_dir, **settings)


job.train = small_train
job.Search = type("NoSearch", (), {"local": staticmethod(lambda *args, **settings: None)})
sys.exit(command.main(["atlas", "--out-dir", str(world / "run"), "--steps", "300"]))
"""


@pytest.mark.slow
def test_control_c_ends_the_command_cleanly_and_resumably(tmp_path: Path) -> None:
    """A terminal's Ctrl-C: everything is closed, the folder is intact, and the service is gone."""
    from searchr1_async.records.run_records import RunRecords
    from searchr1_async.runs.resume import ResumePoint

    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, tmp_path, tiny_world.model_folder()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tiny_world.child_environment() | {"COLUMNS": "80"},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert any(line.strip() == "step 1" for line in process.stdout), process.communicate()[1]
        (service,) = tiny_world.service_processes(process.pid)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors
    assert "run the same command to resume" in errors
    assert "Traceback" not in errors
    assert not tiny_world.is_running(service)
    point = ResumePoint.load(tmp_path / "run")
    assert point is not None
    assert point.step in (1, 2)
    assert RunRecords(tmp_path / "run").metrics()["step"].to_list() == list(range(1, point.step + 1))
