"""Private interfaces of libraries: a new version that differs fails here, with what is then to be done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.shared.gemini_stand_in import GeminiStandIn
from searchr1_async.search import gemini
from searchr1_async.search.compat import genai_transport
from searchr1_async.search.gemini import GeminiEmbedder

pytestmark = pytest.mark.anyio

TEXTS = ["Luanda is the capital of Angola", "Thimphu is the capital of Bhutan"]
CHANGED = (
    "google-genai has changed: its embed_content sends something else than embedding_request of search/gemini.py, or its "
    "transport differs from genai_transport of search/compat.py. Searches go on, at several times the CPU or with another "
    "request: adapt both, and the versions named in compat.py"
)


class Token:
    """What Google's client needs of credentials."""

    token, expired, quota_project_id = "a-token", False, None


@pytest.mark.parametrize("on_vertex", [False, True])
async def test_the_transport_of_google_genai_sends_what_its_public_face_sends(
    monkeypatch: pytest.MonkeyPatch, on_vertex: bool
) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p")
    access: Any = {"credentials": Token()} if on_vertex else {"api_key": "k"}
    async with GeminiStandIn() as stand_in:
        sent = []
        for transport in (genai_transport, lambda client: None):
            monkeypatch.setattr(gemini, "genai_transport", transport)
            embedder = GeminiEmbedder(base_url=stand_in.base_url, **access)
            await embedder.open()
            assert (embedder._post is None) == (transport is not genai_transport), CHANGED
            vectors = await embedder.embed_passages(TEXTS[: embedder.max_texts])
            sent.append((stand_in.last_request, vectors))
            await embedder.aclose()
    assert sent[0][0] == sent[1][0], CHANGED
    np.testing.assert_array_equal(sent[0][1], sent[1][1], CHANGED)


@pytest.mark.parametrize("request_method", [None, lambda method: None])
def test_without_the_transport_the_public_face_is_used(request_method: Any) -> None:
    client: Any = SimpleNamespace(aio=SimpleNamespace(_api_client=SimpleNamespace(async_request=request_method)))
    assert genai_transport(client) is None
