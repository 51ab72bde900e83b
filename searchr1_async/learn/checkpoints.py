"""What a run can be taken up from: its resume point, one small file that says exactly where it stands, and the weights that it
has kept for sampling.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from searchr1_async.boundary.paths import is_same_place
from searchr1_async.config import LossName
from searchr1_async.errors import CheckpointError, RunFolderError
from searchr1_async.files import write_atomically
from searchr1_async.usage import TokenUsage

_FORMAT = 2
_KEPT_FORMAT = 1
_KEPT_FILE = "checkpoints.json"


@dataclass(frozen=True, slots=True)
class WarmUpPlace:
    """How far a warm-up is."""

    step: int
    """Supervised steps finished."""
    batches: str
    """A digest of all batches of the warm-up."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run stands after a finished step. Written whole or not at all, after the service has confirmed the checkpoint.

    All questions of a run are one stream of places: place p is question p mod N of epoch p div N. Groups start in that order
    and end in any, so where a run stands is one number and the few places before it that are still open. There is no
    random state beside: the shuffles are functions of the seed and the epoch, the seeds of sampling of the seed and the place.
    """

    step: int
    """Optimiser steps finished."""
    next_place: int
    """The first place whose group was never started; each before it is open, or held by a recorded step."""
    state_path: str
    """``tinker://`` path of the weights and the optimiser."""
    order_fingerprint: str
    """Of the question order in which places count."""
    base_model: str
    open_places: tuple[int, ...] = ()
    """Places whose group was started and is in no recorded step yet, neither trained on nor dropped: playing, or finished
    and kept in ``unlearned/``."""
    sampler_path: str | None = None
    """``tinker://`` path of the newest weights kept for sampling."""
    sampler_step: int | None = None
    """The step that ``sampler_path`` belongs to."""
    seconds: float = 0.0
    """Spent in reinforcement learning so far, all sessions together."""
    tokens: TokenUsage = field(default_factory=TokenUsage)
    """Asked of the service so far, all sessions together; none in the files of versions that did not count them."""
    dollars: float | None = None
    """US dollars that these cost, each session at the prices of its time; None where that is not known."""
    dearest_step: float | None = None
    """US dollars of the dearest step so far; None before one is recorded, or where that is not known."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the run was started with; a resume with another is refused, naming what changed."""
    loss: LossName | None = None
    """What the run learns with, which may have been chosen by what its service has; None in files of earlier versions."""
    warm_up: WarmUpPlace | None = None
    """Of a run whose warm-up is under way; None before and afterwards, and without one."""
    started_from: Mapping[str, Any] | None = None
    """With ``start_from``: the weights that it meant (``name``, ``path``, ``step``, ``base_model``)."""

    def is_open(self, place: int) -> bool:
        """Whether no recorded step holds the group of this place, so that it must be trained on or dropped yet."""
        return place >= self.next_place or place in self.open_places

    def save(self, folder: Path) -> None:
        """Replaces the run's resume point atomically.

        Raises:
            CheckpointError: the folder cannot be written (a full disk).
        """
        path = folder / "state.json"
        try:
            write_atomically(path, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode())
        except OSError as error:
            raise CheckpointError(
                f"the resume point {path} could not be written: {error.strerror or error}. The run's last resume point is "
                "still whole: make room and resume."
            ) from error

    @classmethod
    def load(cls, folder: Path) -> ResumePoint | None:
        """The resume point of a run's folder; None where it has none yet.

        Raises:
            RunFolderError: it cannot be read, or another version of the package wrote it.
        """
        path = folder / "state.json"
        try:
            values = json.loads(path.read_bytes())
            if (written := values.pop("format")) != _FORMAT:
                age = "an earlier" if written < _FORMAT else "a newer"
                raise RunFolderError(
                    f"{path} was written by {age} version of this package (format {written}, not {_FORMAT}), and cannot be "
                    "resumed with this one. Choose another out_dir, or resume with the version that began the run."
                )
            values["open_places"] = tuple(values["open_places"])
            values["tokens"] = TokenUsage(**values.get("tokens", {}))
            if values.get("warm_up") is not None:
                values["warm_up"] = WarmUpPlace(**values["warm_up"])
            _rename_old_settings(values["settings"])
            return cls(**values)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be read: {error.strerror or error}. Choose another out_dir."
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunFolderError(f"{path} is no resume point: {error}. Choose another out_dir.") from error

    @staticmethod
    def forget(folder: Path) -> None:
        """Takes the resume point out of a folder whose run begins anew.

        Raises:
            OSError: the folder cannot be written.
        """
        (folder / "state.json").unlink(missing_ok=True)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the run was given besides (:func:`searchr1_async.inputs.inputs_of`); empty where an earlier version began it."""
        return self.settings.get("inputs") or {}

    def given(self, inputs: Mapping[str, Any]) -> ResumePoint:
        """The point of a session that is given these; of what it is not given, it knows what it was."""
        return replace(self, settings={**self.settings, "inputs": {**self.inputs, **inputs}})

    def refuse_changes(self, settings: Mapping[str, Any], order_fingerprint: str) -> None:
        """Refuses to go on with other settings or questions, since the steps before and after would not be one run.

        Raises:
            RunFolderError: naming what changed.
        """
        then = {**self.settings, "inputs": None}
        for name in ("model", "start_from"):  # earlier versions kept a relative path as it was given
            before, now = then.get(name), settings.get(name)
            if isinstance(before, str) and isinstance(now, str) and is_same_place(before, now):
                then[name] = now
        changed = list(_differences(then, {**settings, "inputs": None}))
        if order_fingerprint != self.order_fingerprint:
            changed.append("the questions or their order")
        if changed:
            raise RunFolderError(
                "this folder holds a run with other settings (" + "; ".join(changed) + "). Choose another out_dir, or "
                "start with the same settings to resume."
            )


def _rename_old_settings(settings: dict[str, Any]) -> None:
    """Settings as today's version names them, of a run that an earlier one began."""
    pipeline = settings.get("pipeline")
    if isinstance(pipeline, dict) and "switch_weights_in_flight" in pipeline:
        pipeline["weights_in_flight"] = "inflight" if pipeline.pop("switch_weights_in_flight") else "snapshot"


_ABSENT = object()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What changed, field by field: ``learning.learning_rate: 4e-05 then, 0.0001 now``.

    A setting that did not exist yet when the run was begun is the same as None.
    """
    for key in sorted({*then, *now}):
        before, after = then.get(key, _ABSENT), now.get(key, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif (None if before is _ABSENT else before) != (None if after is _ABSENT else after):
            yield f"{prefix}{key}: {_shown(before)} then, {_shown(after)} now"


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)


@dataclass(frozen=True, slots=True)
class KeptCheckpoint:
    """Weights of a run that a service keeps, for sampling and as a training state that can be exported."""

    step: int
    """Optimiser steps done before them."""
    sampler_path: str
    """Their ``tinker://`` path."""
    exact_match: float | None = None
    """On the run's held-out questions; None until it is measured there, if it ever is."""
    questions: int | None = None
    """Held-out questions that it was measured on; None until it is."""
    for_good: bool = True
    """Asked for by ``checkpoint_every``, or the last of a session. The others are there to be measured, and go afterwards unless
    they are the best of a run with ``keep_best``."""
    state_path: str | None = None
    """``tinker://`` path of the training state of the same step: what is exported, and what another run starts from. None in a
    folder that an earlier version of the package wrote, for all steps but that of its resume point."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Every checkpoint that the service holds for these weights."""
        return (self.sampler_path,) if self.state_path is None else (self.sampler_path, self.state_path)

    @property
    def is_measured(self) -> bool:
        return self.questions is not None


def kept_checkpoints(folder: Path) -> tuple[KeptCheckpoint, ...]:
    """The weights that the run in a folder has kept for sampling, by step. Cheap: it reads two small files.

    Of a folder that an earlier version of the package wrote, those that its resume point knows: the last ones.

    Raises:
        RunFolderError: a file cannot be read, or a newer version of the package wrote it.
    """
    point = ResumePoint.load(folder)
    found = _read_kept(folder / _KEPT_FILE)
    # What comes after the resume point is of steps that a resume makes anew.
    kept = {one.step: one for one in found if point is None or one.step <= point.step}
    if point is not None and point.sampler_path is not None:
        last = point.sampler_step or 0
        kept.setdefault(last, KeptCheckpoint(last, point.sampler_path))
    if point is not None and point.step in kept and kept[point.step].state_path is None:
        kept[point.step] = replace(kept[point.step], state_path=point.state_path)
    return tuple(kept[step] for step in sorted(kept))


def best_checkpoint(folder: Path) -> KeptCheckpoint | None:
    """The kept weights with the highest exact match on the run's held-out questions, of equal ones the earliest.

    None where none were measured. The best of many is chosen *on* the held-out questions, so its figure there is too high:
    measure it on others.

    Raises:
        RunFolderError: as :func:`kept_checkpoints`.
    """
    return best_of(kept_checkpoints(folder))


def best_of(checkpoints: Iterable[KeptCheckpoint]) -> KeptCheckpoint | None:
    """The one with the highest exact match, of equal ones the earliest; None where none was measured."""
    measured = [(one.exact_match, -one.step, one) for one in checkpoints if one.exact_match is not None]
    return max(measured, key=lambda scored: scored[:2])[2] if measured else None


class CheckpointList:
    """The one writer of a run's ``checkpoints.json``. Its methods may be called from any thread: each writes a small file.

    Args:
        folder: the run's.
        keep_best: the best measured weights stay, though nothing else asks for them.

    Raises:
        RunFolderError: the list there cannot be read.
    """

    def __init__(self, folder: Path, *, keep_best: bool = False) -> None:
        self._path = folder / _KEPT_FILE
        self._keep_best = keep_best
        self._lock = threading.Lock()
        self._kept = {one.step: one for one in kept_checkpoints(folder)}
        # A resume makes these steps anew; what is left of them is told apart from what is kept.
        known = {one.sampler_path for one in self._kept.values()}
        self._lost = tuple(one for one in _read_kept(self._path) if one.sampler_path not in known)
        self._scores: dict[int, tuple[float | None, int]] = {}

    @property
    def checkpoints(self) -> tuple[KeptCheckpoint, ...]:
        """By step."""
        with self._lock:
            return tuple(self._kept[step] for step in sorted(self._kept))

    def clear(self) -> tuple[KeptCheckpoint, ...]:
        """Forgets what another attempt has left in this folder.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._lock:
            gone = (*self._lost, *self._kept.values())
            self._kept, self._lost, self._scores = {}, (), {}
            self._path.unlink(missing_ok=True)
        return gone

    def holds_state(self, state_path: str) -> bool:
        """Whether a kept step names this training state, so that it must not be deleted."""
        with self._lock:
            return any(one.state_path == state_path for one in self._kept.values())

    def add(self, step: int, sampler_path: str, *, for_good: bool, state_path: str | None = None) -> None:
        """A step's weights are kept from now on; they take the place of those of this step that were kept before.

        Args:
            state_path: the training state of the same step.

        Raises:
            OSError: the folder cannot be written.
        """
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
        """The weights after a step were measured on the held-out questions, whether they are kept already or will be.

        Args:
            exact_match: NaN where no episode came to its end.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._lock:
            known = exact_match if math.isfinite(exact_match) else None
            self._scores[step] = (known, questions)
            if step in self._kept:
                self._kept[step] = replace(self._kept[step], exact_match=known, questions=questions)
                self._save()

    def take_unwanted(self, waiting: Iterable[int] = ()) -> tuple[KeptCheckpoint, ...]:
        """Takes what nobody wants any more from the list, for the caller to delete at the service.

        From the list first: a kill in between leaves weights that no list names, instead of a list that names no weights. The
        caller spares a state that the resume point still names: the recorder deletes it after the next step.

        Args:
            waiting: steps that are to be measured yet.

        Raises:
            OSError: the folder cannot be written.
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
        content = json.dumps({"format": _KEPT_FORMAT, "checkpoints": rows}, indent=1)
        write_atomically(self._path, content.encode())


def _read_kept(path: Path) -> tuple[KeptCheckpoint, ...]:
    try:
        values = json.loads(path.read_bytes())
        if (written := values["format"]) != _KEPT_FORMAT:
            raise RunFolderError(
                f"{path} was written by another version of this package (format {written}, not {_KEPT_FORMAT}): read it with "
                "that version."
            )
        return tuple(KeptCheckpoint(**row) for row in values["checkpoints"])
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunFolderError(
            f"{path} is no list of checkpoints: {error}. Delete it, and the last weights are known."
        ) from error
