"""Provenance of training data: every token of a datum is one that the service was given or sampled, at a named place.

A datum that ``stable_reinforce`` learns from carries two lists of spans (``tinker.types.Datum.with_provenance``): one
tiles its input, one its targets. A span claims that its run of tokens is a run of one recorded sequence's prompt or of its
sampled tokens. :func:`check` proves every claim against what was recorded, and puts the recorded log-probabilities
in. Pure: no torch, no clock, no store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchr1_async.local.backend import Datum, Float32Array, UserFault
from searchr1_async.local.sequences import RecordedSequence

LOGPROB_TOLERANCE = 1e-3
"""Nats by which a log-probability that the client sends may differ from the recorded one: files may round."""

_PADDING = 0
"""What stands at targets that were not sampled in the data of clients that do not care for them."""


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens, claimed to be positions ``offset`` to ``offset + length`` of a sequence's prompt or samples."""

    sampled: bool
    """False: of the prompt of the request that sampled the sequence."""
    sequence_id: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """The spans of one datum, in the order of the tokens that they tile."""

    inputs: tuple[Span, ...]
    targets: tuple[Span, ...]

    def ids(self) -> Iterator[str]:
        """The ids of all sequences named, with repetition."""
        return (span.sequence_id for span in (*self.inputs, *self.targets))


@dataclass(frozen=True, slots=True)
class _Known:
    """The recorded sequences that a request names, and what to say of one that is not among them."""

    sequences: Mapping[str, RecordedSequence]
    why_missing: str


def check(
    data: Sequence[Datum], provenance: Sequence[Provenance], recorded: Mapping[str, RecordedSequence], why_missing: str
) -> tuple[Datum, ...]:
    """The data with ``logprobs`` as recorded (0 where the target was not sampled).

    Args:
        data: with ``target_tokens`` and ``advantages``; ``logprobs`` may be left out.
        provenance: of each datum.
        recorded: the sequences of the session that the spans name, by id.
        why_missing: completes "sequence 'x' …" for an id that is not in ``recorded``.

    Raises:
        UserFault: a datum without spans; spans that do not tile its input or its targets; a sequence that is not recorded; a span
            beyond what was prompted or sampled; tokens that differ from it; targets that are not the input shifted by
            one (a target that was not sampled may be 0 instead: clients pad with it, and nothing is learnt from it); a sampled target after other tokens than it was sampled after; log-probabilities that are not the
            recorded ones; an advantage at a target that was not sampled.
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
    """Which positions of a field were sampled."""
    return np.repeat([span.sampled for span in spans], [span.length for span in spans]).astype(bool)


def _check_claims(
    place: str, field: str, tokens_T: NDArray[Any], spans: Sequence[Span], known: _Known, *, padding: int | None
) -> None:
    """Every span names tokens that were prompted or sampled, and together they tile the field.

    Prompted ones may be ``padding`` instead.
    """
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
                f"{span.sequence_id!r}, which are {len(source)}"
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
    """What stands before a sampled target is what it was sampled after: else its log-probability is of another text."""
    prompt = len(sequence.prompt)
    same = (
        len(before_T) == prompt + span.offset
        and np.array_equal(before_T[:prompt], sequence.prompt)
        and np.array_equal(before_T[prompt:], sequence.tokens[: span.offset])
    )
    if not same:
        raise UserFault(
            f"{place}: sampled token {span.offset} of sequence {span.sequence_id!r} stands after {len(before_T)} tokens "
            f"that are not the {prompt + span.offset} that it was sampled after (its prompt and its earlier tokens)"
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
