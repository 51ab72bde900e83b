"""The sampled sequences that a session may train on: what ``record_stability_info`` keeps.

:class:`SequenceStore` belongs to one event loop and is not thread-safe. It holds no clock: callers pass the time in
(seconds, any origin, never going back).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from searchr1_async.local.backend import Float32Array, Int32Array, SampledSequence

logger = logging.getLogger(__name__)

DAY = 86400.0


def sequence_id(request_id: str, index: int) -> str:
    """The id of a request's sample number ``index``; request ids are unique in a process, so it is unique in its session."""
    return f"{request_id}:{index}"


@dataclass(frozen=True, slots=True)
class RecordedSequence:
    """One sampled sequence, as the service sampled it."""

    prompt: Int32Array
    """Shape [P]; one array for all samples of a request."""
    tokens: Int32Array
    """Shape [N], the stop token included."""
    logprobs: Float32Array
    """Shape [N]: of ``tokens`` under the weights that sampled them."""


@dataclass(slots=True)
class _Request:
    session_id: str
    sequences: tuple[RecordedSequence, ...]
    used_at: float

    @property
    def bytes(self) -> int:
        own = sum(sequence.tokens.nbytes + sequence.logprobs.nbytes for sequence in self.sequences)
        return own + self.sequences[0].prompt.nbytes


class SequenceStore:
    """Recorded sequences by id, request by request.

    A request's sequences are kept for ``life`` seconds after their last use (being sampled or trained on), until their
    session ends, or until the least recently used ones must go because all together exceed ``most_bytes``.
    """

    def __init__(self, *, life: float = DAY, most_bytes: int = 1 << 30) -> None:
        self.life = life
        self.most_bytes = most_bytes
        self.bytes = 0
        """Held now."""
        self._dropped = 0
        # In order of used_at, so that sweeping looks only at what goes.
        self._requests: OrderedDict[str, _Request] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(request.sequences) for request in self._requests.values())

    def record(
        self, session_id: str, request_id: str, prompt: Int32Array, sequences: Sequence[SampledSequence], now: float
    ) -> None:
        """Keeps the samples of one request; their ids are those of :func:`sequence_id`."""
        kept = tuple(RecordedSequence(prompt, each.tokens, each.logprobs) for each in sequences)
        request = self._requests[request_id] = _Request(session_id, kept, now)
        self.bytes += request.bytes
        before = self._dropped
        while self.bytes > self.most_bytes:
            self._dropped += len(self._forget(next(iter(self._requests))).sequences)
        if self._dropped and not before:
            logger.warning(
                "recorded sequences exceed %d MiB: the least recently used are dropped and cannot be trained on",
                self.most_bytes >> 20,
            )

    def use(self, session_id: str, ids: Iterable[str], now: float) -> dict[str, RecordedSequence]:
        """The sequences of a session by id, those that it has; each use renews them."""
        found: dict[str, RecordedSequence] = {}
        for id in ids:
            request_id, _, index = id.rpartition(":")
            request = self._requests.get(request_id)
            if request is None or request.session_id != session_id or now - request.used_at >= self.life:
                continue
            if index.isdecimal() and int(index) < len(request.sequences) and id == sequence_id(request_id, int(index)):
                found[id] = request.sequences[int(index)]
        for request_id in {id.rpartition(":")[0] for id in found}:
            self._requests[request_id].used_at = now
            self._requests.move_to_end(request_id)
        return found

    def why_missing(self) -> str:
        """What to tell a client whose sequence :meth:`use` did not find."""
        text = (
            "was not recorded: sample with record_stability_info=True in the same session, and train within "
            f"{self.life / 3600:g} hours of its last use"
        )
        if self._dropped:
            text += (
                f" (this service holds {self.most_bytes >> 20} MiB of sequences and has dropped {self._dropped} of "
                "the least recently used)"
            )
        return text

    def forget(self, session_id: str) -> None:
        """Forgets a session that has ended."""
        for id in [id for id, request in self._requests.items() if request.session_id == session_id]:
            self._forget(id)

    def sweep(self, now: float) -> None:
        """Forgets what has expired."""
        while self._requests:
            id, oldest = next(iter(self._requests.items()))
            if now - oldest.used_at < self.life:
                return
            self._forget(id)

    def _forget(self, request_id: str) -> _Request:
        request = self._requests.pop(request_id)
        self.bytes -= request.bytes
        return request
