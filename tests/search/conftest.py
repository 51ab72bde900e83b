"""A deterministic embedder, a small corpus, and a Chroma server process."""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio
import numpy as np
import pytest

from searchr1_async.episodes.types import Passage
from searchr1_async.search.embedders import Vectors


class HashingEmbedder:
    """Hashed bag of words: texts that share words are near."""

    def __init__(self, name: str = "hashing", dimension: int = 1024, max_texts: int = 1_000) -> None:
        self.name = name
        self.fingerprint = f"{name}-{dimension}"
        self.dimension = dimension
        self.max_texts = max_texts
        self.max_requests = 8
        self.query_batches: list[list[str]] = []
        self.passage_batches: list[list[str]] = []
        self.gate: anyio.Event | None = None
        """While set, queries wait for it."""
        self.failure: Exception | None = None
        self.fails_on: str | None = None
        """Only requests with this query fail; None for all."""
        self.is_open = False

    async def open(self) -> None:
        self.is_open = True

    async def aclose(self) -> None:
        self.is_open = False

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        self.query_batches.append(list(texts))
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None and (self.fails_on is None or self.fails_on in texts):
            raise self.failure
        return self.embed(texts)

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        if self.failure is not None:
            raise self.failure
        self.passage_batches.append(list(texts))
        return self.embed(texts)

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.full((len(texts), self.dimension), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, int(hashlib.md5(word.encode()).hexdigest(), 16) % self.dimension] += 1
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def embedder() -> HashingEmbedder:
    return HashingEmbedder()


@pytest.fixture
def make_embedder() -> Callable[..., HashingEmbedder]:
    return HashingEmbedder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def passages() -> list[Passage]:
    facts = {
        "Angola": ("Luanda", "Moco"),
        "Bhutan": ("Thimphu", "Gangkar Puensum"),
        "Chile": ("Santiago", "Ojos del Salado"),
        "Denmark": ("Copenhagen", "Mollehoj"),
        "Egypt": ("Cairo", "Jabal Katrinah"),
    }
    return [
        passage
        for country, (capital, point) in facts.items()
        for passage in (
            Passage(f"{country}/capital", country, f"{capital} is the capital of {country}."),
            Passage(f"{country}/point", country, f"{country} has its highest point at {point}."),
        )
    ]


class ChromaProcess:
    """A real `chroma run` on its own port, which can be killed and restarted on the same folder."""

    def __init__(self, folder: Path) -> None:
        command = shutil.which("chroma", path=f"{Path(sys.executable).parent}") or shutil.which("chroma")
        if command is None:
            pytest.skip("the command `chroma` is not installed")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._log = folder / "log"
        where = ["--path", str(folder / "data"), "--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [command, "run", *where]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Does not wait until the server answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        give_up = time.monotonic() + 60
        while not _answers(self.port):
            if self._process is None or self._process.poll() is not None or time.monotonic() > give_up:
                pytest.fail(f"chroma run did not come up:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def chroma_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of the session's `chroma run`; skips if the command is missing."""
    server = ChromaProcess(tmp_path_factory.mktemp("chroma-server"))
    server.start()
    try:
        server.wait()
        yield server.port
    finally:
        server.kill()


@pytest.fixture
def chroma_process(tmp_path: Path) -> Iterator[ChromaProcess]:
    """A `chroma run` for this test only."""
    server = ChromaProcess(tmp_path)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/heartbeat", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
