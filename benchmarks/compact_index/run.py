"""The compact index at 1, 5 and 21 million vectors of 768 numbers, beside Chroma and faiss's exact index.

    pip install wordllama
    python -m benchmarks compact_index --data FOLDER --work FOLDER --rows 1000000 5000000 21015324

Rows are real vectors of real passages, and rows made of them (benchmarks/shared/real_vectors.py, extended_vectors.py; how near these
come to real ones: benchmarks/compact_geometry). Questions are real. Each stage runs in a process of its own, whose memory is read from
/proc; sizes one after another, each kept in `--work` as soon as it is measured, so that a kill loses one. 21 million rows take
some 45 GB of disk while they are built. As root, with control groups (version 1) mounted, all is served again where the system gives the
process and its part of the page cache 8 GB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.compact_index.report import report
from benchmarks.shared.processes import child_environment, command_of
from searchr1_async.boundary.paths import folder_bytes
from searchr1_async.search.builders import needed_bytes

SIZES = (1_000_000, 5_000_000, 21_015_324)
LIMIT = 8 << 30
GROUPS = Path("/sys/fs/cgroup/memory")
CONTENDERS = ("compact", "flat", "chroma")
_PASSAGE_BYTES = 250
"""A line of 100 characters of text, title, number."""


class Failed(RuntimeError):
    """A stage failed; its output is above."""


class Bench:
    """One size's stages.

    Args:
        options: of the command.
        rows: of the index.
        index: its folder.
    """

    def __init__(self, options: argparse.Namespace, rows: int, index: Path) -> None:
        self._options, self._rows, self._index = options, rows, index

    def command(self, stage: str, *more: str) -> list[str]:
        options = self._options
        real = [] if options.real is None else ["--real", str(options.real)]
        return [
            *command_of("benchmarks.compact_index.stage", stage),
            *("--data", str(options.data), "--work", str(options.work), "--rows", str(self._rows)),
            *("--index", str(self._index), "--questions", str(options.questions)),
            *("--characters", str(options.characters), "--patience", str(options.patience)),
            *real,
            *more,
        ]

    def run(self, stage: str, *more: str, group: Path | None = None) -> dict[str, Any]:
        """A stage to its end: what it measured, with the most memory it had.

        Raises:
            Failed: it did not end well.
        """
        print(f"{self._rows:,}: {stage} {' '.join(more)}", file=sys.stderr, flush=True)
        join = None if group is None else _joining(group)
        process = subprocess.Popen(
            self.command(stage, *more), stdout=subprocess.PIPE, text=True, preexec_fn=join, env=child_environment()
        )
        peaks = {"peak_anon": 0, "peak_file": 0}
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                for name, value in _memory(process.pid).items():
                    peaks[f"peak_{name}"] = max(peaks[f"peak_{name}"], value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            output = process.communicate()[0]
        finally:
            ended.set()
            watcher.join()
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise Failed(f"{stage} ended with {process.returncode}")
        return {**json.loads(output.splitlines()[-1]), **peaks}

    def cold(self) -> None:
        """Makes the system let go of what it holds of the index's files."""
        for path in self._index.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def serve(self, state: str) -> dict[str, Any]:
        """Figures of one state, each name with the state in front."""
        if state.startswith("cold"):
            self.cold()
        return {f"{state}_{name}": value for name, value in self.run("serve", "--state", state).items()}

    def two(self) -> dict[str, Any]:
        """Two processes over one index: what each has in memory, and their shares when common pages are divided (Pss)."""
        processes = [
            subprocess.Popen(
                self.command("hold"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment()
            )
            for _ in range(2)
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                if process.stdout.readline().strip() != "ready":
                    raise Failed("hold did not open the index")
            kept = [_rollup(process.pid) for process in processes]
        finally:
            for process in processes:
                process.communicate("\n")
        names = {"two_rss": "Rss", "two_pss": "Pss", "two_pss_file": "Pss_File"}
        return {name: sum(each[field] for each in kept) for name, field in names.items()}

    def limited(self) -> dict[str, Any]:
        """Served where process and page cache have 8 GB together; a note where that cannot be set."""
        self.cold()
        try:
            with _group() as group:
                found: dict[str, Any] = {}
                for state in ("warm", "load"):
                    measured = self.run("serve", "--state", state, group=group)
                    found |= {f"limited_{state}_{name}": value for name, value in measured.items()}
                found["limited_most"] = int((group / "memory.max_usage_in_bytes").read_text())
                found["limited_failures"] = int((group / "memory.failcnt").read_text())
                return found
        except OSError as error:
            return {"limited_note": f"no memory group could be made ({error.strerror})"}


def build_compact(bench: Bench, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Builds one index, or takes the one that is there."""
    needed = needed_bytes(rows, 768, _PASSAGE_BYTES)
    needed -= folder_bytes(bench._index)  # of a build that was begun
    if (free := shutil.disk_usage(options.work).free) < needed and not (bench._index / "manifest.json").exists():
        raise Failed(
            f"{rows:,} rows take {needed / 1e9:.0f} GB more in {options.work}, where {free / 1e9:.0f} GB are free"
        )
    kept = options.work / f"{bench._index.name}.build.json"
    if (bench._index / "manifest.json").exists() and kept.exists():
        return json.loads(kept.read_text())
    built = bench.run("build")
    kept.write_text(json.dumps(built))
    return built


def serve_compact(bench: Bench) -> dict[str, Any]:
    """Serves it in every state."""
    row = bench.serve("cold") | bench.serve("cold-batches")
    row |= bench.serve("warm") | bench.serve("load")
    return {**row, **bench.two(), **bench.limited()}


def measure(contender: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table.

    Raises:
        Failed: a stage did not end well, or the disk is too full.
    """
    name = f"{contender}-float16-{rows}" if contender == "compact" else f"{contender}-{rows}"
    bench = Bench(options, rows, options.work / name)
    built: dict[str, Any] = {}
    if contender == "compact":
        built = build_compact(bench, rows, options)  # which finds the exact neighbours on the way
    prepared = bench.run("prepare")
    if contender == "compact":
        figures = built | serve_compact(bench)
    else:
        figures = bench.run(contender)
        if contender == "chroma":
            figures["bytes"] = folder_bytes(bench._index)
    if not options.keep_indexes:
        shutil.rmtree(bench._index, ignore_errors=True)
    return {
        "contender": contender,
        "vectors": "float16" if contender == "compact" else "float32",
        "rows": rows,
        "real": prepared["real"],
        "questions": options.questions,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "exact_seconds": prepared["exact_seconds"],
        **figures,
    }


# --- memory -----------------------------------------------------------------------------------------------------------------


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    kept = {"anon": "RssAnon", "file": "RssFile"}
    return {name: 1024 * int(fields[field].split()[0]) for name, field in kept.items() if field in fields}


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}


@contextmanager
def _group() -> Iterator[Path]:
    """A memory group of its own with 8 GB, gone afterwards.

    Raises:
        OSError: none can be made here.
    """
    group = GROUPS / f"searchr1-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield group
    finally:
        (group / "memory.force_empty").write_text("0")
        group.rmdir()


def _joining(group: Path) -> Callable[[], None]:
    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return join


# --- the command ------------------------------------------------------------------------------------------------------------


def kept_rows(work: Path) -> list[dict[str, Any]]:
    """The last measurement of each contender and size, as they were kept."""
    path = work / "compact_index.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last: Mapping[Any, dict[str, Any]] = {(row["contender"], row["vectors"], row["rows"]): row for row in rows}
    return sorted(last.values(), key=lambda row: (CONTENDERS.index(row["contender"]), row["vectors"], row["rows"]))


def measure_all(options: argparse.Namespace) -> Sequence[Failed]:
    """Every contender at every size; what fails leaves the others alone."""
    failures: list[Failed] = []
    for rows in options.rows:
        for contender in options.contenders:
            try:
                row = measure(contender, rows, options)
            except Failed as error:
                print(error, file=sys.stderr, flush=True)
                failures.append(error)
                continue
            with (options.work / "compact_index.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of questions, passages and transcripts")
    parser.add_argument("--work", type=Path, required=True, help="where vectors, indexes and figures are kept")
    parser.add_argument("--rows", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["compact"])
    parser.add_argument("--questions", type=int, default=512, help="real ones that recall and speed are measured of")
    parser.add_argument("--characters", type=int, default=100, help="of each passage's text")
    parser.add_argument("--patience", type=float, default=900, help="seconds after which building Chroma is given up")
    parser.add_argument(
        "--real", type=int, help="so many real passages, whose vectors are there; default: all, computed first"
    )
    parser.add_argument("--keep-indexes", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args()
    # Else a stage and its memory group would outlive the command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.work.mkdir(parents=True, exist_ok=True)
    failures = measure_all(options)
    report(kept_rows(options.work), keep=options.keep)
    if failures:
        raise SystemExit(1)
