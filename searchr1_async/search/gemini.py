"""Google's Gemini embedding models, via the Gemini Developer API or Vertex AI; and embedders by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np
import orjson

from searchr1_async.errors import ConfigurationError, EmbeddingError, SearchError
from searchr1_async.search.compat import Post, genai_transport
from searchr1_async.search.embedders import Embedder, SentenceTransformerEmbedder, Vectors
from searchr1_async.search.faults import PassingFault, RefusedInput, Wording, malformed, retry_after
from searchr1_async.search.http_session import HttpSession

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from google.auth.credentials import Credentials
    from google.genai import Client


DEFAULT_MODEL = "gemini-embedding-001"
REQUEST_SECONDS = 60.0
"""Per request, including token refresh; the caller's deadline is usually shorter."""
KEY_REMEDY = "set GEMINI_API_KEY to a key from https://aistudio.google.com/apikey that may use this API"
CREDENTIALS_REMEDY = (
    "set GOOGLE_CLOUD_PROJECT, and run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS to the file of "
    "a service account that may use Vertex AI in the project"
)
_SERVICES = ("https://generativelanguage.googleapis.com", "https://aiplatform.googleapis.com")
"""Of the Developer API and of Vertex AI: which proxy they need."""
_MAX_TEXTS = 100
"""Limit of the Developer API ("at most 100 requests can be in one batch"). Vertex AI takes one text of gemini-embedding-001."""
_DEVELOPER_REQUESTS, _VERTEX_REQUESTS = 16, 128
_CLOSING_SECONDS = 5.0
_CODE = re.compile(r"[A-Z]+(_[A-Z]+)*|([A-Z][a-z]+)+(-([A-Z][a-z]+)+)*")
"""Statuses and reasons (``API_KEY_INVALID``), and names of quotas (``RequestsPerDayPerProject-FreeTier``); no key looks so."""


class GeminiEmbedder:
    """A Gemini embedding model through Google's client, one request per call.

    Uses Vertex AI if credentials are given, or if no key is given and ``GOOGLE_GENAI_USE_VERTEXAI`` is ``true`` or ``1``; its
    project and region come from ``GOOGLE_CLOUD_PROJECT`` and ``GOOGLE_CLOUD_LOCATION`` (or ``GCP_VERTEXAI_PROJECT_NUMBER`` and
    ``GCP_VERTEXAI_REGION``), or the project of the credentials and ``global``. Otherwise uses the Developer API. The service
    silently truncates texts of more than 2,048 tokens.

    Args:
        model: Google's name. Not gemini-embedding-2 or later, which have no task types.
        dimension: 128 to 3,072 for gemini-embedding-001; 768, 1,536 and 3,072 are recommended.
        normalize: scale vectors to unit length, which the service does only at 3,072 dimensions. Off as for the prebuilt index
            of Wikipedia 2018, which stores raw vectors and ranks by Euclidean distance.
        api_key: of the Developer API; None for ``GOOGLE_API_KEY``, then ``GEMINI_API_KEY``.
        credentials: of Vertex AI, from google-auth; None for application default credentials.
        max_requests: at once. None for 16, or 128 on Vertex AI, where a request holds one text.
        base_url: of another endpoint (a proxy, a stand-in).

    Raises:
        ConfigurationError: conflicting arguments, or an unsupported model.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dimension: int = 768,
        normalize: bool = False,
        api_key: str | None = None,
        credentials: Credentials | None = None,
        max_requests: int | None = None,
        base_url: str | None = None,
    ) -> None:
        if dimension < 1 or (max_requests is not None and max_requests < 1):
            raise ConfigurationError("dimension and max_requests of the Gemini embedder must be positive")
        if api_key and credentials:
            raise ConfigurationError("api_key is of the Developer API, credentials are of Vertex AI: pass one of them")
        self._model = _plain_name(model)
        self.dimension, self._normalize = dimension, normalize
        named = _from_environment("GOOGLE_GENAI_USE_ENTERPRISE", "GOOGLE_GENAI_USE_VERTEXAI")  # the newer one wins
        on_vertex = credentials is not None or (api_key is None and named.lower() in ("true", "1"))
        self._on_vertex = on_vertex
        self._api_key, self._credentials, self._base_url = api_key, credentials, base_url
        self.name = f"{self._model} ({'Vertex AI' if on_vertex else 'Gemini Developer API'})"
        self.max_texts = 1 if on_vertex else _MAX_TEXTS
        self.max_requests = max_requests or (_VERTEX_REQUESTS if on_vertex else _DEVELOPER_REQUESTS)
        wording = Wording(
            self.name,
            EmbeddingError,
            denied=CREDENTIALS_REMEDY if on_vertex else KEY_REMEDY,
            missing="no such model: check the model's name, and on Vertex AI that the region offers it",
            unreachable="check the connection and the proxy",
        )
        self._session = HttpSession(wording, base_url or _SERVICES[on_vertex], {}, timeout=None)
        self._client: Client | None = None
        self._post: Post | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of model, dimension and scaling: both services run the same model."""
        identity = ("gemini", self._model, self.dimension, self._normalize)
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]

    async def open(self) -> None:
        """Creates the client and embeds one word, to detect an invalid key, model or dimension; these are fatal."""
        if self._client is not None and self._session.is_open:
            return
        try:
            await self._session.open()
            with anyio.fail_after(REQUEST_SECONDS):
                # In a thread: the client reads files and creates TLS contexts (0.3 s), credentials may need a request.
                session = self._session.client
                self._client = await anyio.to_thread.run_sync(self._make_client, session, abandon_on_cancel=True)
            is_old = self._on_vertex and not self._model.startswith("gemini-")  # asked by another method
            self._post = None if is_old else genai_transport(self._client)
            await self.embed_queries(["search"])
        except BaseException as error:
            await self.aclose()
            if isinstance(error, RefusedInput):
                # The text is fine, so the service refuses the model or the dimension.
                raise EmbeddingError(f"{error}: check model and dimension", is_fatal=True) from None
            if isinstance(error, Exception):
                raise fault_of_client(error, self._session.wording) from None
            raise

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, "RETRIEVAL_QUERY")

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, "RETRIEVAL_DOCUMENT")

    async def aclose(self) -> None:
        client, self._client = self._client, None
        with anyio.move_on_after(_CLOSING_SECONDS, shield=True):
            await self._session.aclose()
            if client is not None:
                client.close()
                await client.aio.aclose()

    async def _embed(self, texts: Sequence[str], task_type: str) -> Vectors:
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        if len(texts) > self.max_texts:
            raise RefusedInput(f"{self.name}: {len(texts)} texts in a request, which takes at most {self.max_texts}")
        try:
            # Not by HttpOptions: the client sends its timeout along, and the service refuses those under 10 s with a 400. This one
            # also covers the token refresh.
            with anyio.fail_after(REQUEST_SECONDS):
                return self._vectors(await self._rows(texts, task_type), len(texts))
        except Exception as error:
            # The client's own errors hold the whole answer, which may quote key and texts: they are not passed on.
            raise fault_of_client(error, self._session.wording) from None

    async def _rows(self, texts: Sequence[str], task_type: str) -> list[Any]:
        """The answer to one request; by the client's public ``embed_content`` where its transport cannot be used."""
        if (client := self._client) is None:
            raise EmbeddingError(f"{self.name} is not open")
        if self._post is not None:
            path, body = embedding_request(self._model, texts, task_type, self.dimension, on_vertex=self._on_vertex)
            found = orjson.loads(await self._post(path, body))
            return [each["values"] for each in ([found["embedding"]] if self._on_vertex else found["embeddings"])]
        from google.genai.types import EmbedContentConfig

        # One Content per text: some models join a list of strings into one text.
        contents: Any = [{"parts": [{"text": text}]} for text in texts]
        config = EmbedContentConfig(task_type=task_type, output_dimensionality=self.dimension)
        answer = await client.aio.models.embed_content(model=self._model, contents=contents, config=config)
        return [embedding.values for embedding in answer.embeddings or ()]

    def _vectors(self, rows: list[Any], count: int) -> Vectors:
        """Validates the vectors: a wrong count would pair them with the wrong texts."""
        vectors = np.array(rows, np.float32)
        norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
        if vectors.shape != (count, self.dimension) or not (np.isfinite(norms) & (norms > 0)).all():
            raise malformed(self.name)
        return vectors / norms if self._normalize else vectors

    def _make_client(self, session: ClientSession) -> Client:
        """Imports Google's client, which takes 1 s, and creates one. Run in a thread."""
        from google import genai
        from google.genai import types

        # By default the client itself retries broken connections, after 1 to 10 s.
        options = types.HttpOptions(
            base_url=self._base_url,
            aiohttp_client=session,
            retry_options=types.HttpRetryOptions(attempts=1),
        )
        access: dict[str, Any] = {"api_key": self._api_key}
        if self._on_vertex:
            project = _from_environment("GCP_VERTEXAI_PROJECT_NUMBER", "GOOGLE_CLOUD_PROJECT")
            location = _from_environment("GCP_VERTEXAI_REGION", "GOOGLE_CLOUD_LOCATION") or "global"
            access = {"project": project or None, "location": location, "credentials": self._credentials}
        try:
            return genai.Client(vertexai=self._on_vertex, http_options=options, **access)
        except ValueError:  # no key, or no project
            raise EmbeddingError(f"{self.name}: {self._session.wording.denied}", is_fatal=True) from None


def embedding_request(
    model: str, texts: Sequence[str], task_type: str, dimension: int, *, on_vertex: bool
) -> tuple[str, dict[str, object]]:
    """Path and body of one request, as google-genai builds them: one Content per text, on Vertex AI a single one."""
    settings = {"taskType": task_type, "outputDimensionality": dimension}
    contents = [{"parts": [{"text": text}]} for text in texts]
    if not on_vertex:
        requests = [{"model": f"models/{model}", "content": content, **settings} for content in contents]
        return f"models/{model}:batchEmbedContents", {"requests": requests}
    return f"publishers/google/models/{model}:embedContent", {"content": contents[0], "embedContentConfig": settings}


def fault_of_client(error: Exception, wording: Wording) -> SearchError:
    """The fault for an exception of google-genai, aiohttp or google-auth."""
    from google.auth import exceptions as google_auth
    from google.genai import errors as genai

    name, kind = wording.name, type(error).__name__
    match error:
        case genai.APIError():
            return _fault_of_answer(error, wording)
        case google_auth.GoogleAuthError() if error.retryable or isinstance(error, google_auth.TransportError):
            return PassingFault(f"{name}: Google's token server failed ({kind})", cause="token")
        case google_auth.GoogleAuthError():
            return EmbeddingError(f"{name}: Google refused the credentials ({kind}): {wording.denied}", is_fatal=True)
        case _:
            return wording.of_exception(error)


def _fault_of_answer(error: Any, wording: Wording) -> SearchError:
    """The fault of an error response, a ``google.genai.errors.APIError``, by codes alone: its message may quote key and texts."""
    details = json.dumps(error.details, default=str)  # in which quoted text has no plain quotation marks
    codes = [str(error.status or ""), *re.findall(r'"(?:reason|quotaId)": "([\w-]+)"', details)]
    said = [code for code in codes if _CODE.fullmatch(code)]
    delays = re.findall(r'"retryDelay": "(\d{1,9}(?:\.\d{1,9})?)s"', details)
    headers = getattr(error.response, "headers", None) or {}
    wait = max(
        (seconds for seconds in (retry_after(headers), *map(float, delays)) if seconds is not None), default=None
    )
    status = int(error.code or 0)
    if any(code.startswith("API_KEY_") for code in said):
        status = 401
    elif error.status == "FAILED_PRECONDITION":
        return EmbeddingError(
            f"{wording.name}: {status} {', '.join(said)}: the API is not offered at this place, or needs billing",
            is_fatal=True,
        )
    return wording.of_status(status, ", ".join(said), wait)


def _plain_name(model: str) -> str:
    """The model's name without the service's path prefix."""
    name = model.rsplit("/", 1)[-1]
    if name.startswith("gemini-") and not name.startswith(("gemini-embedding-001", "gemini-embedding-exp")):
        raise ConfigurationError(
            f"the model {name!r} is not supported: it has no task types for queries and passages; use {DEFAULT_MODEL!r}"
        )
    return name


def _from_environment(*names: str) -> str:
    """The first variable that is set, or an empty string."""
    return next((value for name in names if (value := os.environ.get(name))), "")


def make_embedder(embedder: str | Path | Embedder) -> Embedder:
    """A :class:`GeminiEmbedder` for ``"gemini"`` and names that start with ``"gemini-"``, or a
    :class:`SentenceTransformerEmbedder` for any other name or folder; an :class:`Embedder` is returned as is.

    Raises:
        ConfigurationError: an unsupported Gemini model.
        EmbeddingError: no such folder, or sentence-transformers is not installed.
    """
    if isinstance(embedder, str) and (embedder == "gemini" or embedder.startswith("gemini-")):
        return GeminiEmbedder(DEFAULT_MODEL if embedder == "gemini" else embedder)
    return SentenceTransformerEmbedder(embedder) if isinstance(embedder, str | Path) else embedder
