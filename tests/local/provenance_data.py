"""Episodes as training data: sampled turns, the text appended between them, and their spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinker import PromptProvenanceSpan, SampledProvenanceSpan, types

AnySpan = PromptProvenanceSpan | SampledProvenanceSpan


@dataclass(frozen=True)
class SampledTurn:
    """One sampled sequence; its prompt is all preceding text."""

    sequence_id: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def spans_of(turns: Sequence[SampledTurn]) -> list[AnySpan]:
    """Spans that tile an episode's text."""
    spans: list[AnySpan] = []
    done = 0
    for turn in turns:
        appended = len(turn.prompt) - done
        if appended:
            spans.append(PromptProvenanceSpan(sequence_id=turn.sequence_id, offset=done, length=appended))
        if turn.tokens:
            spans.append(SampledProvenanceSpan(sequence_id=turn.sequence_id, length=len(turn.tokens)))
        done = len(turn.prompt) + len(turn.tokens)
    return spans


def without_first(spans: Sequence[AnySpan]) -> list[AnySpan]:
    first = spans[0]
    shorter = type(first)(sequence_id=first.sequence_id, offset=first.offset + 1, length=first.length - 1)
    return [*([shorter] if shorter.length else []), *spans[1:]]


def without_last(spans: Sequence[AnySpan]) -> list[AnySpan]:
    last = spans[-1]
    shorter = type(last)(sequence_id=last.sequence_id, offset=last.offset, length=last.length - 1)
    return [*spans[:-1], *([shorter] if shorter.length else [])]


def columns_of(turns: Sequence[SampledTurn], advantage: float) -> dict[str, np.ndarray[Any, Any]]:
    """An episode's loss inputs as a client sends them, zero at unsampled targets."""
    last = turns[-1]
    text = [*last.prompt, *last.tokens]
    logprobs, advantages = np.zeros(len(text), np.float32), np.zeros(len(text), np.float32)
    for turn in turns:
        place = slice(len(turn.prompt), len(turn.prompt) + len(turn.tokens))
        logprobs[place], advantages[place] = turn.logprobs, advantage
    targets = np.array(text[1:], np.int64)
    return {"target_tokens": targets, "logprobs": logprobs[1:], "advantages": advantages[1:]}


def datum_of(turns: Sequence[SampledTurn], advantage: float = 1.0) -> types.Datum:
    """An episode with its provenance."""
    last, spans = turns[-1], spans_of(turns)
    text = [*last.prompt, *last.tokens]
    columns = {name: types.TensorData.from_numpy(values) for name, values in columns_of(turns, advantage).items()}
    datum = types.Datum(model_input=types.ModelInput.from_ints(text[:-1]), loss_fn_inputs=columns)
    return datum.with_provenance(model_input=without_last(spans), loss_fn_inputs=without_first(spans))
