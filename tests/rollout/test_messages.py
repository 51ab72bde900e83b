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
from searchr1_async.rollout.messages import (
    MAX_MESSAGE,
    Cancel,
    Channel,
    ChannelClosedError,
    Found,
    Pause,
    Play,
    SearchAsked,
    SearchFailed,
    Setup,
    WorkerSpec,
    frame,
)
from searchr1_async.rollout.player import GroupTask, Sampler

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
    st.builds(Play, numbers, tasks, samplers),
    st.builds(Cancel, numbers),
    st.builds(SearchAsked, numbers, numbers, st.lists(texts, max_size=3).map(tuple)),
    st.builds(Found, numbers, st.lists(passages, max_size=3).map(tuple)),
    st.builds(SearchFailed, numbers, texts, texts, st.booleans()),
    st.builds(Pause, st.booleans()),
)


async def received_of(*pieces: bytes, why: str = "the other side is gone") -> list[object]:
    """The messages of a stream that arrives in these pieces and ends; ``why`` no more are received."""
    ours, theirs = socket.socketpair()
    channel: Channel[object, object] = await Channel.over(ours)
    received = []

    async def write() -> None:
        with theirs:
            for piece in pieces:
                theirs.sendall(piece)
                await anyio.lowlevel.checkpoint()

    async def read() -> None:
        while True:
            received.append(await channel.receive())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        with pytest.raises(ChannelClosedError, match=why):
            await read()
    await channel.aclose()
    return received


@given(st.lists(messages, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_every_message_arrives_however_the_stream_is_cut(sent: list[object], data: st.DataObject) -> None:
    stream = b"".join(frame(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert anyio.run(received_of, *pieces) == sent


@given(st.lists(messages, min_size=1, max_size=3), st.data())
@settings(max_examples=50, deadline=None)
def test_a_stream_that_ends_early_gives_whole_messages_only(sent: list[object], data: st.DataObject) -> None:
    stream = b"".join(frame(message) for message in sent)
    cut = data.draw(st.integers(0, len(stream) - 1))
    received = anyio.run(received_of, stream[:cut])
    assert received == sent[: len(received)]
    assert len(received) < len(sent)


@pytest.mark.parametrize(
    ("noise", "why"),
    [
        (struct.pack(">I", MAX_MESSAGE + 1), "the stream is corrupt"),
        (struct.pack(">I", 4) + b"none", "cannot be read"),
        (struct.pack(">I", 0), "cannot be read"),
        (struct.pack(">I", 3) + b"\x80\x05.", "cannot be read"),
    ],
    ids=["too long", "no pickle", "empty", "pickle of nothing"],
)
async def test_what_is_no_message_closes_the_channel_after_what_came_before(noise: bytes, why: str) -> None:
    assert await received_of(frame(Cancel(1)) + noise, why=why) == [Cancel(1)]


def test_an_api_key_is_in_no_representation() -> None:
    sampler = Sampler("handle", "tml-secret", 1, SamplingSettings())
    assert "secret" not in repr(Play(0, GroupTask(0, Question("q", "?"), ()), sampler))


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
    one.post(Pause(True))
    one.post(Cancel(1))
    assert await other.receive() == Pause(True)
    await one.aclose()
    assert await other.receive() == Cancel(1), "sent before it was closed"
    one.post(Pause(True))
    with pytest.raises(ChannelClosedError):
        await other.receive()

    async def send_on() -> None:
        while True:
            await other.send(SearchAsked(0, 0, ("x" * 10_000,)))
            await anyio.lowlevel.checkpoint()

    with anyio.fail_after(10), pytest.raises(ChannelClosedError):
        await send_on()
    await other.aclose()
