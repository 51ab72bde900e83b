"""Stand-ins for a model, a search and an embedder that do what a test says."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import anyio
import numpy as np

from searchr1_async.episodes.play import SampledTurn
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import SearchError, ServiceError
from searchr1_async.search.embedders import Vectors


class ScriptedPolicy:
    """Answers each prompt with the tokens that ``reply`` gives for it."""

    def __init__(self, reply: Callable[[list[int]], Sequence[int]], *, version: int = 0) -> None:
        self.reply = reply
        self.version = version
        self.prompts: list[tuple[int, ...]] = []
        self.requests = 0

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        return (await self.sample_many(prompt_tokens, 1, max_tokens=max_tokens, stop=stop, seed=seed))[0]

    async def sample_many(
        self,
        prompt_tokens: Sequence[int],
        count: int,
        *,
        max_tokens: int,
        stop: list[int] | list[str],
        seed: int | None,
    ) -> list[SampledTurn]:
        await anyio.lowlevel.checkpoint()
        self.requests += 1
        turns = []
        for _ in range(count):
            self.prompts.append(tuple(prompt_tokens))
            tokens = tuple(self.reply(list(prompt_tokens)))
            kept = tokens[:max_tokens]
            turns.append(SampledTurn(kept, (-0.5,) * len(kept), len(tokens) > max_tokens, self.version))
        return turns


class BrokenPolicy(ScriptedPolicy):
    """A sampler that fails for good."""

    def __init__(self) -> None:
        super().__init__(lambda prompt: ())

    async def sample_many(self, *args: object, **kwargs: object) -> list[SampledTurn]:
        raise ServiceError("the service is gone")


class DictSearch:
    """Finds one passage a query, made from the query itself; remembers what it was asked."""

    def __init__(self, text: Callable[[str], str] = lambda query: f"All about {query}.") -> None:
        self._text = text
        self.asked: list[tuple[str, ...]] = []

    async def __call__(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        return await self.search(queries)

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        await anyio.lowlevel.checkpoint()
        self.asked.append(tuple(queries))
        return [[Passage(id=query, title="", text=self._text(query))] for query in queries]


class BrokenSearch(DictSearch):
    """A search that fails for good."""

    def __init__(self, *, is_fatal: bool = False) -> None:
        super().__init__()
        self._is_fatal = is_fatal

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        self.asked.append(tuple(queries))
        raise SearchError("the store is gone", is_fatal=self._is_fatal)


class HashingEmbedder:
    """A bag of words, each word at a place (and with a sign) that its hash gives: needs no model and no time.

    A little noise, seeded by the text's hash, breaks ties between texts that share as many words with a query. Chroma orders ties
    differently each time it opens a small folder, because it rebuilds its graph; prompts would then differ between sessions.
    """

    name = "hashed words"
    fingerprint = "hashed-words-apart/512"
    max_texts = 1000
    max_tokens = None
    max_requests = 4
    dimension = 512

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._embed(text) for text in texts])

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self.embed_queries(texts)

    def _embed(self, text: str) -> Vectors:
        vector = np.zeros(self.dimension, dtype=np.float32)
        for word in text.split():
            key = zlib.crc32(word.encode())
            vector[key % self.dimension] += 1.0 if key & (1 << 20) else -1.0
        vector /= max(float(np.linalg.norm(vector)), 1e-6)
        noise = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(self.dimension, dtype=np.float32)
        vector += 0.002 * noise
        return vector / float(np.linalg.norm(vector))
