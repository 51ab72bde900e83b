"""Wire format of a served search: requests, answers and facts, without I/O.

Vectors are sent as raw little-endian float32, about 100 times cheaper than base64 within JSON. Everything else is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

import numpy as np
import orjson

from searchr1_async.boundary.settings import Count, Range, Seconds, check_settings
from searchr1_async.episodes.prompts import clean_query
from searchr1_async.episodes.types import Passage
from searchr1_async.search.embedders import Vectors, estimated_tokens
from searchr1_async.search.stores.vector_store import Found

SERVICE = "searchr1_async search"
PROTOCOL = 1
DIMENSION_HEADER = "X-Dimension"
"""Dimension of the vectors in an answer."""
EMBEDDER_HEADER = "X-Embedder"
"""Percent-encoded fingerprint of the embedder that made the vectors in an answer."""
_PLACE = re.compile(r"\s+(?=(?:in|at)\s|[/~\\]|[A-Za-z]:[/\\]|\w+://)")


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """Size and concurrency limits of requests. Raises ConfigurationError if one is out of range."""

    body_bytes: Count = 8 << 20
    """Per request; larger bodies get 413. 256 vectors of 3,072 numbers have 4.2 MB."""
    texts: Count = 256
    """Per ``/embed`` request."""
    vectors: Count = 256
    """Per ``/query`` request."""
    queries: Count = 4_096
    """Per ``/retrieve`` request; the original client sends a whole batch, 2,560 with its settings."""
    results: Annotated[int, Range(at_least=1, at_most=100)] = 100
    """Passages per query, 1 to 100."""
    requests: Count = 64
    """Concurrent requests; further ones get 429 with ``Retry-After``."""
    seconds: Seconds = 120.0
    """Per request, including reading its body; then it gets 504."""
    grace: Seconds = 5.0
    """Seconds to finish requests in flight at shutdown."""

    def __post_init__(self) -> None:
        check_settings(self, "the limit ")


class BadRequest(Exception):
    """A refused request: ``kind`` is one word for programs, ``message`` quotes nothing of the request."""

    def __init__(self, kind: str, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


@dataclass(frozen=True, slots=True)
class ServedFacts:
    """The answer of ``GET /health``."""

    url: str
    """As the client reaches it."""
    store: str
    """Name without folder or address."""
    store_fingerprint: str
    passages: int
    dimension: int
    """Of the vectors."""
    embedder: str
    """Name; for a model's folder only the last part."""
    embedder_fingerprint: str
    max_queries: int
    """Vectors per request."""
    max_texts: int
    """Texts per request."""
    max_tokens: int | None
    """Of all texts of a request; None for no limit."""
    query_requests: int
    """Concurrent ``/query`` requests."""
    embed_requests: int
    """Concurrent ``/embed`` requests."""
    limits: Mapping[str, float]
    """See :class:`~searchr1_async.search.wire.ServingLimits`."""
    is_authorized: bool = True
    """Whether the request had the token, if one is required."""

    def to_json(self, version: str) -> dict[str, Any]:
        """Without the URL, which the client knows."""
        values = asdict(self)
        del values["url"]
        return {"service": SERVICE, "version": version, "protocol": PROTOCOL, **values}

    @classmethod
    def from_json(cls, url: str, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`. Raises KeyError, TypeError or ValueError."""
        tokens = values["max_tokens"]
        return cls(
            url=url,
            store=str(values["store"]),
            store_fingerprint=str(values["store_fingerprint"]),
            passages=int(values["passages"]),
            dimension=int(values["dimension"]),
            embedder=str(values["embedder"]),
            embedder_fingerprint=str(values["embedder_fingerprint"]),
            max_queries=max(1, int(values["max_queries"])),
            max_texts=max(1, int(values["max_texts"])),
            max_tokens=None if tokens is None else max(1, int(tokens)),
            query_requests=max(1, int(values["query_requests"])),
            embed_requests=max(1, int(values["embed_requests"])),
            limits=dict(values["limits"]),
            is_authorized=bool(values["is_authorized"]),
        )


def shown_name(name: str) -> str:
    """Strips a folder or address from the name of a store or an embedder."""
    if re.match(r"[/~\\]|[A-Za-z]:[/\\]", name):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return _PLACE.split(name, maxsplit=1)[0]


def dumps(value: Any) -> bytes:
    """JSON; falls back to escapes for lone surrogates, which orjson rejects."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value).encode()


def loads(body: bytes) -> Any:
    """Parses JSON, including lone surrogates, which orjson rejects but Python's ``requests`` sends. Raises ValueError."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            return json.loads(body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def pack_vectors(vectors: Vectors) -> bytes:
    """Row-major bytes of vectors ``[rows, dimension]``."""
    return vectors.astype("<f4", copy=False).tobytes()


def unpack_vectors(body: bytes, dimension: int) -> Vectors:
    """Inverse of :func:`pack_vectors`. Raises ValueError."""
    if dimension < 1 or len(body) % (4 * dimension):
        raise ValueError("not whole vectors")
    return np.frombuffer(body, "<f4").astype(np.float32, copy=False).reshape(-1, dimension)


def pack_found(found: Found) -> list[list[tuple[str, str, str, float]]]:
    """The passages of each query as id, title, text and score."""
    return [[(each.id, each.title, each.text, float(each.score)) for each in passages] for passages in found]


def unpack_found(packed: Any) -> Found:
    """Inverse of :func:`pack_found`. Raises TypeError or ValueError."""
    return tuple(
        tuple(Passage(own_id, title, text, float(score)) for own_id, title, text, score in passages)
        for passages in packed
    )


@dataclass(frozen=True, slots=True)
class Embed:
    """``POST /embed``."""

    texts: Sequence[str]
    are_passages: bool


@dataclass(frozen=True, slots=True)
class Query:
    """``POST /query``."""

    vectors: Vectors
    n_results: int


@dataclass(frozen=True, slots=True)
class Retrieve:
    """``POST /retrieve``, compatible with the original server."""

    queries: Sequence[str | None]
    """Cleaned; None for unsearchable ones."""
    n_results: int | None
    """None for the search's default."""
    with_scores: bool


def read_embed(body: bytes, limits: ServingLimits) -> Embed:
    """Parses a request. Raises BadRequest if malformed or beyond a limit."""
    fields = _object(body)
    texts = _texts(fields, "texts", limits.texts)
    if not all(_is_unicode(text) for text in texts):
        raise BadRequest("refused", "a text is not valid Unicode: it has a lone surrogate")
    kind = fields.get("kind", "query")
    if kind not in ("query", "passage"):
        raise BadRequest("malformed", 'kind must be "query" or "passage"')
    return Embed(texts, kind == "passage")


def read_query(body: bytes, dimension: str, n_results: str, limits: ServingLimits) -> Query:
    """Parses a request's body and query parameters. Raises BadRequest if malformed or beyond a limit."""
    try:
        vectors = unpack_vectors(body, _parse_integer(dimension))
        wanted = _parse_integer(n_results)
    except ValueError as error:
        raise BadRequest(
            "malformed",
            "POST /query?dimension=N&n_results=K expects vectors of N little-endian float32 each as its body",
        ) from error
    if len(vectors) > limits.vectors:
        raise BadRequest("too_many", f"{len(vectors)} vectors in a request: send at most {limits.vectors}", 413)
    if not np.isfinite(vectors).all():
        raise BadRequest("refused", "a vector is not finite")
    return Query(vectors, _results(wanted, "n_results", limits))


def read_retrieve(body: bytes, limits: ServingLimits) -> Retrieve:
    """Parses a request. Raises BadRequest if malformed or beyond a limit."""
    fields = _object(body)
    texts = _texts(fields, "queries", limits.queries)
    wanted, with_scores = fields.get("topk"), fields.get("return_scores", False)
    if not isinstance(with_scores, bool):
        raise BadRequest("malformed", "return_scores must be true or false")
    # The original treats a topk of 0 as missing.
    n_results = None if wanted is None or (_is_number(wanted) and wanted == 0) else _results(wanted, "topk", limits)
    return Retrieve([clean_query(text) for text in texts], n_results, with_scores)


def retrieved(found: Iterator[Sequence[Passage]], asked: Retrieve) -> dict[str, Any]:
    """The original's answer format; an empty list for unsearchable queries."""
    rows = [() if query is None else next(found) for query in asked.queries]
    if asked.with_scores:
        return {"result": [[{"document": _document(each), "score": float(each.score)} for each in row] for row in rows]}
    return {"result": [[_document(each) for each in row] for row in rows]}


def _document(passage: Passage) -> dict[str, str]:
    """A row of the original's corpus: the title in quotes, a newline, the text."""
    title = " ".join(passage.title.split())  # clients take the first line as the title
    return {"id": passage.id, "contents": f'"{title}"\n{passage.text}'}


def parts_of(texts: Sequence[str], most: int, most_tokens: int | None) -> Iterator[Sequence[str]]:
    """Splits texts into as few requests as the embedder allows; a text beyond its token limit goes alone."""
    start = tokens = 0
    for number, text in enumerate(texts):
        weight = estimated_tokens(text)
        if number > start and (number - start >= most or (most_tokens is not None and tokens + weight > most_tokens)):
            yield texts[start:number]
            start, tokens = number, 0
        tokens += weight
    if start < len(texts):
        yield texts[start:]


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        found = loads(body)
    except ValueError as error:
        raise BadRequest("malformed", "the body is not JSON", 400) from error
    if not isinstance(found, dict):
        raise BadRequest("malformed", "the body is not a JSON object", 400)
    return found


def _texts(fields: Mapping[str, Any], name: str, most: int) -> Sequence[str]:
    texts = fields.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("malformed", f"{name} must be a list of strings")
    if len(texts) > most:
        raise BadRequest("too_many", f"{len(texts)} {name} in a request: send at most {most}", 413)
    return texts


def _results(wanted: Any, name: str, limits: ServingLimits) -> int:
    if not _is_number(wanted) or not 1 <= wanted <= limits.results:
        raise BadRequest("malformed", f"{name} must be an integer from 1 to {limits.results}")
    return wanted


def _parse_integer(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ValueError("not a number")
    return int(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
