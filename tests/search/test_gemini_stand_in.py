"""The stand-in server for Gemini, used by benchmarks and other tests."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shared.gemini_stand_in import (
    Fault,
    GeminiStandIn,
    StandInSettings,
    TokenBucket,
    counts_of,
    stand_in_process,
)
from benchmarks.shared.word_vectors import WordVectors
from searchr1_async.search.gemini import GeminiEmbedder

pytestmark = pytest.mark.anyio

PATH = "/v1beta/models/gemini-embedding-001:batchEmbedContents"


async def ask(base_url: str, *texts: str, key: str = "k") -> tuple[int, dict[str, Any]]:
    """Status and body of one request, without Google's client."""
    body = {"requests": [{"content": {"parts": [{"text": text}]}, "taskType": "T"} for text in texts]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(base_url + PATH, json=body, headers={"x-goog-api-key": key}) as answer,
    ):
        return answer.status, await answer.json(content_type=None)


@settings(deadline=None)
@given(st.text(max_size=80), st.sampled_from([128, 768]))
def test_a_text_has_one_vector_of_a_length_that_is_not_one(text: str, dimension: int) -> None:
    vector = WordVectors().embed(text, dimension)
    assert vector.shape == (dimension,)
    assert vector.dtype == np.float32
    assert 0.59 < np.linalg.norm(vector) < 0.76
    shared = WordVectors()
    shared.embed("words that come before")
    np.testing.assert_array_equal(shared.embed(text, dimension), vector)


def test_most_questions_find_their_passage_among_many() -> None:
    vectors = WordVectors()
    passages = [f"The {n % 7} towns of Land{n} were founded in {1500 + n} on the river Flow{n}." for n in range(500)]
    matrix = np.stack([vectors.embed(passage) for passage in passages])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    found = [int((matrix @ vectors.embed(f"On which river are the towns of Land{n}?")).argmax()) for n in range(500)]
    assert np.mean(np.array(found) == np.arange(500)) > 0.98


def test_a_bucket_refills() -> None:
    now = 0.0
    bucket = TokenBucket(rate=2, capacity=10, clock=lambda: now)
    assert bucket.wait_for(10) == 0
    bucket.take(10)
    assert bucket.wait_for(3) == 1.5
    assert bucket.wait_for(1_000) == 5
    now = 1.5
    assert bucket.wait_for(3) == 0
    now = 100.0
    bucket.take(0)
    assert bucket.wait_for(10) == 0
    bucket.take(10)
    assert bucket.wait_for(1) == 0.5


async def test_over_the_quota_of_requests_nothing_is_embedded() -> None:
    async with GeminiStandIn(StandInSettings(requests_per_second=0.01)) as stand_in:
        assert [(await ask(stand_in.base_url, "text"))[0] for _ in range(4)] == [200, 429, 429, 429]
        assert stand_in.counts.statuses == {200: 1, 429: 3}
        assert stand_in.counts.embedded == {("T", "text"): 1}


async def test_a_quota_of_texts_says_when_there_is_room() -> None:
    async with GeminiStandIn(StandInSettings(texts_per_minute=60, says_when="details")) as stand_in:
        assert (await ask(stand_in.base_url, *(f"text {n}" for n in range(55))))[0] == 200
        status, body = await ask(stand_in.base_url, *(f"text {n}" for n in range(25)))
        delay = next(detail["retryDelay"] for detail in body["error"]["details"] if "retryDelay" in detail)
        assert status == 429
        assert 15 < float(delay.removesuffix("s")) <= 20
        assert stand_in.counts.texts == 80
        assert stand_in.counts.embedded.total() == 55


async def test_faults_are_drawn_by_the_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        settings = StandInSettings(fault_rates={Fault.INTERNAL: 0.2, Fault.UNAVAILABLE: 0.2}, seed=seed)
        async with GeminiStandIn(settings) as stand_in:
            drawn.append([(await ask(stand_in.base_url, "text"))[0] for _ in range(40)])
            assert stand_in.counts.faults.total() == sum(status != 200 for status in drawn[-1])
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {200, 500, 503}


async def test_answers_take_the_time_asked_for_beside_one_another() -> None:
    async with GeminiStandIn(StandInSettings(latency=0.1, latency_per_text=0.05, jitter=0.5)) as stand_in:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(ask(stand_in.base_url, "one", "two") for _ in range(8)))
        assert loop.time() - began >= 0.1
        assert stand_in.counts.requests_at_once == 8


async def test_it_runs_in_a_process_of_its_own() -> None:
    """Out of process, with all settings, the real client, and resettable counts."""
    settings = StandInSettings(keys=("k",), fault_rates={Fault.SLOW: 0.0}, vertex_lists=True)
    async with stand_in_process(settings) as base_url:
        assert (await ask(base_url, "text", key="another"))[0] == 400
        embedder = GeminiEmbedder(api_key="k", base_url=base_url)
        await embedder.open()
        np.testing.assert_allclose(await embedder.embed_queries(["text"]), [WordVectors().embed("text")], rtol=1e-6)
        await embedder.embed_queries(["text"])
        await embedder.aclose()
        counts = await counts_of(base_url, forget=True)
        assert (counts["requests"], counts["texts_distinct"], counts["embedded_again"]) == (4, 2, 1)
        assert counts["cpu_seconds"] > 0
        assert (await counts_of(base_url))["requests"] == 0
