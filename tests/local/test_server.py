"""The service over plain HTTP: ordering, idempotency, errors and limits."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from searchr1_async.errors import ConfigurationError
from searchr1_async.local.checkpoint_files import CheckpointStore
from searchr1_async.local.process import Latency
from searchr1_async.local.scripted_backend import ScriptedBackend
from searchr1_async.local.server import serve
from tests.local.serving import KEY, Raw, Served, datum, raw, sample_fields, service_thread, successors, until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with service_thread(tmp_path_factory.mktemp("service"), gap_patience=0.4, poll=2.0) as service:
        yield service


def training_body(model: str, seq_id: int, weight: float = 1.0, loss_fn: Any = "cross_entropy") -> bytes:
    data = [datum([1, 2, 3], weights=[weight, weight])]
    request = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(data=data, loss_fn=loss_fn), model_id=model, seq_id=seq_id
    )
    return forward_backward_request_to_proto(request).SerializeToString()


async def has(fact: bool) -> bool:
    return fact


async def answers(client: Raw, path: str, fields: Any, status: int) -> bool:
    return (await client.ask(path, fields))[0] == status


async def step(client: Raw, model: str, seq_id: int | None, **adam: float) -> dict[str, Any]:
    return await client.ok("optim_step", {"model_id": model, "seq_id": seq_id, "adam_params": adam})


# -- access and routes ------------------------------------------------------------------------------------------------


async def test_the_api_key_is_required(served: Served) -> None:
    for key in (None, "", "tml-wrong", KEY + "x", "tml-\u00e9"):
        async with raw(served.url, key) as stranger:
            status, answer = await stranger.ask("create_session", {})
            assert status == 401
            assert "key" in answer["detail"]
            assert KEY not in answer["detail"]
            assert (await stranger.ask("unknown"))[0] == 401
            assert await stranger.ask("healthz", method="GET") == (200, {"status": "ok"})


async def test_unknown_paths_and_methods_are_json(client: Raw) -> None:
    for path, method, status in (("unknown", "GET", 404), ("unload_model", "POST", 404), ("asample", "GET", 405)):
        got, answer = await client.ask(path, method=method)
        assert got == status
        assert f"does not support {method} /api/v1/{path}" in answer["detail"]
    assert (await client.ask("healthz", method="HEAD"))[0] == 200


async def test_malformed_bodies(client: Raw) -> None:
    session = await client.session()
    for path in ("create_session", "create_model", "asample", "optim_step", "retrieve_future", "get_info"):
        for body, statuses in ((b"{", (400,)), (b"[]", (422,)), (b"\xff", (400,)), (b'"x"', (422,))):
            status, answer = await client.ask(path, body=body)
            assert status in statuses, (path, body)
            assert answer["detail"]
    assert (await client.ask("create_model", {"session_id": session}))[0] == 422
    assert (await client.ask("create_model", {"session_id": session, "model_seq_id": -1}))[0] == 422
    assert (await client.ask("retrieve_futures", {"target": "x"}))[0] == 422
    assert (await client.ask("forward_backward", body=b"\xff\xff"))[0] == 400
    assert (await client.ask("forward_backward", body=b""))[0] == 422


async def test_unknown_ids_are_not_found(client: Raw) -> None:
    for path, fields in (
        ("session_heartbeat", {"session_id": "x"}),
        ("sessions/x/finish", {}),
        ("create_model", {"session_id": "x", "model_seq_id": 0}),
        ("get_info", {"model_id": "x"}),
        ("optim_step", {"model_id": "x", "seq_id": 1}),
        ("asample", {"sampling_session_id": "x"}),
        ("retrieve_future", {"request_id": "x"}),
        ("retrieve_futures", {"target": {"sampling_session_id": "x"}}),
        ("cancel_future", {"request_id": "x"}),
        ("weights_info", {"tinker_path": "tinker://run/weights/none"}),
    ):
        status, answer = await client.ask(path, fields)
        assert status == 404, path
        assert answer["detail"]


async def test_it_only_serves_loopback(tmp_path: Path) -> None:
    backend = ScriptedBackend(successors)
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        with pytest.raises(ConfigurationError, match="loopback"):
            async with serve(backend, checkpoints=CheckpointStore(tmp_path), api_key=KEY, listener=listener):
                pass
    backend.close()


async def test_capabilities(client: Raw) -> None:
    answer = await client.ok("get_server_capabilities", method="GET")
    (model,) = answer["supported_models"]
    assert model["model_name"] == "scripted"
    assert (await client.ok("client/dynamic_config"))["sample_cancel_enabled"]
    assert await client.ok("telemetry", {"events": []}) == {"status": "accepted"}


# -- ordering and idempotency -----------------------------------------------------------------------------------------


async def test_requests_run_in_the_order_of_their_numbers(client: Raw) -> None:
    """Requests in order and the same requests shuffled give the same model."""
    session = await client.session()
    losses = []
    for number, order in enumerate((range(1, 9), random.Random(0).sample(range(1, 9), 8))):
        model = await client.model(session, number)

        async def submit(seq_id: int, model: str = model) -> dict[str, Any]:
            if seq_id % 2:
                return await client.ok("forward_backward", body=training_body(model, seq_id, weight=seq_id))
            return await step(client, model, seq_id, learning_rate=0.1 * seq_id)

        futures = [await submit(seq_id) for seq_id in order]
        for future in futures:
            assert "error" not in str(await client.result(future))
        last = await client.result(await client.ok("forward_backward", body=training_body(model, 9)))
        losses.append(deserialize_forward_backward_output(last).metrics["loss:sum"])
    assert losses[0] == losses[1]


async def test_a_repeated_number_is_the_same_request(client: Raw) -> None:
    model = await client.model(await client.session())
    bodies = [training_body(model, 1)] * 3
    futures = [await client.ok("forward_backward", body=body) for body in bodies]
    assert len({future["request_id"] for future in futures}) == 1
    steps = [await step(client, model, 2, learning_rate=0.1) for _ in range(2)]
    assert steps[0] == steps[1]
    once = await client.result(steps[0])
    twin = await client.model(await client.session())
    await client.ok("forward_backward", body=training_body(twin, 1))
    assert await client.result(await step(client, twin, 2, learning_rate=0.1)) == once


async def test_creating_twice_is_creating_once(client: Raw) -> None:
    session = await client.session()
    fields = {"session_id": session, "model_seq_id": 3, "base_model": "scripted"}
    futures = [await client.ok("create_model", fields) for _ in range(2)]
    assert futures[0] == futures[1]
    assert await client.sampler(session, 5) == await client.sampler(session, 5) == f"{session}:sample:5"


async def test_a_repeated_sample_is_the_same_sample(client: Raw) -> None:
    sampler = await client.sampler(await client.session())
    first = await client.ok("asample", sample_fields(sampler, 4))
    assert await client.ok("asample", sample_fields(sampler, 4)) == first
    assert (await client.ok("asample", sample_fields(sampler, 5)))["request_id"] != first["request_id"]
    assert await client.result(first) == await client.result(first), "results survive repeated polls"


async def test_a_missing_request_fails_those_after_it(client: Raw) -> None:
    model = await client.model(await client.session())
    waiting = [await step(client, model, seq_id) for seq_id in (2, 4)]
    for future in waiting:
        answer = await client.result(future)
        assert answer["category"] == "user"
        assert f"request 1 of model {model} did not arrive" in answer["error"]
    late = await client.result(await step(client, model, 1))
    assert "already submitted" in late["error"]
    assert "metrics" in await client.result(await step(client, model, 5))


async def test_requests_without_numbers_run_in_arrival_order(client: Raw) -> None:
    model = await client.model(await client.session())
    for _ in range(2):
        assert "metrics" in await client.result(await step(client, model, None))


# -- invalid requests -------------------------------------------------------------------------------------------------


async def test_invalid_requests_fail_in_their_future_and_leave_no_gap(client: Raw) -> None:
    model = await client.model(await client.session())
    wrong = [
        await client.ok("forward_backward", body=training_body(model, 1, loss_fn="dro")),
        await step(client, model, 2, learning_rate=-1.0),
        await client.ok("save_weights", {"model_id": model, "seq_id": 3, "path": "../up"}),
        await client.ok("save_weights", {"model_id": model, "seq_id": 4, "path": "a", "ttl_seconds": 0}),
        await client.ok(
            "load_weights", {"model_id": model, "seq_id": 5, "path": "tinker://x/weights/y", "optimizer": True}
        ),
        await client.ok("save_weights_external", {"model_id": model, "seq_id": 6, "path": ".."}),
        await client.ok(
            "save_weights_for_sampler",
            {"model_id": model, "seq_id": 7, "sampling_session_seq_id": 0, "kind": "other"},
        ),
    ]
    for future in wrong:
        answer = await client.result(future)
        assert answer["category"] == "user"
        assert answer["error"]
    assert "metrics" in await client.result(await step(client, model, 8))


async def test_only_the_samples_of_a_session_are_recorded(client: Raw) -> None:
    sampler = await client.sampler(await client.session())
    fields = {**sample_fields(sampler), "record_stability_info": True}
    future = await client.ok("asample", {**fields, "num_samples": 3})
    assert len(set(future["sample_sequence_ids"])) == 3
    assert len(deserialize_sample_response(await client.result(future)).sequences) == 3
    del fields["sampling_session_id"]
    answer = await client.result(await client.ok("asample", {**fields, "base_model": "scripted"}))
    assert answer["category"] == "user"
    assert "sample through a sampling session" in answer["error"]


async def test_wrong_models_fail_in_their_future(client: Raw) -> None:
    session = await client.session()
    for number, more in enumerate(
        ({"base_model": "other"}, {"lora_config": {"rank": 0}}, {"optimizer_config": {"type": "x"}})
    ):
        fields = {"session_id": session, "model_seq_id": number, "base_model": "scripted", **more}
        future = await client.ok("create_model", fields)
        assert (await client.result(future))["category"] == "user"
        assert (await client.ask("get_info", {"model_id": future["model_id"]}))[0] == 404
    status, answer = await client.ask(
        "create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": "other"}
    )
    assert status == 400
    assert "'scripted'" in answer["detail"], "the message names what is served"


async def test_wrong_samples_fail_in_their_future(client: Raw) -> None:
    sampler = await client.sampler(await client.session())
    for more in ({"prompt": {}}, {"num_samples": 0}, {"sampling_params": {"max_tokens": "many"}}):
        future = await client.ok("asample", sample_fields(sampler, **more))
        assert future["sample_sequence_ids"]
        assert (await client.result(future))["category"] == "user"


# -- polling, cancelling, limits --------------------------------------------------------------------------------------


def slow(**more: Any) -> ScriptedBackend:
    return ScriptedBackend(successors, latency=Latency(floor=3600.0), **more)


async def test_a_long_poll_times_out_with_try_again(tmp_path: Path) -> None:
    with service_thread(tmp_path, slow(), poll=0.2) as served:
        async with raw(served.url) as client:
            future = await client.ok("asample", sample_fields(await client.sampler(await client.session())))
            start = anyio.current_time()
            status, answer = await client.ask("retrieve_future", {"request_id": future["request_id"]})
            assert status == 408
            assert answer == {"type": "try_again", "request_id": future["request_id"], "queue_state": "active"}
            assert anyio.current_time() - start >= 0.15


def poll_fields(sampler: str, cursor: int = 0, **more: Any) -> dict[str, Any]:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": more.pop("clone", 0)}
    return {"target": target, "prev_cursor": cursor, "timeout": None, "retrieved_request_ids": [], **more}


async def test_a_shared_poll_reports_the_samples_of_its_own_client(client: Raw) -> None:
    session = await client.session()
    sampler, other = await client.sampler(session), await client.sampler(session, 1)
    futures = [await client.ok("asample", sample_fields(sampler, number)) for number in (1, 2)]
    refused = await client.ok("asample", sample_fields(sampler, 3, sampling_params={"max_tokens": -1}))
    cloned = await client.ok("asample", sample_fields(sampler, 1_000_000_001))
    await client.ok("asample", sample_fields(other, 1))
    seen: dict[str, Any] = {}
    cursor = 0
    while len(seen) < 3:
        answer = await client.ok("retrieve_futures", poll_fields(sampler, cursor))
        assert answer["cursor"] > cursor, "an answer before its time is up reports something"
        cursor = answer["cursor"]
        seen |= {each["request_id"]: each for each in answer["completions"]}
    sizes = [len(await client.result(future)) for future in futures]
    for future, size in zip(futures, sizes, strict=True):
        id = future["request_id"]
        assert seen.pop(id) == {"state": "finished", "request_id": id, "response_payload_uncompressed_size": size}
    assert seen == {refused["request_id"]: {"state": "failed", "request_id": refused["request_id"]}}
    of_clone = await client.ok("retrieve_futures", poll_fields(sampler, clone=1))
    assert [each["request_id"] for each in of_clone["completions"]] == [cloned["request_id"]]


async def test_a_shared_poll_of_unknown_form_is_refused(client: Raw) -> None:
    sampler = await client.sampler(await client.session())
    for wrong in ({"timeout": "soon"}, {"retrieved_request_ids": "all"}, {"prev_cursor": -1}, {"target": sampler}):
        status, answer = await client.ask("retrieve_futures", poll_fields(sampler) | wrong)
        assert status in (400, 422), wrong
        assert next(iter(wrong)) in answer["detail"]


async def test_a_repeated_shared_poll_reports_the_same_again(client: Raw) -> None:
    sampler = await client.sampler(await client.session())
    future = await client.ok("asample", sample_fields(sampler, 1))
    first = await client.ok("retrieve_futures", poll_fields(sampler))
    assert await client.ok("retrieve_futures", poll_fields(sampler)) == first, "its answer may have been lost"
    assert (await client.ok("retrieve_futures", poll_fields(sampler, first["cursor"], timeout=0)))["completions"] == []
    await client.result(future)
    retrieved = poll_fields(sampler, first["cursor"], timeout=0, retrieved_request_ids=[future["request_id"], "none"])
    await client.ok("retrieve_futures", retrieved)
    assert (await client.ask("retrieve_future", {"request_id": future["request_id"]}))[0] == 410


async def test_what_other_clients_finish_does_not_move_a_cursor(client: Raw) -> None:
    session = await client.session()
    sampler, other = await client.sampler(session), await client.sampler(session, 1)
    await client.result(await client.ok("asample", sample_fields(other, 1)))
    assert await client.ok("retrieve_futures", poll_fields(sampler, timeout=0)) == {"completions": [], "cursor": 0}


async def test_a_shared_poll_ends_empty_when_its_time_is_up(tmp_path: Path) -> None:
    with service_thread(tmp_path, slow(), poll=0.2) as served:
        async with raw(served.url) as client:
            sampler = await client.sampler(await client.session())
            await client.ok("asample", sample_fields(sampler, 1))
            start = anyio.current_time()
            assert await client.ok("retrieve_futures", poll_fields(sampler)) == {"completions": [], "cursor": 0}
            assert anyio.current_time() - start >= 0.15
            assert (await client.ok("retrieve_futures", poll_fields(sampler, timeout=0)))["completions"] == []


async def test_a_cancelled_sample_frees_its_slot(tmp_path: Path) -> None:
    backend = ScriptedBackend(successors, latency=Latency(prefill=1200.0), max_concurrent=1)
    with service_thread(tmp_path, backend) as served:
        async with raw(served.url) as client:
            sampler = await client.sampler(await client.session())
            futures = [await client.ok("asample", sample_fields(sampler, number)) for number in range(3)]
            for future in futures[:2]:
                await client.ok("cancel_future", {"request_id": future["request_id"]})
                answer = await client.result(future)
                assert answer == {"error": "cancelled by the client", "category": "user"}
                await client.ok("cancel_future", {"request_id": future["request_id"]})
            # The first had the only slot; the third, not cancelled, now gets it.
            await until(lambda: has(len(backend.served) >= 2))


async def test_training_is_not_cancelled(client: Raw) -> None:
    model = await client.model(await client.session())
    future = await step(client, model, 2)
    await client.ok("cancel_future", {"request_id": future["request_id"]})
    await step(client, model, 1)
    assert "metrics" in await client.result(future)


async def test_a_full_queue_answers_429(tmp_path: Path) -> None:
    with service_thread(tmp_path, slow(), max_samples=2) as served:
        async with raw(served.url) as client:
            sampler = await client.sampler(await client.session())
            first = await client.ok("asample", sample_fields(sampler, 1))
            await client.ok("asample", sample_fields(sampler, 2))
            assert (await client.ask("asample", sample_fields(sampler, 3)))[0] == 429
            assert await client.ok("asample", sample_fields(sampler, 1)) == first, "a repeated request takes no slot"
            await client.ok("cancel_future", {"request_id": first["request_id"]})
            await until(lambda: answers(client, "asample", sample_fields(sampler, 3), 200))


async def test_large_results_are_announced(tmp_path: Path) -> None:
    backend = ScriptedBackend(lambda prompt, chance: [1] * 200_000)
    with service_thread(tmp_path, backend) as served:
        async with raw(served.url) as client:
            sampler = await client.sampler(await client.session())
            future = await client.ok("asample", sample_fields(sampler, sampling_params={"max_tokens": 200_000}))
            ask = {"request_id": future["request_id"], "allow_metadata_only": True}
            announced = await client.ok("retrieve_future", ask)
            body = await client.ok("retrieve_future", {**ask, "allow_metadata_only": False})
            assert announced == {"status": "complete_metadata", "response_payload_size": len(body)}
            assert len(deserialize_sample_response(body).sequences[0].tokens) == 200_000


async def test_fetched_results_expire(tmp_path: Path) -> None:
    with service_thread(tmp_path, result_grace=0.0, gap_patience=0.1) as served:
        async with raw(served.url) as client:
            future = await client.ok("asample", sample_fields(await client.sampler(await client.session())))
            await client.result(future)
            await until(lambda: answers(client, "retrieve_future", {"request_id": future["request_id"]}, 410))


# -- sessions and weights ---------------------------------------------------------------------------------------------


async def test_the_end_of_a_session_ends_its_work(tmp_path: Path) -> None:
    with service_thread(tmp_path, slow()) as served:
        async with raw(served.url) as client:
            session = await client.session()
            model, sampler = await client.model(session), await client.sampler(session)
            sample = await client.ok("asample", sample_fields(sampler, 1))
            waiting = await step(client, model, 2)
            await client.ok("session_heartbeat", {"session_id": session})
            assert await client.ok(f"sessions/{session}/finish", {"reason": {"type": "success"}}) is None
            await client.ok(f"sessions/{session}/finish", {"reason": {"type": "success"}})
            assert "session has ended" in (await client.result(sample))["error"]
            assert "session has ended" in (await client.result(waiting))["error"]
            assert (await client.ask("session_heartbeat", {"session_id": session}))[0] == 410
            assert (await client.ask("asample", sample_fields(sampler, 2)))[0] == 404
            assert (await client.ask("optim_step", {"model_id": model, "seq_id": 3}))[0] == 404


async def test_an_idle_session_ends(tmp_path: Path) -> None:
    with service_thread(tmp_path, session_idle=0.1, gap_patience=0.1) as served:
        async with raw(served.url) as client:
            session = await client.session()
            opening = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "scripted"}
            await until(lambda: answers(client, "create_sampling_session", opening, 410))
            assert (await client.ask("session_heartbeat", {"session_id": session}))[0] == 410
            assert await client.ok("sessions", method="GET") == {"sessions": [session]}, "it stays listed"


async def snapshot(client: Raw, model: str, seq_id: int, **more: Any) -> str:
    fields = {"model_id": model, "seq_id": seq_id, "sampling_session_seq_id": seq_id, **more}
    return (await client.result(await client.ok("save_weights_for_sampler", fields)))["sampling_session_id"]


async def logprob(client: Raw, sampler: str) -> float:
    result = await client.result(await client.ok("asample", sample_fields(sampler)))
    assert isinstance(result, bytes), result
    return float((deserialize_sample_response(result).sequences[0].logprobs or [0.0])[0])


async def change(client: Raw, model: str, seq_id: int) -> None:
    await client.ok("forward_backward", body=training_body(model, seq_id))
    await client.result(await step(client, model, seq_id + 1, learning_rate=0.1))


async def test_only_the_latest_unnamed_weights_stay_in_memory(tmp_path: Path) -> None:
    with service_thread(tmp_path, max_snapshots=2) as served:
        async with raw(served.url) as client:
            model = await client.model(await client.session())
            first, second = [await snapshot(client, model, seq_id) for seq_id in (1, 2)]
            await logprob(client, first)
            await snapshot(client, model, 3)
            await logprob(client, first)
            lost = await client.result(await client.ok("asample", sample_fields(second)))
            assert lost["category"] == "user"
            assert "save_weights_for_sampler" in lost["error"]


async def test_named_weights_are_reloaded_when_needed(tmp_path: Path) -> None:
    with service_thread(tmp_path, max_snapshots=1) as served:
        async with raw(served.url) as client:
            session = await client.session()
            model = await client.model(session)
            paths = []
            for seq_id in (1, 4):
                fields = {"model_id": model, "seq_id": seq_id, "path": f"v{seq_id}"}
                paths.append((await client.result(await client.ok("save_weights_for_sampler", fields)))["path"])
                await change(client, model, seq_id + 1)
            samplers = [await client.sampler(session, n, model_path=path) for n, path in enumerate(paths)]
            seen = [[await logprob(client, sampler) for sampler in samplers] for _ in range(2)]
            assert seen[0] == seen[1]
            assert seen[0][0] != seen[0][1]
            await client.ok("asample", sample_fields(samplers[0], sampling_session_id=None, model_path=paths[0]))
            again = {"model_id": model, "seq_id": 7, "path": "v1", "overwrite": True}
            await client.result(await client.ok("save_weights_for_sampler", again))
            await logprob(client, samplers[1])
            lost = await client.result(await client.ok("asample", sample_fields(samplers[0])))
            assert "overwritten" in lost["error"]


async def test_inflight_samplers_share_the_newest_weights(client: Raw) -> None:
    model = await client.model(await client.session())
    fixed, shared = [await snapshot(client, model, n + 1, kind=kind) for n, kind in enumerate(("snapshot", "inflight"))]
    before = await logprob(client, fixed)
    assert await logprob(client, shared) == before
    await change(client, model, 3)
    newer = await snapshot(client, model, 5, kind="inflight")
    assert await logprob(client, fixed) == before
    assert await logprob(client, shared) == await logprob(client, newer) != before


async def test_loading_waits_for_saving(client: Raw) -> None:
    """All in flight together: save, change, load the save."""
    model = await client.model(await client.session())
    save = await client.ok("save_weights", {"model_id": model, "seq_id": 1, "path": "start"})
    await client.ok("forward_backward", body=training_body(model, 2))
    await step(client, model, 3, learning_rate=0.5)
    changed = await client.ok("forward_backward", body=training_body(model, 4))
    path = f"tinker://{model}/weights/start"
    load = await client.ok("load_weights", {"model_id": model, "seq_id": 5, "path": path, "optimizer": True})
    restored = await client.ok("forward_backward", body=training_body(model, 6))
    assert (await client.result(save))["path"] == (await client.result(load))["path"] == path
    losses = [
        deserialize_forward_backward_output(await client.result(future)).metrics["loss:sum"]
        for future in (changed, restored)
    ]
    assert losses[0] != losses[1]
    fresh = await client.model(await client.session())
    start = await client.result(await client.ok("forward_backward", body=training_body(fresh, 1)))
    assert deserialize_forward_backward_output(start).metrics["loss:sum"] == losses[1]


async def test_stopping_the_service_answers_open_polls(tmp_path: Path) -> None:
    backend = slow()
    async with anyio.create_task_group() as group, contextlib.AsyncExitStack() as stack:
        with service_thread(tmp_path, backend) as served:
            client = await stack.enter_async_context(raw(served.url))
            future = await client.ok("asample", sample_fields(await client.sampler(await client.session())))
            got: list[Any] = []

            async def poll() -> None:
                got.append(await client.ask("retrieve_future", {"request_id": future["request_id"]}))

            group.start_soon(poll)
            # Exiting blocks this thread until the service has stopped, so the poll must already be sent; the second
            # request goes out after it.
            await anyio.lowlevel.checkpoint()
            await client.ok("client/dynamic_config")
        await until(lambda: has(bool(got)))
    assert got == [(200, {"error": "the service is shutting down", "category": "server"})]
