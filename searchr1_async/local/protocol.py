"""Conversion between wire messages and :mod:`searchr1_async.local.backend`'s types. Pure functions.

:class:`~searchr1_async.local.replies.MalformedRequest`: a body cannot be parsed; it is answered with 400 or 422 immediately.
:class:`~searchr1_async.local.backend.UserFault` means a well-formed but invalid request; it is accepted and fails in its
future, so that a model's request sequence has no gap.

Protobuf messages are those of ``tinker.proto.tinker_public_pb2``; their arrays are little-endian.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from aiohttp import web
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from searchr1_async.local.backend import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackwardResult,
    Int32Array,
    LoraConfig,
    SampleRequest,
    SampleResult,
    UserFault,
)
from searchr1_async.local.compat import tinker_messages
from searchr1_async.local.provenance import Provenance, Span
from searchr1_async.local.replies import MalformedRequest, Reply

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as pb
else:
    pb = tinker_messages()

PROTOBUF = "application/x-protobuf"
EMPTY_LOGPROB = -99999.0
"""Fills empty cells of a top-k matrix, with token 0 (``tinker.types.topk_logprobs``)."""

_NUMPY_OF_DTYPE: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON request body."""

    fields: Mapping[str, Any]

    @classmethod
    def parse(cls, body: bytes) -> Body:
        """Raises :class:`MalformedRequest` for anything but a JSON object."""
        try:
            fields = json.loads(body or b"{}")
        except (ValueError, RecursionError) as error:
            raise MalformedRequest(f"the body is not JSON: {error}", status=400) from None
        if not isinstance(fields, dict):
            raise MalformedRequest(f"the body must be a JSON object, not {type(fields).__name__}")
        return cls(fields)

    def text(self, name: str) -> str:
        """Raises :class:`MalformedRequest` unless the field is a non-empty string."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value:
            raise MalformedRequest(f"{name}: a string is required")
        return value

    def object(self, name: str) -> Body:
        """Raises :class:`MalformedRequest` unless the field is an object."""
        value = self.fields.get(name)
        if not isinstance(value, dict):
            raise MalformedRequest(f"{name}: an object is required")
        return Body(value)

    def number(self, name: str) -> int:
        """Raises :class:`MalformedRequest` unless the field is an integer >= 0."""
        value = self.optional_number(name)
        if value is None:
            raise MalformedRequest(f"{name}: an integer is required")
        return value

    def optional_number(self, name: str) -> int | None:
        """Raises :class:`MalformedRequest` unless the field is absent, null, or an integer >= 0."""
        value = self.fields.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise MalformedRequest(f"{name}: an integer of at least 0 is required, not {value!r}")
        return value


async def body_of(request: web.Request) -> Body:
    """Raises :class:`MalformedRequest` for anything but a JSON object."""
    return Body.parse(await request.read())


def optional(fields: Mapping[str, Any], name: str, kind: type[_Value], default: _Value) -> _Value:
    """A field of an accepted request. Raises :class:`UserFault` if its type is wrong."""
    value: Any = fields.get(name)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserFault(f"{name}: expected {kind.__name__}, got {value!r:.80}")
    if kind is float and not math.isfinite(value):  # pyright: ignore[reportArgumentType]
        raise UserFault(f"{name}: must be finite, got {value}")
    return value


def decode_lora(fields: Mapping[str, Any]) -> LoraConfig:
    """``create_model``'s ``lora_config``. Raises :class:`UserFault`."""
    lora = optional(fields, "lora_config", dict, {})
    check_optimizer(fields)
    optional(lora, "seed", int, 0)  # None by default, so that its type is checked here
    return LoraConfig(**_read(LoraConfig(), lora))


def _read(defaults: LoraConfig | AdamParams, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields: those given, which must have the default's type, and its defaults."""
    return {
        name: fields.get(name) if default is None else optional(fields, name, type(default), default)
        for name, default in asdict(defaults).items()
    }


def check_optimizer(fields: Mapping[str, Any]) -> None:
    """Raises :class:`UserFault` for an ``optimizer_config`` other than AdamW."""
    kind = optional(fields, "optimizer_config", dict, {}).get("type", "adamw")
    if kind != "adamw":
        raise UserFault(f"optimizer_config: the embedded service supports only adamw, not {kind!r}")


def decode_adam(fields: Mapping[str, Any]) -> AdamParams:
    """``optim_step``'s parameters. Raises :class:`UserFault`."""
    other = fields.get("optimizer_params") or fields.get("optim_params") or {}
    kind = other.get("type", "adamw") if isinstance(other, dict) else other
    if kind not in ("adam", "adamw"):
        raise UserFault(f"optimizer_params: the embedded service supports only adamw, not {kind!r}")
    return AdamParams(**_read(AdamParams(), optional(fields, "adam_params", dict, other)))


@dataclass(frozen=True, slots=True)
class SampleCall:
    """An ``asample``, decoded."""

    request: SampleRequest
    prompt_logprobs_last_n: int | None
    """Return only this many trailing prompt positions."""
    record: bool = False
    """Whether to record its sequences for training (``record_stability_info``)."""


def decode_sample(fields: Mapping[str, Any]) -> SampleCall:
    """Raises :class:`UserFault`."""
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k"):
        if fields.get(name):
            raise UserFault(f"{name}: not supported by the embedded service")
    params = optional(fields, "sampling_params", dict, {})
    stop_tokens, stop_strings = _decode_stop(params.get("stop"))
    prompt = decode_prompt(optional(fields, "prompt", dict, {}))
    max_tokens, seed = params.get("max_tokens"), params.get("seed")
    last_n = fields.get("prompt_logprobs_last_n")
    wants_logprobs = optional(fields, "prompt_logprobs", bool, False)
    if last_n is not None and not (wants_logprobs and optional(fields, "prompt_logprobs_last_n", int, 0) >= 1):
        raise UserFault("prompt_logprobs_last_n: must be at least 1, and prompt_logprobs true")
    request = SampleRequest(
        prompt=prompt,
        num_samples=optional(fields, "num_samples", int, 1),
        max_tokens=None if max_tokens is None else optional(params, "max_tokens", int, 1),
        temperature=optional(params, "temperature", float, 1.0),
        # Some clients send 0 for "all tokens", as transformers does.
        top_k=optional(params, "top_k", int, -1) or -1,
        top_p=optional(params, "top_p", float, 1.0),
        seed=None if seed is None else optional(params, "seed", int, 0),
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        prompt_logprobs=wants_logprobs,
        topk_prompt_logprobs=optional(fields, "topk_prompt_logprobs", int, 0),
        topk_sample_logprobs=optional(fields, "topk_sample_logprobs", int, 0),
    )
    return SampleCall(request, last_n, optional(fields, "record_stability_info", bool, False))


def _decode_stop(stop: Any) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Absent: the model's end tokens. ``[]``: never stop. A string, strings or token ids: only those."""
    if stop is None:
        return None, ()
    items: Any = [stop] if isinstance(stop, str) else stop
    if isinstance(items, list):
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return tuple(items), ()
        if all(isinstance(item, str) and item for item in items):
            return None, tuple(items)
    raise UserFault("stop: expected a string, a list of strings or a list of token ids")


def decode_prompt(model_input: Mapping[str, Any]) -> Int32Array:
    """JSON ``ModelInput``, text chunks only. Shape [P]. Raises :class:`UserFault`."""
    parts: list[Int32Array] = []
    for chunk in optional(model_input, "chunks", list, []):
        if not isinstance(chunk, dict) or chunk.get("type", "encoded_text") != "encoded_text":
            kind = chunk.get("type") if isinstance(chunk, dict) else chunk
            raise UserFault(f"prompt: the embedded service takes text chunks only, not {kind!r:.80}")
        parts.append(_tokens(optional(chunk, "tokens", list, []), "prompt"))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _tokens(values: Any, name: str) -> Int32Array:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray([None])
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserFault(f"{name}: token ids must be a flat list of integers")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise UserFault(f"{name}: token ids must lie between 0 and 2**31 - 1")
    return array.astype(np.int32)


@dataclass(frozen=True, slots=True)
class ForwardBackwardCall:
    """A ``forward_backward``, decoded."""

    data: tuple[Datum, ...]
    provenance: tuple[Provenance, ...]
    """Spans per datum; empty if it has none."""
    loss_fn: str
    loss_config: Mapping[str, float]
    forward_only: bool


def parse_forward_backward(body: bytes) -> pb.ForwardBackwardRequest:
    """Raises :class:`MalformedRequest`."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise MalformedRequest(f"the body is not a ForwardBackwardRequest: {error}", status=400) from None
    if not message.model_id:
        raise MalformedRequest("model_id: a string is required")
    if message.seq_id < 0:
        raise MalformedRequest(f"seq_id: an integer of at least 0 is required, not {message.seq_id}")
    return message


def decode_forward_backward(message: pb.ForwardBackwardRequest) -> ForwardBackwardCall:
    """Raises :class:`UserFault`."""
    if not message.data:
        raise UserFault("data: at least one datum is required")
    config = {name: float(value) for name, value in message.loss_fn_config.items()}
    for name, value in message.loss_fn_config_v2.items():
        if value.HasField("text"):
            raise UserFault(f"loss_fn_config.{name}: a number is required, not {value.text!r:.80}")
        config[name] = float(value.number)
    data = tuple(_decode_datum(datum, index) for index, datum in enumerate(message.data))
    provenance = tuple(
        Provenance(
            _decode_spans(datum.model_input_spans, f"data[{index}].model_input_spans"),
            _decode_spans(datum.loss_fn_input_spans, f"data[{index}].loss_fn_input_spans"),
        )
        for index, datum in enumerate(message.data)
    )
    return ForwardBackwardCall(data, provenance, message.loss_fn, config, message.forward_only)


def _decode_spans(spans: Iterable[pb.ProvenanceSpan], place: str) -> tuple[Span, ...]:
    decoded: list[Span] = []
    for number, span in enumerate(spans):
        kind = span.WhichOneof("span")
        if kind is None:
            raise UserFault(f"{place}[{number}]: a span must be of prompt_tokens or of sampled_tokens")
        run = span.sampled_tokens if kind == "sampled_tokens" else span.prompt_tokens
        decoded.append(Span(kind == "sampled_tokens", run.sequence_id, run.offset, run.length))
    return tuple(decoded)


def _decode_datum(datum: pb.Datum, index: int) -> Datum:
    parts: list[NDArray[Any]] = []
    for chunk in datum.model_input:
        if not chunk.HasField("encoded_text"):
            raise UserFault(f"data[{index}].model_input: the embedded service takes text chunks only")
        parts.append(_from_bytes(chunk.encoded_text.tokens, np.dtype("<i4"), f"data[{index}].model_input"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if tokens.size == 0:
        raise UserFault(f"data[{index}].model_input: at least one token is required")
    if tokens.min() < 0:
        raise UserFault(f"data[{index}].model_input: token ids must not be negative")
    inputs: dict[str, NDArray[Any]] = {}
    for name, tensor in datum.loss_fn_inputs.items():
        place = f"data[{index}].loss_fn_inputs[{name!r}]"
        array = decode_tensor(tensor, place)
        if array.shape != tokens.shape:
            raise UserFault(f"{place}: shape {list(array.shape)} does not match the {tokens.size} input tokens")
        inputs[name] = array
    return Datum(tokens, inputs)


def decode_tensor(tensor: pb.Tensor, place: str) -> NDArray[Any]:
    """Decodes a dense or sparse (CSR) tensor, widened to int64 or float32 as in Tinker. Raises :class:`UserFault`."""
    dtype = _NUMPY_OF_DTYPE.get(tensor.dtype)
    if dtype is None:
        raise UserFault(f"{place}: unknown dtype {tensor.dtype}")
    sparse = tensor.HasField("sparse_csr")
    flat = _from_bytes(tensor.sparse_csr.values if sparse else tensor.dense, dtype, place)
    if tensor.dtype == pb.DTYPE_BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    flat = flat.astype(np.int64 if flat.dtype.kind == "i" else np.float32, copy=False)
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise UserFault(f"{place}: every value must be finite")
    shape = tuple(tensor.shape)
    if sparse:
        return _densify(tensor.sparse_csr, flat, shape, place)
    if not shape:
        return flat
    if math.prod(shape) != flat.size or min(shape) < 0:
        raise UserFault(f"{place}: {flat.size} values do not fill the shape {list(shape)}")
    return flat.reshape(shape)


def _densify(csr: pb.SparseCsr, values: NDArray[Any], shape: tuple[int, ...], place: str) -> NDArray[Any]:
    rows = _from_bytes(csr.crow_indices, np.dtype("<i8"), place)
    columns = _from_bytes(csr.col_indices, np.dtype("<i8"), place)
    if len(shape) != 2 or rows.size != shape[0] + 1 or columns.size != values.size or (np.diff(rows) < 0).any():
        raise UserFault(f"{place}: the sparse tensor's indices do not fit its shape {list(shape)}")
    if rows[0] != 0 or rows[-1] != values.size or ((columns < 0) | (columns >= shape[1])).any():
        raise UserFault(f"{place}: the sparse tensor's indices are out of range")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
    return dense


def _from_bytes(data: bytes, dtype: np.dtype[Any], place: str) -> NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise UserFault(f"{place}: {len(data)} bytes is not a whole number of {dtype.name} values")
    return np.frombuffer(data, dtype)


def encode_sample(result: SampleResult, last_n: int | None = None) -> Reply:
    """A ``SampleResponse``. ``last_n`` blanks all earlier prompt positions, as the client expects."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        sampled = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stop_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=_bytes(sequence.tokens, "<i4"),
            logprobs=_bytes(sequence.logprobs, "<f4"),
        )
        if sequence.topk is not None:
            sampled.topk_sampled_logprobs.CopyFrom(_encode_topk(*sequence.topk))
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = _bytes(_blank(result.prompt_logprobs, last_n, np.nan), "<f4")
    if result.topk_prompt is not None:
        ids, logprobs = result.topk_prompt
        message.topk_prompt_logprobs.CopyFrom(_encode_topk(_blank(ids, last_n, 0), _blank(logprobs, last_n, np.nan)))
    return Reply(message.SerializeToString(), PROTOBUF)


def _blank(array: NDArray[Any], last_n: int | None, value: float) -> NDArray[Any]:
    if last_n is None or last_n >= len(array):
        return array
    array = array.copy()
    array[: len(array) - last_n] = value
    return array


def _encode_topk(ids: Int32Array, logprobs: Float32Array) -> pb.TopkLogprobs:
    length, k = ids.shape
    logprobs = np.where(np.isnan(logprobs), np.float32(EMPTY_LOGPROB), logprobs)
    return pb.TopkLogprobs(token_ids=_bytes(ids, "<i4"), logprobs=_bytes(logprobs, "<f4"), k=k, length=length)


def encode_forward_backward(result: ForwardBackwardResult) -> Reply:
    """A ``ForwardBackwardOutput`` with one record: field ``logprobs``, all datums concatenated."""
    offsets = np.zeros(len(result.logprobs) + 1, np.int64)
    np.cumsum([4 * len(row) for row in result.logprobs], out=offsets[1:])
    flat = np.concatenate(result.logprobs) if result.logprobs else np.zeros(0, np.float32)
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=dict(result.metrics))
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(result.logprobs))
    record.fields["logprobs"].CopyFrom(
        pb.BatchedTensor(data=_bytes(flat, "<f4"), offsets=_bytes(offsets, "<i8"), dtype=pb.DTYPE_FLOAT32)
    )
    return Reply(message.SerializeToString(), PROTOBUF)


def _bytes(array: NDArray[Any], dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Drops NaN and infinite metrics, which JSON cannot represent."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
