"""Google's Gemini embedding models, via the Gemini Developer API or Vertex AI; and embedders by name."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack
from urllib.request import getproxies

import anyio
import anyio.to_thread
import numpy as np

from searchr1_async.errors import ConfigurationError, EmbeddingError
from searchr1_async.search.embedders import Embedder, SentenceTransformerEmbedder, Vectors
from searchr1_async.search.faults import KEY_REMEDY, PassingFault, RefusedInput, classify

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from google.auth.credentials import Credentials
    from google.genai import Client

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "gemini-embedding-001"
_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_PROBE = "search"
"""The text embedded by :meth:`GeminiEmbedder.open`."""
_MAX_TEXTS = 100
"""Limit of the Developer API ("at most 100 requests can be in one batch"). Vertex AI takes up to 250, but 20,000 tokens."""
_VERTEX_TOKENS = 20_000
_DEVELOPER_REQUESTS, _VERTEX_LIST_REQUESTS, _VERTEX_SINGLE_REQUESTS = 16, 16, 128
_CLOSING_SECONDS = 5.0
_IDLE_SECONDS = 60.0
"""Keep-alive: searches come in waves, and a TLS handshake costs two round trips."""


class GeminiOptions(TypedDict, total=False):
    """Options of :class:`GeminiEmbedder` besides the model."""

    dimension: int
    """128 to 3,072 for gemini-embedding-001; default 768; 768, 1,536 and 3,072 are recommended."""
    normalize: bool
    """Scale vectors to unit length, which the service does only at 3,072 dimensions. Default off, as for the prebuilt index
    of Wikipedia 2018, which stores raw vectors and ranks by Euclidean distance."""
    api_key: str | None
    """Of the Developer API; default ``GOOGLE_API_KEY``, then ``GEMINI_API_KEY``."""
    vertex: bool | None
    """Vertex AI (True), the Developer API (False), or inferred (None, the default)."""
    project: str | None
    """Id or number; default ``GCP_VERTEXAI_PROJECT_NUMBER``, ``GOOGLE_CLOUD_PROJECT``, or that of the credentials."""
    location: str | None
    """Region; default ``GCP_VERTEXAI_REGION``, ``GOOGLE_CLOUD_LOCATION``, or ``"global"``."""
    credentials: Credentials | None
    """Of google-auth; default application default credentials."""
    vertex_lists: bool
    """Send lists of texts to Vertex AI too; default False. Its documentation allows one text per request for
    gemini-embedding-001; if a list is refused, ``max_texts`` falls to 1."""
    max_requests: int | None
    """Maximum concurrent requests. None (default) for 16, or 128 if a request holds one text."""
    timeout: float
    """Seconds per request, default 60, including token refresh; the caller's deadline is usually shorter."""
    base_url: str | None
    """Of another endpoint (a proxy, a stand-in)."""


@dataclass(frozen=True, slots=True)
class GeminiSettings:
    """:class:`GeminiOptions` with defaults. Raises ConfigurationError if they are out of range or conflict."""

    dimension: int = 768
    normalize: bool = False
    api_key: str | None = field(default=None, repr=False)
    vertex: bool | None = None
    project: str | None = None
    location: str | None = None
    credentials: Credentials | None = field(default=None, repr=False)
    vertex_lists: bool = False
    max_requests: int | None = None
    timeout: float = 60.0
    base_url: str | None = None

    def __post_init__(self) -> None:
        for name in ("dimension", "max_requests", "timeout"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigurationError(f"{name} of the Gemini embedder is {value}: it must be positive")
        of_vertex = self._has_vertex_options
        if (self.api_key and (self.vertex or of_vertex)) or (of_vertex and self.vertex is False):
            raise ConfigurationError(
                "arguments of the Gemini embedder belong to two services: api_key to the Developer API; project, location "
                "and credentials to Vertex AI"
            )

    @property
    def _has_vertex_options(self) -> bool:
        return bool(self.project or self.location or self.credentials)

    def on_vertex(self) -> bool:
        """Whether requests go to Vertex AI; reads the environment."""
        if self.vertex is not None:
            return self.vertex
        return self._has_vertex_options or (self.api_key is None and _vertex_from_environment())


class GeminiEmbedder:
    """A Gemini embedding model through Google's client, one request per call.

    Uses Vertex AI if ``vertex`` is True; if it is None, also if a project, a location or credentials are given, or if no
    ``api_key`` is given and ``GOOGLE_GENAI_USE_VERTEXAI`` is ``true`` or ``1``. Otherwise uses the Developer API. The service
    silently truncates texts of more than 2,048 tokens.

    Args:
        model: Google's name. Not gemini-embedding-2 or later, which have no task types.
        options: see :class:`GeminiOptions`.

    Raises:
        ConfigurationError: conflicting arguments, or an unsupported model.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Unpack[GeminiOptions]) -> None:
        self._model = _plain_name(model)
        self._settings = settings = GeminiSettings(**options)
        self._on_vertex = settings.on_vertex()
        self._project, self._credentials = settings.project, settings.credentials
        self._max_texts = _MAX_TEXTS if settings.vertex_lists or not self._on_vertex else 1
        self._lists_accepted = not self._on_vertex
        self._session: ClientSession | None = None
        self._client: Client | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._secrets: tuple[str, ...] = ()
        self._uses_transport = self._model.startswith("gemini-") or not self._on_vertex

    @property
    def name(self) -> str:
        return f"{self._model} ({'Vertex AI' if self._on_vertex else 'Gemini Developer API'})"

    @property
    def fingerprint(self) -> str:
        """Hash of model, dimension and scaling: both services run the same model."""
        return hashlib.sha256(
            repr(("gemini", self._model, self._settings.dimension, self._settings.normalize)).encode()
        ).hexdigest()[:32]

    @property
    def dimension(self) -> int:
        return self._settings.dimension

    @property
    def max_texts(self) -> int:
        return self._max_texts

    @property
    def max_tokens(self) -> int | None:
        """20,000 on Vertex AI (its quotas page); the Developer API documents no limit."""
        return _VERTEX_TOKENS if self._on_vertex else None

    @property
    def max_requests(self) -> int:
        if self._settings.max_requests is not None:
            return self._settings.max_requests
        if not self._on_vertex:
            return _DEVELOPER_REQUESTS
        return _VERTEX_LIST_REQUESTS if self._max_texts > 1 else _VERTEX_SINGLE_REQUESTS

    async def open(self) -> None:
        """Creates the client and embeds one word, to detect an invalid key, model or dimension.

        Raises:
            PassingFault: the service does not answer.
            EmbeddingError: no key or credentials, or the service refuses them, the model or the dimension; fatal.
        """
        if self._client is not None:
            if self._loop is asyncio.get_running_loop():
                return
            if self._session is not None:  # left open by a closed event loop
                self._session.detach()
            self._session = self._client = None
        self._loop = asyncio.get_running_loop()
        try:
            with anyio.fail_after(self._settings.timeout):
                # In threads: the client reads files and creates TLS contexts (0.3 s), credentials may need a request.
                if self._on_vertex:
                    await anyio.to_thread.run_sync(self._find_credentials, abandon_on_cancel=True)
                self._session = _make_session()
                self._client = await anyio.to_thread.run_sync(self._make_client, self._session)
            await self._probe()
        except BaseException as error:
            await self.aclose()
            if isinstance(error, Exception):
                raise self._fault(error) from None
            raise

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, "RETRIEVAL_QUERY")

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, "RETRIEVAL_DOCUMENT")

    async def aclose(self) -> None:
        session, self._session = self._session, None
        client, self._client = self._client, None
        with anyio.move_on_after(_CLOSING_SECONDS, shield=True):
            if session is not None:
                await session.close()
            if client is not None:
                client.close()
                await client.aio.aclose()

    async def _embed(self, texts: Sequence[str], task_type: str) -> Vectors:
        if not texts:
            return np.empty((0, self._settings.dimension), np.float32)
        try:
            vectors = await self._request(texts, task_type)
        except Exception as error:
            # The client's own errors hold the whole answer, which may quote key and texts: they are not passed on.
            raise self._refused_list(error, texts) or self._fault(error, texts) from None
        self._lists_accepted = self._lists_accepted or len(texts) > 1
        return vectors

    async def _request(self, texts: Sequence[str], task_type: str) -> Vectors:
        if self._client is None:
            raise EmbeddingError(f"{self.name} is not open")
        # Not in HttpOptions: the client sends its timeout along, and the service refuses those under 10 s with a 400.
        # This one also covers the token refresh.
        with anyio.fail_after(self._settings.timeout):
            if self._uses_transport:
                rows = await self._rows_by_transport(self._client, texts, task_type)
            else:
                rows = await self._rows_by_models(self._client, texts, task_type)
        return self._vectors(rows, len(texts))

    async def _rows_by_models(self, client: Client, texts: Sequence[str], task_type: str) -> list[Any]:
        """Uses the client's public ``embed_content``, whose pydantic models block the event loop up to 45 ms per 100 texts."""
        from google.genai.types import EmbedContentConfig

        # One Content per text: some models join a list of strings into one text.
        contents: Any = [{"parts": [{"text": text}]} for text in texts]
        config = EmbedContentConfig(task_type=task_type, output_dimensionality=self._settings.dimension)
        answer = await client.aio.models.embed_content(model=self._model, contents=contents, config=config)
        return [embedding.values for embedding in answer.embeddings or ()]

    async def _rows_by_transport(self, client: Client, texts: Sequence[str], task_type: str) -> list[Any]:
        """Same request through the client's private transport, at a quarter of the CPU. :meth:`_probe` checks it."""
        import orjson

        path, body = embedding_request(
            self._model, texts, task_type, self._settings.dimension, on_vertex=self._on_vertex
        )
        answer = await client.aio._api_client.async_request("post", path, body, None)
        found = orjson.loads(answer.body or "")
        return [one["values"] for one in ([found["embedding"]] if "embedding" in found else found["embeddings"])]

    def _vectors(self, rows: list[Any], count: int) -> Vectors:
        """Validates the vectors: a wrong count would pair them with the wrong texts."""
        if len(rows) != count:
            raise PassingFault(f"{self.name}: {len(rows)} vectors for {count} texts", cause="malformed")
        lengths = {len(row) for row in rows}
        if lengths != {self._settings.dimension}:
            raise PassingFault(
                f"{self.name}: vectors of dimension {sorted(lengths)}, expected {self._settings.dimension}",
                cause="malformed",
            )
        vectors = np.array(rows, np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise PassingFault(f"{self.name}: a vector is zero or not finite", cause="malformed")
        return vectors / norms if self._settings.normalize else vectors

    def _refused_list(self, error: Exception, texts: Sequence[str]) -> RefusedInput | None:
        """If Vertex AI may have refused the texts for being a list, switches to one text per request."""
        if self._lists_accepted or len(texts) == 1:
            return None
        # Regions without the batch method answer 404 or 501.
        is_refused = isinstance(self._fault(error), RefusedInput) or getattr(error, "code", None) in (404, 501)
        if not is_refused and not _client_refuses_lists(error):
            return None
        self._max_texts = 1
        logger.warning(
            "%s does not accept several texts per request; sending one text per request from now on", self.name
        )
        return RefusedInput(f"{self.name} refuses a list of {len(texts)} texts; it accepts one text per request")

    def _fault(self, error: Exception, texts: Sequence[str] = ()) -> Exception:
        return classify(error, where=self.name, on_vertex=self._on_vertex, texts=texts, secrets=self._known_secrets())

    def _known_secrets(self) -> tuple[str, ...]:
        token = getattr(self._credentials, "token", None)
        return (*self._secrets, token) if isinstance(token, str) else self._secrets

    async def _probe(self) -> None:
        try:
            try:
                await self._request([_PROBE], "RETRIEVAL_QUERY")
            except (AttributeError, TypeError):
                if not self._uses_transport:
                    raise
                logger.info("%s: unknown google-genai version; falling back to embed_content", self.name)
                self._uses_transport = False
                await self._request([_PROBE], "RETRIEVAL_QUERY")
        except Exception as error:
            fault = self._fault(error)
            if isinstance(fault, RefusedInput):
                # The text is fine, so the service refuses the model or the dimension.
                raise EmbeddingError(f"{fault}: check model and dimension", is_fatal=True) from None
            raise fault from None

    def _find_credentials(self) -> None:
        """Finds credentials and project, from a file or Google's metadata server. Run in a thread."""
        import google.auth
        import google.genai.errors

        project = (
            self._project or os.environ.get("GCP_VERTEXAI_PROJECT_NUMBER") or os.environ.get("GOOGLE_CLOUD_PROJECT")
        )
        if self._credentials is None:
            self._credentials, found = google.auth.default(scopes=_SCOPES)
            project = project or found
        if not project:
            raise EmbeddingError(
                f"{self.name} needs a project: set GCP_VERTEXAI_PROJECT_NUMBER or GOOGLE_CLOUD_PROJECT", is_fatal=True
            )
        self._project = project

    def _make_client(self, session: ClientSession) -> Client:
        """Imports Google's client, which takes 1 s, and creates one. Run in a thread."""
        from google import genai
        from google.genai import types

        # By default the client itself retries broken connections, after 1 to 10 s.
        options = types.HttpOptions(
            base_url=self._settings.base_url, aiohttp_client=session, retry_options=types.HttpRetryOptions(attempts=1)
        )
        if self._on_vertex:
            environment = os.environ
            location = (
                self._settings.location
                or environment.get("GCP_VERTEXAI_REGION")
                or environment.get("GOOGLE_CLOUD_LOCATION")
                or "global"
            )
            return genai.Client(
                vertexai=True,
                project=self._project,
                location=location,
                credentials=self._credentials,
                http_options=options,
            )
        key = self._settings.api_key or os.environ.get("GOOGLE_API_KEY") or os.environ.get("GEMINI_API_KEY")
        if not key or not key.strip():
            raise EmbeddingError(f"{self.name} needs a key: {KEY_REMEDY}", is_fatal=True)
        self._secrets = (key.strip(),)
        return genai.Client(vertexai=False, api_key=key.strip(), http_options=options)


def embedding_request(
    model: str, texts: Sequence[str], task_type: str, dimension: int, *, on_vertex: bool
) -> tuple[str, dict[str, object]]:
    """Path and body of one request, as google-genai 3.4 builds them: one Content per text."""
    settings = {"taskType": task_type, "outputDimensionality": dimension}
    contents = [{"parts": [{"text": text}]} for text in texts]
    if not on_vertex:
        requests = [{"model": f"models/{model}", "content": content, **settings} for content in contents]
        return f"models/{model}:batchEmbedContents", {"requests": requests}
    place = f"publishers/google/models/{model}"
    if len(contents) == 1:
        return f"{place}:embedContent", {"content": contents[0], "embedContentConfig": settings}
    return f"{place}:batchEmbedContents", {
        "requests": [{"content": content, "embedContentConfig": settings} for content in contents]
    }


def _make_session() -> ClientSession:
    """The client's own session would use a subclass that aiohttp warns about, and close idle connections after 15 s."""
    from aiohttp import ClientSession, DummyCookieJar, TCPConnector

    # With trust_env, aiohttp reads the whole environment for every request.
    return ClientSession(
        connector=TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS),
        cookie_jar=DummyCookieJar(),
        trust_env=bool(getproxies()),
    )


def _plain_name(model: str) -> str:
    """The model's name without the service's path prefix."""
    name = model.rsplit("/", 1)[-1]
    if not name:
        raise ConfigurationError("the Gemini embedder needs a model name")
    if name.startswith("gemini-") and not name.startswith(("gemini-embedding-001", "gemini-embedding-exp")):
        raise ConfigurationError(
            f"the model {name!r} is not supported: it has no task types for queries and passages; use {DEFAULT_MODEL!r}"
        )
    return name


def _vertex_from_environment() -> bool:
    """Like Google's client: the newer variable wins."""
    value = os.environ.get("GOOGLE_GENAI_USE_ENTERPRISE") or os.environ.get("GOOGLE_GENAI_USE_VERTEXAI") or ""
    return value.lower() in ("true", "1")


def _client_refuses_lists(error: Exception) -> bool:
    """Older google-genai versions, without Vertex AI's batchEmbedContents, refuse lists locally."""
    return type(error) is ValueError and "only supports one content at a time" in str(error)


def make_embedder(embedder: str | Path | Embedder) -> Embedder:
    """An embedder from its model's name or folder; an :class:`Embedder` is returned as is.

    ``"gemini"`` and names that start with ``"gemini-"`` give a :class:`GeminiEmbedder`, any other name or
    :class:`~pathlib.Path` a :class:`SentenceTransformerEmbedder`, both with defaults.

    Raises:
        ConfigurationError: an unsupported Gemini model.
        EmbeddingError: no such folder, or sentence-transformers is not installed.
    """
    if isinstance(embedder, str):
        if embedder == "gemini":
            return GeminiEmbedder()
        if embedder.startswith("gemini-"):
            return GeminiEmbedder(embedder)
    return SentenceTransformerEmbedder(embedder) if isinstance(embedder, str | Path) else embedder
