"""A Tinker service that costs next to nothing: canned samples over a raw protocol, so that the client is the limit.

    python -m benchmarks.workers.service FOLDER SECONDS

It speaks just as much of the wire protocol as sampling needs. Each sample's answer is ready ``SECONDS`` after it was asked for;
of three samples two search and one answers. ``FOLDER`` is that of the tokenizer. The port is its one line of output, and it
ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable

import numpy as np
from tinker.proto import tinker_public_pb2 as wire
from transformers import AutoTokenizer

MODEL = "canned"
REPLIES = (
    "<search>highest mountain of Namibia</search>",
    "<search>capital of the country with the longest river</search>",
    "<answer>yes</answer>",
)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_SAMPLES = re.compile(rb'"num_samples": *(\d+)')
_REQUEST = re.compile(rb'"request_id": *"(\d+)"')
_JSON, _PROTOBUF = b"application/json", b"application/x-protobuf"


def answer(body: bytes, kind: bytes = _JSON) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


class Samples:
    """Precomputed answers, and when each is due."""

    def __init__(self, tokenizer_folder: str, seconds: float) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        self._seconds = seconds
        self._canned: dict[tuple[int, int], bytes] = {}
        self._due: dict[int, tuple[float, bytes]] = {}
        self.asked = 0

    def ask(self, body: bytes) -> bytes:
        found = _SAMPLES.search(body)
        count = int(found[1]) if found else 1
        number, self.asked = self.asked, self.asked + 1
        self._due[number] = (asyncio.get_running_loop().time() + self._seconds, self._answer(number, count))
        ids = ",".join(f'"{number}:{place}"' for place in range(count))
        return answer(f'{{"request_id":"{number}","sample_sequence_ids":[{ids}]}}'.encode())

    def fetch(self, body: bytes) -> tuple[float, bytes]:
        found = _REQUEST.search(body)
        assert found is not None
        return self._due.pop(int(found[1]))

    def _answer(self, number: int, count: int) -> bytes:
        key = (number % len(REPLIES), count)
        if key not in self._canned:
            sequences = []
            for place in range(count):
                reply = REPLIES[(number + place) % len(REPLIES)]
                tokens = self._tokenizer.encode(reply, add_special_tokens=False)
                logprobs = np.full(len(tokens), -0.7, np.float32).tobytes()
                sequences.append(
                    wire.SampledSequence(
                        stop_reason=wire.STOP_REASON_STOP,
                        tokens=np.asarray(tokens, np.int32).tobytes(),
                        logprobs=logprobs,
                    )
                )
            body = wire.SampleResponse(sequences=sequences).SerializeToString()
            self._canned[key] = answer(body, _PROTOBUF)
        return self._canned[key]


class Connection(asyncio.Protocol):
    """One connection, on which requests follow one another."""

    def __init__(self, samples: Samples, fixed: dict[bytes, bytes]) -> None:
        self._samples = samples
        self._fixed = fixed
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while True:
            head_end = self._buffer.find(b"\r\n\r\n")
            if head_end < 0:
                return
            found = _LENGTH.search(self._buffer, 0, head_end)
            end = head_end + 4 + (int(found[1]) if found else 0)
            if len(self._buffer) < end:
                return
            path = self._buffer[: self._buffer.find(b" ", 5)].rpartition(b"/api/v1/")[2]
            body, self._buffer = self._buffer[head_end + 4 : end], self._buffer[end:]
            self._take(path, body)

    def _take(self, path: bytes, body: bytes) -> None:
        assert self._transport is not None
        if path == b"asample":
            self._transport.write(self._samples.ask(body))
        elif path == b"retrieve_future":
            due, ready = self._samples.fetch(body)
            asyncio.get_running_loop().call_at(due, self._write(ready))
        else:
            self._transport.write(self._fixed.get(path, answer(b"{}")))

    def _write(self, ready: bytes) -> Callable[[], None]:
        transport = self._transport
        assert transport is not None
        return lambda: None if transport.is_closing() else transport.write(ready)


async def serve(folder: str, seconds: float) -> None:
    samples = Samples(folder, seconds)
    fixed = {
        b"create_session": answer(b'{"session_id":"session"}'),
        b"create_sampling_session": answer(b'{"sampling_session_id":"sampler"}'),
        b"telemetry": answer(b'{"status":"accepted"}'),
        b"session_heartbeat": answer(b'{"type":"session_heartbeat"}'),
        b"get_server_capabilities": answer(json.dumps({"supported_models": [{"model_name": MODEL}]}).encode()),
    }
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(samples, fixed), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], float(sys.argv[2])))
