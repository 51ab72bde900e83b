"""Messages over a socket pair: whole and in order, however the stream is split."""

from __future__ import annotations

import socket
import struct

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.types import Passage, Question
from searchr1_async.rollout.player import GroupTask
from searchr1_async.rollout.workers.messages import (
    MAX_MESSAGE,
    Cancel,
    Channel,
    ChannelClosedError,
    DropPolicy,
    Found,
    Frames,
    HoldPolicy,
    Play,
    Sampler,
    SearchAsked,
    SearchFailed,
    Setup,
    Stop,
    WorkerSpec,
    frame,
)

pytestmark = pytest.mark.anyio

texts = st.text(max_size=30)
numbers = st.integers(0, 2**40)
passages = st.tuples(st.builds(Passage, id=texts, title=texts, text=texts, score=st.floats(-1, 1)))
questions = st.builds(
    Question,
    id=texts,
    question=texts.map(lambda text: f"q{text}"),
    golden_answers=st.just(("yes",)),
    metadata=st.dictionaries(texts, numbers, max_size=2),
)
tasks = st.builds(
    GroupTask,
    place=numbers,
    question=questions,
    members=st.lists(numbers, max_size=8).map(tuple),
    seed=st.none() | numbers,
)
samplers = st.builds(Sampler, texts, st.none() | texts, numbers, st.just(SamplingSettings(seed=3, temperature=0.5)))
specs = st.builds(WorkerSpec, texts, texts, texts, st.just(EpisodeLimits(max_seconds=3.0)), texts, texts)
messages = st.one_of(
    st.builds(Setup, specs, st.floats(0, 10)),
    st.builds(HoldPolicy, numbers, samplers),
    st.builds(DropPolicy, numbers),
    st.builds(Play, numbers, tasks, numbers),
    st.builds(Cancel, numbers),
    st.builds(SearchAsked, numbers, numbers, st.lists(texts, max_size=3).map(tuple)),
    st.builds(Found, numbers, numbers, st.lists(passages, max_size=3).map(tuple)),
    st.builds(SearchFailed, numbers, numbers, texts, texts, st.booleans()),
    st.just(Stop()),
)


@given(st.lists(messages, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_every_message_arrives_however_the_stream_is_cut(sent: list[object], data: st.DataObject) -> None:
    stream = b"".join(frame(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    frames, received = Frames(), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += frames.feed(stream[begin:end])
    assert received == sent
    assert frames.is_between


@given(st.lists(messages, min_size=1, max_size=3), st.data())
@settings(max_examples=50, deadline=None)
def test_a_stream_that_ends_early_gives_whole_messages_only(sent: list[object], data: st.DataObject) -> None:
    stream = b"".join(frame(message) for message in sent)
    cut = data.draw(st.integers(0, len(stream) - 1))
    frames = Frames()
    received = list(frames.feed(stream[:cut]))
    assert received == sent[: len(received)]
    assert len(received) < len(sent)
    assert frames.is_between == (cut == sum(len(frame(message)) for message in received))


@pytest.mark.parametrize(
    "noise",
    [
        struct.pack(">I", MAX_MESSAGE + 1),
        struct.pack(">I", 4) + b"none",
        struct.pack(">I", 0),
        struct.pack(">I", 3) + b"\x80\x05.",
    ],
    ids=["too long", "no pickle", "empty", "pickle of nothing"],
)
def test_what_is_no_message_closes_the_channel_after_what_came_before(noise: bytes) -> None:
    frames, received = Frames(), []
    with pytest.raises(ChannelClosedError):
        received.extend(frames.feed(frame(Stop()) + noise))
    assert received == [Stop()]


def test_an_api_key_is_in_no_representation() -> None:
    sampler = Sampler("handle", "tml-secret", 1, SamplingSettings())
    assert "secret" not in repr(HoldPolicy(0, sampler))


async def pair() -> tuple[Channel[object, object], Channel[object, object]]:
    ours, theirs = socket.socketpair()
    return await Channel.over(ours), await Channel.over(theirs)


async def test_messages_larger_than_the_sockets_buffer_arrive_in_order() -> None:
    one, other = await pair()
    sent = [SearchAsked(number, 0, ("x" * 400_000,)) for number in range(8)]
    received: list[object] = []

    async def send() -> None:
        for message in sent:
            await one.send(message)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            while len(received) < len(sent):
                received.append(await other.receive())
    assert received == sent
    await one.aclose()
    with pytest.raises(ChannelClosedError):
        await other.receive()
    await other.aclose()


async def test_a_cancelled_receive_loses_nothing_and_a_closed_end_takes_nothing() -> None:
    one, other = await pair()
    with anyio.move_on_after(0) as cancelled:
        await other.receive()
    assert cancelled.cancelled_caught
    one.post(Stop())
    one.post(Cancel(1))
    assert await other.receive() == Stop()
    await one.aclose()
    assert await other.receive() == Cancel(1), "sent before it was closed"
    one.post(Stop())
    with pytest.raises(ChannelClosedError):
        await other.receive()

    async def send_on() -> None:
        while True:
            await other.send(SearchAsked(0, 0, ("x" * 10_000,)))
            await anyio.lowlevel.checkpoint()

    with anyio.fail_after(10), pytest.raises(ChannelClosedError):
        await send_on()
    await other.aclose()
