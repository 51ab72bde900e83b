"""Provenance of training data: every token of a datum must have been prompted or sampled in a recorded sequence.

Sampling with ``record_stability_info`` records sequences in a :class:`SequenceStore`, which belongs to one event loop and is
not thread-safe; callers pass the time (monotonic seconds).

A ``stable_reinforce`` datum has two lists of spans (``tinker.types.Datum.with_provenance``), tiling its input and its
targets. A span claims that its tokens are a run of one recorded sequence's prompt or sampled tokens. :func:`check`
verifies every claim and inserts the recorded log-probabilities. Pure: no torch, clock or store.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.local.backend import Datum, Float32Array, Int32Array, SampledSequence, UserFault

logger = logging.getLogger(__name__)

DAY = 86400.0
LOGPROB_TOLERANCE = 1e-3
"""Maximum difference in nats between sent and recorded log-probabilities, to allow for rounding in files."""
_PADDING = 0
"""Clients may put this at targets that were not sampled."""


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


@dataclass(frozen=True, slots=True)
class Span:
    """Claims that tokens are positions ``offset`` to ``offset + length`` of a sequence's prompt or sampled tokens."""

    sampled: bool
    """False: tokens of the prompt."""
    sequence_id: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """The spans of one datum, in token order."""

    inputs: tuple[Span, ...]
    targets: tuple[Span, ...]

    def ids(self) -> Iterator[str]:
        """All sequence ids, with repetition."""
        return (span.sequence_id for span in (*self.inputs, *self.targets))


@dataclass(frozen=True, slots=True)
class _Known:
    """The recorded sequences that a request names, and the message for a missing one."""

    sequences: Mapping[str, RecordedSequence]
    why_missing: str


def check(
    data: Sequence[Datum], provenance: Sequence[Provenance], recorded: Mapping[str, RecordedSequence], why_missing: str
) -> tuple[Datum, ...]:
    """Verifies the spans; returns the data with recorded ``logprobs`` (0 where the target was not sampled).

    Args:
        data: with ``target_tokens`` and ``advantages``; ``logprobs`` are optional.
        provenance: per datum.
        recorded: the session's sequences by id.
        why_missing: completes "sequence 'x' …" for an id not in ``recorded``.

    Raises:
        UserFault: spans are missing, do not tile the input or targets, name an unrecorded sequence, exceed it or differ
            from its tokens; targets are not the input shifted by one (unsampled targets may be 0, clients' padding); a
            sampled target has a different context than when it was sampled; log-probabilities differ from the recorded
            ones; or an unsampled target has an advantage.
    """
    known = _Known(recorded, why_missing)
    return tuple(
        _check_datum(f"data[{index}]", datum, spans, known)
        for index, (datum, spans) in enumerate(zip(data, provenance, strict=True))
    )


def _check_datum(place: str, datum: Datum, spans: Provenance, known: _Known) -> Datum:
    if "target_tokens" not in datum.loss_inputs:
        raise UserFault(f"{place}: loss_fn 'stable_reinforce' needs loss_fn_inputs['target_tokens']")
    targets_T = datum.loss_inputs["target_tokens"]
    _check_claims(f"{place}.model_input_spans", "model_input", datum.tokens, spans.inputs, known, padding=None)
    _check_claims(f"{place}.loss_fn_input_spans", "target_tokens", targets_T, spans.targets, known, padding=_PADDING)
    is_padding_T = ~_sampled(spans.targets) & (targets_T == _PADDING)
    wrong = np.flatnonzero((datum.tokens[1:] != targets_T[:-1]) & ~is_padding_T[:-1])
    if len(wrong):
        at = int(wrong[0])
        raise UserFault(
            f"{place}: target_tokens[{at}] is {targets_T[at]}, but model_input[{at + 1}] is {datum.tokens[at + 1]}: "
            "position i of the input predicts token i + 1, so the targets must be the input shifted by one"
        )
    recorded_T, sampled_T = np.zeros(len(targets_T), np.float32), _sampled(spans.targets)
    start = 0
    for number, span in enumerate(spans.targets):
        stop = start + span.length
        if span.sampled and span.length:
            sequence = known.sequences[span.sequence_id]
            _check_context(f"{place}.loss_fn_input_spans[{number}]", datum.tokens[: start + 1], span, sequence)
            recorded_T[start:stop] = sequence.logprobs[span.offset : span.offset + span.length]
        start = stop
    _check_columns(place, datum, recorded_T, sampled_T)
    return replace(datum, loss_inputs={**datum.loss_inputs, "logprobs": recorded_T})


def _sampled(spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Mask of the sampled positions."""
    return np.repeat([span.sampled for span in spans], [span.length for span in spans]).astype(bool)


def _check_claims(
    place: str, field: str, tokens_T: NDArray[Any], spans: Sequence[Span], known: _Known, *, padding: int | None
) -> None:
    """Checks that the spans tile the field and match the recorded tokens; prompt tokens may be ``padding`` instead."""
    if not spans:
        raise UserFault(
            f"{place}: missing; loss_fn 'stable_reinforce' needs the provenance of every token: attach it with "
            "Datum.with_provenance"
        )
    total = sum(span.length for span in spans)
    if total != len(tokens_T) or any(span.length < 0 for span in spans):
        raise UserFault(
            f"{place}: the spans cover {total} positions, but {field} has {len(tokens_T)}: they must tile it exactly"
        )
    start = 0
    for number, span in enumerate(spans):
        sequence = known.sequences.get(span.sequence_id)
        if sequence is None:
            raise UserFault(f"{place}[{number}]: sequence {span.sequence_id!r:.200} {known.why_missing}")
        source, verb = (sequence.tokens, "sampled") if span.sampled else (sequence.prompt, "prompted")
        end = span.offset + span.length
        if span.offset < 0 or end > len(source):
            raise UserFault(
                f"{place}[{number}]: claims positions {span.offset} to {end} of the tokens {verb} in sequence "
                f"{span.sequence_id!r}, of which there are {len(source)}"
            )
        claimed_T = tokens_T[start : start + span.length]
        is_wrong_T = claimed_T != source[span.offset : end]
        if padding is not None and not span.sampled:
            is_wrong_T &= claimed_T != padding
        wrong = np.flatnonzero(is_wrong_T)
        if len(wrong):
            at = int(wrong[0])
            raise UserFault(
                f"{place}[{number}]: {field}[{start + at}] is {tokens_T[start + at]}, but token {span.offset + at} "
                f"{verb} in sequence {span.sequence_id!r} is {source[span.offset + at]}"
            )
        start += span.length


def _check_context(place: str, before_T: NDArray[Any], span: Span, sequence: RecordedSequence) -> None:
    """Checks that a sampled target follows the same tokens as when it was sampled, so its log-probability applies."""
    prompt = len(sequence.prompt)
    same = (
        len(before_T) == prompt + span.offset
        and np.array_equal(before_T[:prompt], sequence.prompt)
        and np.array_equal(before_T[prompt:], sequence.tokens[: span.offset])
    )
    if not same:
        raise UserFault(
            f"{place}: sampled token {span.offset} of sequence {span.sequence_id!r} follows {len(before_T)} tokens "
            f"that are not the {prompt + span.offset} it was sampled after (its prompt and earlier tokens)"
        )


def _check_columns(place: str, datum: Datum, recorded_T: Float32Array, sampled_T: NDArray[np.bool_]) -> None:
    given_T, advantages_T = datum.loss_inputs.get("logprobs"), datum.loss_inputs.get("advantages")
    if given_T is not None:
        wrong = np.flatnonzero(sampled_T & (np.abs(given_T - recorded_T) > LOGPROB_TOLERANCE))
        if len(wrong):
            at = int(wrong[0])
            raise UserFault(
                f"{place}: logprobs[{at}] is {given_T[at]:.6g}, but the token was sampled with {recorded_T[at]:.6g}: "
                "send the log-probabilities of the sampled sequence, or leave them out"
            )
    if advantages_T is not None:
        wrong = np.flatnonzero(~sampled_T & (advantages_T != 0))
        if len(wrong):
            at = int(wrong[0])
            raise UserFault(
                f"{place}: advantages[{at}] is {advantages_T[at]:g}, but the target there was not sampled: its "
                "advantage must be 0"
            )
