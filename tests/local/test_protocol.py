"""Encoding and decoding, against the SDK's own conversions."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from searchr1_async.local import protocol
from searchr1_async.local.backend import (
    AdamParams,
    ForwardBackwardResult,
    LoraConfig,
    SampledSequence,
    SampleResult,
    UserFault,
)
from searchr1_async.local.protocol import Body
from searchr1_async.local.provenance import Provenance, Span
from searchr1_async.local.replies import MalformedRequest
from tests.local.serving import datum

tokens = st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=20)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def fwdbwd_body(data: list[types.Datum], loss_fn: Any = "cross_entropy", config: Any = None, **more: Any) -> bytes:
    request = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(data=data, loss_fn=loss_fn, loss_fn_config=config),
        model_id="m",
        seq_id=1,
    )
    message = forward_backward_request_to_proto(request)
    for name, value in more.items():
        setattr(message, name, value)
    return message.SerializeToString()


@given(st.lists(tokens, min_size=1, max_size=4), st.data())
def test_training_data_arrives_as_the_sdk_sent_it(rows: list[list[int]], data: st.DataObject) -> None:
    weights = [data.draw(st.lists(floats, min_size=len(row) - 1, max_size=len(row) - 1)) for row in rows]
    sent = [datum(row, weights=column) for row, column in zip(rows, weights, strict=True)]
    message = protocol.parse_forward_backward(fwdbwd_body(sent, config={"clip_low_threshold": 0.5}))
    call = protocol.decode_forward_backward(message)
    assert call.loss_fn == "cross_entropy"
    assert call.loss_config == {"clip_low_threshold": 0.5}
    assert not call.forward_only
    for got, row, column in zip(call.data, rows, weights, strict=True):
        assert got.tokens.tolist() == row[:-1]
        assert got.loss_inputs["target_tokens"].dtype == np.int64
        assert got.loss_inputs["target_tokens"].tolist() == row[1:]
        assert got.loss_inputs["weights"].dtype == np.float32
        assert got.loss_inputs["weights"].tolist() == column


@given(
    st.lists(st.lists(floats, max_size=8), max_size=5), st.dictionaries(st.sampled_from(["loss:sum", "x:mean"]), floats)
)
def test_training_results_are_what_the_sdk_reads(rows: list[list[float]], metrics: dict[str, float]) -> None:
    arrays = tuple(np.array(row, np.float32) for row in rows)
    reply = protocol.encode_forward_backward(ForwardBackwardResult(arrays, metrics))
    output = deserialize_forward_backward_output(reply.body)
    assert output.metrics == metrics
    assert [result["logprobs"].tolist() for result in output.loss_fn_outputs] == rows


def sampled(length: int, k: int = 0) -> SampledSequence:
    ids = np.arange(length, dtype=np.int32)
    matrix = np.arange(length * k).reshape(length, k)
    topk = (matrix.astype(np.int32), -matrix.astype(np.float32)) if k else None
    return SampledSequence(ids, -ids.astype(np.float32), "stop" if length % 2 else "length", topk)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 3), st.booleans())
def test_samples_are_what_the_sdk_reads(lengths: list[int], k: int, with_prompt: bool) -> None:
    prompt = np.array([np.nan, -1.0, -2.0], np.float32) if with_prompt else None
    result = SampleResult(tuple(sampled(length, k) for length in lengths), prompt, None, 2)
    response = deserialize_sample_response(protocol.encode_sample(result).body)
    assert response.prompt_cache_hit_tokens == 2
    assert response.prompt_logprobs == ([None, -1.0, -2.0] if with_prompt else None)
    for got, sent in zip(response.sequences, result.sequences, strict=True):
        assert list(got.tokens) == sent.tokens.tolist()
        assert list(got.logprobs or []) == sent.logprobs.tolist()
        assert got.stop_reason == sent.stop_reason


def test_only_the_prompt_positions_asked_for_are_scored() -> None:
    ids = np.array([[0, 0], [5, 6], [7, 8]], np.int32)
    logprobs = np.array([[np.nan, np.nan], [-1, -2], [-3, -4]], np.float32)
    result = SampleResult((sampled(1),), np.array([np.nan, -1, -2], np.float32), (ids, logprobs))
    response = deserialize_sample_response(protocol.encode_sample(result, last_n=1).body)
    assert response.prompt_logprobs == [None, None, -2.0]
    assert response.topk_prompt_logprobs is not None
    assert not response.topk_prompt_logprobs[1]
    assert response.topk_prompt_logprobs[2] == [(7, -3.0), (8, -4.0)]


def tensor(values: np.ndarray[Any, Any], dtype: pb.DType.ValueType, shape: list[int] | None = None) -> pb.Tensor:
    return pb.Tensor(dense=values.tobytes(), dtype=dtype, shape=shape if shape is not None else list(values.shape))


def test_narrow_types_are_widened() -> None:
    small = protocol.decode_tensor(tensor(np.array([1, -2], np.int32), pb.DTYPE_INT32), "x")
    assert (small.dtype, small.tolist()) == (np.dtype(np.int64), [1, -2])
    upper_halves = (np.array([1.5, -0.25], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    brain = protocol.decode_tensor(tensor(upper_halves, pb.DTYPE_BFLOAT16), "x")
    assert (brain.dtype, brain.tolist()) == (np.dtype(np.float32), [1.5, -0.25])


def test_sparse_tensors_are_filled_with_zeros() -> None:
    def sparse(rows: list[int], columns: list[int], values: list[float]) -> pb.Tensor:
        return pb.Tensor(
            sparse_csr=pb.SparseCsr(
                values=np.array(values, np.float32).tobytes(),
                crow_indices=np.array(rows, np.int64).tobytes(),
                col_indices=np.array(columns, np.int64).tobytes(),
            ),
            dtype=pb.DTYPE_FLOAT32,
            shape=[2, 3],
        )

    assert protocol.decode_tensor(sparse([0, 1, 3], [2, 0, 1], [1, 2, 3]), "x").tolist() == [[0, 0, 1], [2, 3, 0]]
    for rows, columns in (([0, 1], [2, 0, 1]), ([0, 4, 3], [2, 0, 1]), ([0, 1, 3], [3, 0, 1]), ([1, 1, 3], [2, 0, 1])):
        with pytest.raises(UserFault):
            protocol.decode_tensor(sparse(rows, columns, [1, 2, 3]), "x")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (pb.Tensor(dense=b"123", dtype=pb.DTYPE_FLOAT32), "whole number"),
        (tensor(np.zeros(3, np.float32), pb.DTYPE_FLOAT32, [4]), "do not fill"),
        (tensor(np.array([np.nan], np.float32), pb.DTYPE_FLOAT32), "finite"),
        (pb.Tensor(dense=b"", dtype=9), "dtype"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_broken_tensors_are_named(broken: pb.Tensor, message: str) -> None:
    with pytest.raises(UserFault, match=message):
        protocol.decode_tensor(broken, "data[0]")


def test_spans_arrive_as_the_sdk_sent_them() -> None:
    spans = [
        tinker.PromptProvenanceSpan(sequence_id="a:0", offset=4, length=1),
        tinker.SampledProvenanceSpan(sequence_id="b:1", length=1),
    ]
    plain = datum([1, 2, 3], logprobs=[0.0, 0.0], advantages=[0.0, 1.0])
    sent = plain.with_provenance(model_input=spans, loss_fn_inputs=spans[::-1])
    call = protocol.decode_forward_backward(
        protocol.parse_forward_backward(fwdbwd_body([sent, plain], "stable_reinforce"))
    )
    expected = (Span(False, "a:0", 4, 1), Span(True, "b:1", 0, 1))
    assert call.provenance == (Provenance(expected, expected[::-1]), Provenance((), ()))


def test_an_empty_span_is_refused() -> None:
    message = protocol.parse_forward_backward(fwdbwd_body([datum([1, 2], weights=[1.0])]))
    message.data[0].loss_fn_input_spans.add()
    with pytest.raises(UserFault, match=r"data\[0\]\.loss_fn_input_spans\[0\]: a span must be of prompt_tokens or of"):
        protocol.decode_forward_backward(message)


def test_wrong_training_data_is_refused() -> None:
    def decode(body: bytes) -> None:
        protocol.decode_forward_backward(protocol.parse_forward_backward(body))

    with pytest.raises(UserFault, match="at least one datum"):
        decode(fwdbwd_body([]))
    with pytest.raises(UserFault, match="a number is required"):
        decode(fwdbwd_body([datum([1, 2], weights=[1.0])], config={"loss_id": "x"}))
    short = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"weights": types.TensorData(data=[1.0], dtype="float32", shape=[1])},
    )
    with pytest.raises(UserFault, match=r"data\[0\].*3 input tokens"):
        decode(fwdbwd_body([short]))
    with pytest.raises(UserFault, match="negative"):
        decode(fwdbwd_body([datum([-1, 2], weights=[1.0])]))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_malformed(body: bytes) -> None:
    with contextlib.suppress(MalformedRequest, UserFault):
        protocol.decode_forward_backward(protocol.parse_forward_backward(body))
    with contextlib.suppress(MalformedRequest):
        Body.parse(body)


def sample_fields(**changes: Any) -> dict[str, Any]:
    fields = {
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}, {"tokens": [3]}]},
        "sampling_params": {"max_tokens": 5, "temperature": 0, "top_k": 7, "top_p": 0.5, "seed": 11},
        "prompt_logprobs": True,
        "topk_sample_logprobs": 3,
    }
    return {**fields, **changes}


def test_a_sample_request_is_read_in_full() -> None:
    call = protocol.decode_sample(sample_fields(prompt_logprobs_last_n=2))
    assert call.prompt_logprobs_last_n == 2
    request = call.request
    assert request.prompt.tolist() == [1, 2, 3]
    assert (request.num_samples, request.max_tokens, request.temperature) == (2, 5, 0.0)
    assert (request.top_k, request.top_p, request.seed) == (7, 0.5, 11)
    assert (request.stop_tokens, request.stop_strings) == (None, ())
    assert request.prompt_logprobs
    assert (request.topk_prompt_logprobs, request.topk_sample_logprobs) == (0, 3)


@pytest.mark.parametrize(
    ("stop", "tokens", "strings"),
    [
        (None, None, ()),
        ([], (), ()),
        ([7, 8], (7, 8), ()),
        ("END", None, ("END",)),
        (["A", "B"], None, ("A", "B")),
    ],
)
def test_the_ways_to_stop(stop: Any, tokens: Any, strings: Any) -> None:
    request = protocol.decode_sample(sample_fields(sampling_params={"stop": stop})).request
    assert (request.stop_tokens, request.stop_strings) == (tokens, strings)
    assert (request.max_tokens, request.top_k) == (None, -1)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 5000}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"prompt": {"chunks": []}}, "prompt"),
        ({"prompt": {"chunks": [{"type": "image"}]}}, "prompt"),
        ({"prompt": {"chunks": [{"tokens": [-1]}]}}, "prompt"),
        ({"prompt": {"chunks": [{"tokens": [2**31]}]}}, "prompt"),
        ({"prompt": {"chunks": [{"tokens": [1.5]}]}}, "prompt"),
        ({"prompt": {"chunks": [{"tokens": [[1], [2, 3]]}]}}, "prompt"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"sampling_params": {"temperature": float("nan")}}, "temperature"),
        ({"sampling_params": {"top_p": 0}}, "top_p"),
        ({"sampling_params": {"stop": {"a": 1}}}, "stop"),
        ({"sampling_params": {"stop": ["a", 1]}}, "stop"),
        ({"sampling_params": []}, "sampling_params"),
        ({"target_prompt_logprobs": {"data": [1]}}, "target_prompt_logprobs"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs": False, "prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n"),
    ],
)
def test_wrong_sample_requests_name_the_field(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UserFault, match=name):
        protocol.decode_sample(sample_fields(**changes))


@given(st.dictionaries(st.sampled_from([*sample_fields(), "adam_params", "lora_config", "optimizer_params"]), anything))
def test_any_json_is_a_request_or_a_users_fault(fields: dict[str, Any]) -> None:
    for decode in (protocol.decode_sample, protocol.decode_adam, protocol.decode_lora):
        with contextlib.suppress(UserFault):
            decode(fields)


def test_optimizer_parameters() -> None:
    assert protocol.decode_adam({}) == AdamParams()
    given_params = {"learning_rate": 1, "beta1": 0.8, "grad_clip_norm": 2.5}
    assert protocol.decode_adam({"adam_params": given_params}) == AdamParams(1.0, 0.8, grad_clip_norm=2.5)
    with pytest.raises(UserFault, match="dimuon"):
        protocol.decode_adam({"optimizer_params": {"type": "dimuon"}})
    for wrong in ({"learning_rate": -1.0}, {"beta2": 1.0}, {"eps": "small"}, {"learning_rate": float("inf")}):
        with pytest.raises(UserFault, match=next(iter(wrong))):
            protocol.decode_adam({"adam_params": wrong})


def test_lora_configuration() -> None:
    assert protocol.decode_lora({}) == LoraConfig()
    config = {"rank": 4, "seed": 1, "train_mlp": False}
    assert protocol.decode_lora({"lora_config": config}) == LoraConfig(4, 1, train_mlp=False)
    nothing = {"train_mlp": False, "train_attn": False, "train_unembed": False}
    for wrong in ({"rank": 0}, {"rank": "8"}, nothing):
        with pytest.raises(UserFault):
            protocol.decode_lora({"lora_config": wrong})
    with pytest.raises(UserFault, match="adamw"):
        protocol.decode_lora({"optimizer_config": {"type": "dimuon"}})


def test_bodies_are_read_field_by_field() -> None:
    body = Body.parse(json.dumps({"id": "x", "n": 3, "zero": 0}).encode())
    assert (body.text("id"), body.number("n"), body.number("zero")) == ("x", 3, 0)
    assert body.optional_number("absent") is None
    for read in (lambda: body.text("n"), lambda: body.text("absent"), lambda: body.number("id")):
        with pytest.raises(MalformedRequest) as error:
            read()
        assert error.value.status == 422
    with pytest.raises(MalformedRequest) as error:
        Body.parse(b"{")
    assert error.value.status == 400


def test_metrics_that_json_cannot_hold_are_left_out() -> None:
    assert dict(protocol.finite_metrics({"a": 1, "b": float("nan"), "c": float("inf")})) == {"a": 1.0}
