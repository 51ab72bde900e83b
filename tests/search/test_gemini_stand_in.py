"""The stand-in server for Gemini, used by benchmarks and other tests."""

from __future__ import annotations

from typing import Any

import aiohttp
import numpy as np
import pytest

from benchmarks.shared.gemini_stand_in import (
    Fault,
    GeminiStandIn,
    StandInSettings,
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
