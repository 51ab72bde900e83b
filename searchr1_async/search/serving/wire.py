"""What goes over the wire between a served search and those who ask it: requests, answers and facts, without any I/O.

Vectors go as a body of bytes, little-endian float32: 128 of 768 numbers are written and read in 0.02 ms of CPU that way, in
2.4 ms as base64 within JSON, in 28 ms as JSON numbers (4 % of a core at 1,000 queries a second with base64). All else is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import orjson

from searchr1_async.episodes.types import Passage
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.queries import clean_query
from searchr1_async.search.serving.limits import ServingLimits
from searchr1_async.search.stores.base import Found

SERVICE = "searchr1_async search"
PROTOCOL = 1
DIMENSION_HEADER = "X-Dimension"
"""Of an answer with vectors: numbers each."""
EMBEDDER_HEADER = "X-Embedder"
"""Of an answer with vectors: the fingerprint of what made them, percent-encoded."""

_PLACE = re.compile(r"\s+(?=(?:in|at)\s|[/~\\]|[A-Za-z]:[/\\]|\w+://)")


class BadRequest(Exception):
    """A request that is refused for what it is.

    Args:
        kind: one word, for programs.
        message: for people; quotes nothing of the request.
        status: of HTTP.
    """

    def __init__(self, kind: str, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


@dataclass(frozen=True, slots=True)
class ServedFacts:
    """What ``GET /health`` says of a search that is served."""

    url: str
    """As the client reaches it."""
    store: str
    """Its name, without its folder or address."""
    store_fingerprint: str
    passages: int
    dimension: int
    """Numbers a vector."""
    embedder: str
    """Its name; a model's folder by its last part alone."""
    embedder_fingerprint: str
    max_queries: int
    """Vectors a request."""
    max_texts: int
    """Texts a request."""
    max_tokens: int | None
    """Of all texts of a request; None where there is no such limit."""
    query_requests: int
    """To look up, at once, at most."""
    embed_requests: int
    """To embed, at once, at most."""
    limits: Mapping[str, float]
    """See :class:`~searchr1_async.search.serving.limits.ServingLimits`."""
    is_authorized: bool = True
    """Whether whoever asked may ask the rest as well: no token is needed, or it was given."""

    def to_json(self, version: str) -> dict[str, Any]:
        """What is sent; whoever reads it knows the address."""
        values = asdict(self)
        del values["url"]
        return {"service": SERVICE, "version": version, "protocol": PROTOCOL, **values}

    @classmethod
    def from_json(cls, url: str, values: Mapping[str, Any]) -> Self:
        """What was sent.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
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
    """A store's or an embedder's name without the folder or address that it may hold."""
    if re.match(r"[/~\\]|[A-Za-z]:[/\\]", name):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return _PLACE.split(name, maxsplit=1)[0]


def dumps(value: Any) -> bytes:
    """JSON; with escapes where a text is no Unicode, which orjson does not write."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value).encode()


def loads(body: bytes) -> Any:
    """Reads JSON, that with lone surrogates too, which orjson refuses and Python's ``requests`` sends.

    Raises:
        ValueError: it is none.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            return json.loads(body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def pack_vectors(vectors: Vectors) -> bytes:
    """Vectors ``[rows, dimension]`` as bytes, row after row."""
    return vectors.astype("<f4", copy=False).tobytes()


def unpack_vectors(body: bytes, dimension: int) -> Vectors:
    """What :func:`pack_vectors` made.

    Raises:
        ValueError: something else.
    """
    if dimension < 1 or len(body) % (4 * dimension):
        raise ValueError("not whole vectors")
    return np.frombuffer(body, "<f4").astype(np.float32, copy=False).reshape(-1, dimension)


def pack_found(found: Found) -> list[list[tuple[str, str, str, float]]]:
    """For each query its passages, as id, title, text and score."""
    return [[(each.id, each.title, each.text, float(each.score)) for each in passages] for passages in found]


def unpack_found(packed: Any) -> Found:
    """What :func:`pack_found` made.

    Raises:
        TypeError, ValueError: something else.
    """
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
    """``POST /retrieve``, as the original's server takes it."""

    queries: Sequence[str | None]
    """Cleaned; None where there is nothing to search for."""
    n_results: int | None
    """None: as many as the search gives by itself."""
    with_scores: bool


def read_embed(body: bytes, limits: ServingLimits) -> Embed:
    """Reads a request.

    Raises:
        BadRequest: it is none, or beyond a limit.
    """
    fields = _object(body)
    texts = _texts(fields, "texts", limits.texts)
    if not all(_is_unicode(text) for text in texts):
        raise BadRequest("refused", "a text is no Unicode: it holds a lone surrogate")
    kind = fields.get("kind", "query")
    if kind not in ("query", "passage"):
        raise BadRequest("malformed", 'kind is neither "query" nor "passage"')
    return Embed(texts, kind == "passage")


def read_query(body: bytes, dimension: str, n_results: str, limits: ServingLimits) -> Query:
    """Reads a request: its body, and what its address says.

    Raises:
        BadRequest: it is none, or beyond a limit.
    """
    try:
        vectors = unpack_vectors(body, _whole(dimension))
        wanted = _whole(n_results)
    except ValueError as error:
        raise BadRequest(
            "malformed",
            "POST /query?dimension=N&n_results=K wants vectors of N float32 each, little-endian, as its body",
        ) from error
    if len(vectors) > limits.vectors:
        raise BadRequest("too_many", f"{len(vectors)} vectors in a request: give at most {limits.vectors}", 413)
    if not np.isfinite(vectors).all():
        raise BadRequest("refused", "a vector holds numbers that are not finite")
    return Query(vectors, _results(wanted, "n_results", limits))


def read_retrieve(body: bytes, limits: ServingLimits) -> Retrieve:
    """Reads a request.

    Raises:
        BadRequest: it is none, or beyond a limit.
    """
    fields = _object(body)
    texts = _texts(fields, "queries", limits.queries)
    wanted, with_scores = fields.get("topk"), fields.get("return_scores", False)
    if not isinstance(with_scores, bool):
        raise BadRequest("malformed", "return_scores is neither true nor false")
    # To the original a topk of 0 is none.
    n_results = None if wanted is None or (_is_number(wanted) and wanted == 0) else _results(wanted, "topk", limits)
    return Retrieve([clean_query(text) for text in texts], n_results, with_scores)


def retrieved(found: Iterator[Sequence[Passage]], asked: Retrieve) -> dict[str, Any]:
    """The original's answer: an empty list for what could not be searched for."""
    rows = [() if query is None else next(found) for query in asked.queries]
    if asked.with_scores:
        return {"result": [[{"document": _document(each), "score": float(each.score)} for each in row] for row in rows]}
    return {"result": [[_document(each) for each in row] for row in rows]}


def _document(passage: Passage) -> dict[str, str]:
    """A row of the original's corpus: the title in quotes, a newline, the text."""
    title = " ".join(passage.title.split())  # its clients take the first line for the title
    return {"id": passage.id, "contents": f'"{title}"\n{passage.text}'}


def parts_of(texts: Sequence[str], most: int, most_tokens: int | None) -> Iterator[Sequence[str]]:
    """The texts in as few requests as the embedder takes them in; a text beyond its tokens goes alone."""
    start = tokens = 0
    for number, text in enumerate(texts):
        weight = len(text.encode("utf-8", "surrogatepass")) // 3 + 1
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
        raise BadRequest("malformed", "the body is no JSON", 400) from error
    if not isinstance(found, dict):
        raise BadRequest("malformed", "the body is no JSON object", 400)
    return found


def _texts(fields: Mapping[str, Any], name: str, most: int) -> Sequence[str]:
    texts = fields.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("malformed", f"{name} is no list of texts")
    if len(texts) > most:
        raise BadRequest("too_many", f"{len(texts)} {name} in a request: give at most {most}", 413)
    return texts


def _results(wanted: Any, name: str, limits: ServingLimits) -> int:
    if not _is_number(wanted) or not 1 <= wanted <= limits.results:
        raise BadRequest("malformed", f"{name} is no number from 1 to {limits.results}")
    return wanted


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ValueError("no number")
    return int(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
