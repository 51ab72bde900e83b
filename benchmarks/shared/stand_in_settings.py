"""How the Gemini stand-in behaves, what can go wrong with its answers, and what it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal


class Fault(StrEnum):
    """What can be wrong with one answer."""

    TOO_MANY = "too_many"
    """429, with the delay where :attr:`StandInSettings.says_when` puts it."""
    TOO_MANY_SILENT = "too_many_silent"
    """429 that does not say when to come again."""
    INTERNAL = "internal"
    """500."""
    UNAVAILABLE = "unavailable"
    """503."""
    UNAVAILABLE_TIMED = "unavailable_timed"
    """503 with ``Retry-After``."""
    BAD_GATEWAY = "bad_gateway"
    """502 with a page of HTML, as a proxy gives it."""
    RESET = "reset"
    """The connection is cut before any answer."""
    SLOW = "slow"
    """A good answer after :attr:`StandInSettings.slow_seconds`."""
    CUT_SHORT = "cut_short"
    """The connection ends within the body."""
    BROKEN_JSON = "broken_json"
    """A whole answer of half a document."""
    EMPTY = "empty"
    """200 with nothing in it."""
    ONE_FEWER = "one_fewer"
    """A vector less than texts."""
    ONE_MORE = "one_more"
    """A vector more than texts."""
    OTHER_DIMENSION = "other_dimension"
    """Vectors with one number more than asked for."""
    NOT_FINITE = "not_finite"
    """A vector that holds NaN."""
    BAD_REQUEST = "bad_request"
    """400, because of something in it."""
    INVALID_KEY = "invalid_key"
    """400, as the Developer API refuses a key."""
    EXPIRED_TOKEN = "expired_token"
    """401, as Vertex AI refuses a token."""
    FORBIDDEN = "forbidden"
    """403: the API is not enabled."""
    NO_SUCH_MODEL = "no_such_model"
    """404."""
    WRONG_PLACE = "wrong_place"
    """400 ``FAILED_PRECONDITION``: not served where the caller is."""


@dataclass(frozen=True)
class StandInSettings:
    """How the service behaves; each value has its unit in its line.

    Args:
        dimension: numbers a vector where the request does not say.
        latency: seconds before an answer.
        latency_per_text: further seconds for each text of the request.
        jitter: the latency varies evenly by this fraction up and down, 0 to 1.
        requests_per_second: over this rate it answers 429; None for no limit. One second's worth may come at once.
        texts_per_minute: likewise for texts; one minute's worth may come at once.
        says_when: where a 429 says how long to wait: the header ``Retry-After`` (whole seconds), the error's ``RetryInfo``
            (decimals), both, or nowhere.
        vertex_lists: whether Vertex AI takes more than one text a request.
        max_texts: texts that one request may hold (100 at the Developer API).
        keys: the keys and tokens that it takes; empty takes any.
        fault_rates: fraction of requests that meet each fault, drawn with the seed.
        slow_seconds: what :attr:`Fault.SLOW` waits.
        retry_after: seconds that a 429 or 503 on demand asks to wait.
        echoes: errors quote the key and the text, as a careless service would.
        seed: of jitter and faults.
    """

    dimension: int = 768
    latency: float = 0.0
    latency_per_text: float = 0.0
    jitter: float = 0.0
    requests_per_second: float | None = None
    texts_per_minute: float | None = None
    says_when: Literal["header", "details", "both", "nowhere"] = "both"
    vertex_lists: bool = False
    max_texts: int = 100
    keys: tuple[str, ...] = ()
    fault_rates: Mapping[Fault, float] = field(default_factory=dict)
    slow_seconds: float = 60.0
    retry_after: float = 1.0
    echoes: bool = False
    seed: int = 0


@dataclass
class StandInCounts:
    """What it was asked and what it answered, since it began or since :meth:`GeminiStandIn.forget`."""

    requests: int = 0
    texts: int = 0
    """Of all requests, those refused too."""
    requests_at_once: int = 0
    """The most that it held at a time."""
    methods: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    """``projects/{project}/locations/{location}`` on Vertex AI, empty at the Developer API."""
    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    embedded: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each (task type, text) was answered with a vector: 1 each where nothing was embedded twice."""

    def summary(self) -> dict[str, Any]:
        """As JSON takes it: totals instead of the texts."""
        return {
            "requests": self.requests,
            "texts": self.texts,
            "requests_at_once": self.requests_at_once,
            "methods": dict(self.methods),
            "places": dict(self.places),
            "statuses": {str(status): count for status, count in self.statuses.items()},
            "faults": dict(self.faults),
            "texts_embedded": self.embedded.total(),
            "texts_distinct": len(self.embedded),
            "embedded_again": self.embedded.total() - len(self.embedded),
        }
