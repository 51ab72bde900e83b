"""Resume points and kept checkpoints of a run."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.paths import is_same_place, write_atomically
from searchr1_async.config import LossName
from searchr1_async.errors import CheckpointError, RunFolderError

_FORMAT = 2
_KEPT_FORMAT = 1
_POINT_FILE, _KEPT_FILE = "state.json", "checkpoints.json"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """State of a run after a finished step. Written atomically, once the service has confirmed the checkpoint.

    Questions form one stream of places: place p is question p mod N of epoch p div N. Groups start in that order and finish in
    any, so progress is one number plus the few earlier places still open. No RNG state is needed: shuffles depend on the seed
    and epoch, sampling seeds on the seed and place.
    """

    step: int
    """Finished optimizer steps."""
    next_place: int
    """First place whose group was never started; every earlier one is open or part of a recorded step."""
    state_path: str
    """``tinker://`` path of the weights and optimizer state."""
    order_fingerprint: str
    base_model: str
    open_places: tuple[int, ...] = ()
    """Places that were started but are in no recorded step yet: running, or finished and stored in ``unlearned/``."""
    sampler_path: str | None = None
    """``tinker://`` path of the newest sampling weights."""
    sampler_step: int | None = None
    seconds: float = 0.0
    """Seconds of reinforcement learning so far, over all sessions."""
    tokens: TokenUsage = field(default_factory=TokenUsage)
    """Tokens used so far, over all sessions; zero in files of versions that did not count them."""
    dollars: float | None = None
    """Their cost in US dollars, each session at its own prices; None if unknown."""
    dearest_step: float | None = None
    """Cost of the most expensive step in US dollars; None before the first step or if unknown."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run; a resume with different ones is refused."""
    loss: LossName | None = None
    """The run's loss, which may depend on what the service supports; None in files of earlier versions."""
    warm_up: int | None = None
    """Supervised steps finished; set only while a warm-up is in progress."""
    started_from: Mapping[str, Any] | None = None
    """With ``start_from``: the weights it resolved to (``name``, ``path``, ``step``, ``base_model``)."""

    def save(self, folder: Path) -> None:
        """Replaces the run's resume point atomically."""
        with writing_records(folder):
            _write(folder / _POINT_FILE, {"format": _FORMAT, **asdict(self)})

    @staticmethod
    def load(folder: Path) -> ResumePoint | None:
        """Loads the resume point of a run folder; None if there is none."""
        return _read(folder / _POINT_FILE, _FORMAT, _point_of, "Choose another out_dir.")

    @staticmethod
    def forget(folder: Path) -> None:
        """Deletes the resume point of a folder whose run starts over."""
        (folder / _POINT_FILE).unlink(missing_ok=True)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Other inputs of the run (:func:`searchr1_async.training.job.inputs_of`); empty in files of earlier versions."""
        return self.settings.get("inputs") or {}

    def given(self, inputs: Mapping[str, Any]) -> ResumePoint:
        """A copy with these inputs updated; inputs not given keep their values."""
        return replace(self, settings={**self.settings, "inputs": {**self.inputs, **inputs}})

    def refuse_changes(self, settings: Mapping[str, Any], order_fingerprint: str) -> None:
        """Refuses to resume with different settings or questions."""
        then = {**self.settings, "inputs": None}
        for name in ("model", "start_from"):  # earlier versions stored relative paths
            before, now = then.get(name), settings.get(name)
            if isinstance(before, str) and isinstance(now, str) and is_same_place(before, now):
                then[name] = now
        changed = list(_differences(then, {**settings, "inputs": None}))
        if order_fingerprint != self.order_fingerprint:
            changed.append("the questions or their order")
        if changed:
            raise RunFolderError(
                f"this folder contains a run with other settings ({'; '.join(changed)}). Choose another out_dir, or use the same "
                "settings to resume."
            )


def _point_of(values: dict[str, Any]) -> ResumePoint:
    if isinstance(values.get("warm_up"), dict):  # of an earlier version
        values["warm_up"] = values["warm_up"]["step"]
    pipeline = values["settings"].get("pipeline") or {}
    if "switch_weights_in_flight" in pipeline:  # likewise
        pipeline["weights_in_flight"] = "inflight" if pipeline.pop("switch_weights_in_flight") else "snapshot"
    return msgspec.convert(values, ResumePoint)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Changed fields, such as ``learning.learning_rate: 4e-05 then, 0.0001 now``. A missing setting equals None."""
    for key in sorted({*then, *now}):
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before!r} then, {after!r} now"


@dataclass(frozen=True, slots=True)
class KeptCheckpoint:
    """Saved weights of a run: sampling weights and, usually, a training state that can be exported."""

    step: int
    """Optimizer steps before them."""
    sampler_path: str
    """``tinker://`` path of the sampling weights."""
    exact_match: float | None = None
    """Exact match on the run's held-out questions; None until measured."""
    questions: int | None = None
    """Number of held-out questions measured; None until measured."""
    for_good: bool = True
    """Kept permanently: due by ``checkpoint_every``, or the last of a session. Others are deleted after their evaluation, except
    the best of a run with ``keep_best``."""
    state_path: str | None = None
    """``tinker://`` path of the training state of the same step, for export and ``start_from``. Folders of earlier versions have it
    only for the step of the resume point."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All service checkpoints of these weights."""
        return (self.sampler_path,) if self.state_path is None else (self.sampler_path, self.state_path)

    @property
    def is_measured(self) -> bool:
        return self.questions is not None


def kept_checkpoints(folder: Path) -> tuple[KeptCheckpoint, ...]:
    """Kept checkpoints of a run folder, by step. Reads two small files.

    For folders of earlier versions: only the last one, from the resume point.
    """
    point = ResumePoint.load(folder)
    found = _read_kept(folder / _KEPT_FILE)
    # A resume redoes the steps after the resume point.
    kept = {one.step: one for one in found if point is None or one.step <= point.step}
    if point is not None and point.sampler_path is not None:
        last = point.sampler_step or 0
        kept.setdefault(last, KeptCheckpoint(last, point.sampler_path))
    if point is not None and point.step in kept and kept[point.step].state_path is None:
        kept[point.step] = replace(kept[point.step], state_path=point.state_path)
    return tuple(kept[step] for step in sorted(kept))


def best_checkpoint(folder: Path) -> KeptCheckpoint | None:
    """The best of a run folder's checkpoints; see :func:`best_of`."""
    return best_of(kept_checkpoints(folder))


def best_of(checkpoints: Iterable[KeptCheckpoint]) -> KeptCheckpoint | None:
    """The checkpoint with the highest exact match on the held-out questions, the earliest if tied; None if none was measured."""
    measured = [(one.exact_match, -one.step, one) for one in checkpoints if one.exact_match is not None]
    return max(measured, key=lambda scored: scored[:2])[2] if measured else None


class CheckpointList:
    """The only writer of a run's ``checkpoints.json``. Thread-safe; each method writes a small file."""

    def __init__(self, folder: Path, *, keep_best: bool = False) -> None:
        self._path = folder / _KEPT_FILE
        self._keep_best = keep_best
        self._lock = threading.Lock()
        self._kept = {one.step: one for one in kept_checkpoints(folder)}
        # A resume redoes these steps: their old weights are to be deleted.
        known = {one.sampler_path for one in self._kept.values()}
        self._lost = tuple(one for one in _read_kept(self._path) if one.sampler_path not in known)
        self._scores: dict[int, tuple[float | None, int]] = {}

    @property
    def checkpoints(self) -> tuple[KeptCheckpoint, ...]:
        with self._lock:
            return tuple(self._kept[step] for step in sorted(self._kept))

    def clear(self) -> tuple[KeptCheckpoint, ...]:
        """Forgets and returns all checkpoints of an earlier run in this folder."""
        with self._lock:
            gone = (*self._lost, *self._kept.values())
            self._kept, self._lost, self._scores = {}, (), {}
            self._path.unlink(missing_ok=True)
        return gone

    def holds_state(self, state_path: str) -> bool:
        """Whether a kept checkpoint uses this training state, so that it must not be deleted."""
        with self._lock:
            return any(one.state_path == state_path for one in self._kept.values())

    def add(self, step: int, sampler_path: str, *, for_good: bool, state_path: str | None = None) -> None:
        """Records a step's weights, replacing earlier ones of the same step."""
        with self._lock:
            old = self._kept.get(step)
            exact_match, questions = self._scores.get(step, (None, None))
            if old is not None:
                if questions is None:
                    exact_match, questions = old.exact_match, old.questions
                if old.sampler_path != sampler_path:
                    self._lost = (*self._lost, old)
            self._kept[step] = KeptCheckpoint(step, sampler_path, exact_match, questions, for_good, state_path)
            self._save()

    def measured(self, step: int, exact_match: float, questions: int) -> None:
        """Records an evaluation of a step's weights, which may be added before or after."""
        with self._lock:
            known = exact_match if math.isfinite(exact_match) else None
            self._scores[step] = (known, questions)
            if step in self._kept:
                self._kept[step] = replace(self._kept[step], exact_match=known, questions=questions)
                self._save()

    def take_unwanted(self, waiting: Iterable[int] = ()) -> tuple[KeptCheckpoint, ...]:
        """Removes unneeded checkpoints from the list and returns them, for the caller to delete at the service.

        The list is written first: a crash in between leaves orphaned weights, not dangling entries. The caller must keep a state
        that the resume point still uses; the recorder deletes it after the next step.
        """
        with self._lock:
            best = best_of(self._kept.values()) if self._keep_best else None
            kept_steps = {*waiting} if best is None else {*waiting, best.step}
            gone = [one for step, one in self._kept.items() if not one.for_good and step not in kept_steps]
            for one in gone:
                del self._kept[one.step]
            lost, self._lost = self._lost, ()
            if gone or lost:
                self._save()
        return (*lost, *gone)

    def _save(self) -> None:
        rows = [asdict(self._kept[step]) for step in sorted(self._kept)]
        _write(self._path, {"format": _KEPT_FORMAT, "checkpoints": rows})


def _read_kept(path: Path) -> tuple[KeptCheckpoint, ...]:
    def decode(values: dict[str, Any]) -> tuple[KeptCheckpoint, ...]:
        return msgspec.convert(values["checkpoints"], tuple[KeptCheckpoint, ...])

    return _read(path, _KEPT_FORMAT, decode, "Delete it to fall back to the last weights.") or ()


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=1).encode())


def _read(path: Path, known: int, decode: Callable[[dict[str, Any]], T], remedy: str) -> T | None:
    """The content of a JSON file with its format's number; None without the file."""
    try:
        values = json.loads(path.read_bytes())
        if (written := values.pop("format")) == known:
            return decode(values)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror or error}. {remedy}") from error
    except (ValueError, TypeError, KeyError, AttributeError, msgspec.ValidationError) as error:
        raise RunFolderError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
    raise RunFolderError(
        f"{path} was written by another version of this package (format {written}, not {known}): use that version, or choose "
        "another out_dir"
    )


@contextmanager
def writing_records(folder: Path) -> Iterator[None]:
    """Turns a write error (disk full, no permission) into an error that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the records in {folder}: {error.strerror or error}. What was written before is "
            "intact: free some space and resume."
        ) from error
