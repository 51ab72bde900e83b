"""Sampled sequences recorded for training (``record_stability_info``).

:class:`SequenceStore` belongs to one event loop and is not thread-safe. Callers pass the time (monotonic seconds).
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
    """The id of a request's sample ``index``, unique within the process."""
    return f"{request_id}:{index}"


@dataclass(frozen=True, slots=True)
class RecordedSequence:
    prompt: Int32Array
    """Shape [P], shared by all samples of a request."""
    tokens: Int32Array
    """Shape [N], including the stop token."""
    logprobs: Float32Array
    """Shape [N], under the weights that sampled ``tokens``."""


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
    """Recorded sequences by request.

    A request's sequences are dropped ``life`` seconds after their last use (sampling or training), when their session
    ends, or as least recently used when the store exceeds ``most_bytes``.
    """

    def __init__(self, *, life: float = DAY, most_bytes: int = 1 << 30) -> None:
        self.life = life
        self.most_bytes = most_bytes
        self.bytes = 0
        self._dropped = 0
        # Ordered by used_at, so that sweep stops early.
        self._requests: OrderedDict[str, _Request] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(request.sequences) for request in self._requests.values())

    def record(
        self, session_id: str, request_id: str, prompt: Int32Array, sequences: Sequence[SampledSequence], now: float
    ) -> None:
        """Records the samples of one request, under their :func:`sequence_id`."""
        kept = tuple(RecordedSequence(prompt, each.tokens, each.logprobs) for each in sequences)
        request = self._requests[request_id] = _Request(session_id, kept, now)
        self.bytes += request.bytes
        before = self._dropped
        while self.bytes > self.most_bytes:
            self._dropped += len(self._forget(next(iter(self._requests))).sequences)
        if self._dropped and not before:
            logger.warning(
                "recorded sequences exceed %d MiB: dropping the least recently used, which can no longer be trained on",
                self.most_bytes >> 20,
            )

    def use(self, session_id: str, ids: Iterable[str], now: float) -> dict[str, RecordedSequence]:
        """The session's sequences among ``ids``; marks them as used."""
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
        """Completes the error message for a sequence that :meth:`use` did not find."""
        text = (
            "was not recorded: sample with record_stability_info=True in the same session, and train within "
            f"{self.life / 3600:g} hours of its last use"
        )
        if self._dropped:
            text += (
                f" (this service keeps at most {self.most_bytes >> 20} MiB of sequences and has dropped {self._dropped} of "
                "the least recently used)"
            )
        return text

    def forget(self, session_id: str) -> None:
        for id in [id for id, request in self._requests.items() if request.session_id == session_id]:
            self._forget(id)

    def sweep(self, now: float) -> None:
        while self._requests:
            id, oldest = next(iter(self._requests.items()))
            if now - oldest.used_at < self.life:
                return
            self._forget(id)

    def _forget(self, request_id: str) -> _Request:
        request = self._requests.pop(request_id)
        self.bytes -= request.bytes
        return request
