"""The kinds of fact that the atlas asks about: their Factbook fields, and the wording of questions and searches."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from searchr1_async.data.factbook import (
    Answers,
    Country,
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


@dataclass(frozen=True, slots=True)
class FactPassage:
    """One short passage per country: the values of one or a few related fields."""

    key: str
    parts: tuple[tuple[str, Path], ...]
    """Label and path of each field, in order."""


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

FACT_PASSAGES = (
    FactPassage(
        "capital",
        (
            ("capital", CAPITAL),
            ("geographic coordinates", _government("Capital", "geographic coordinates")),
        ),
    ),
    FactPassage("highest-point", (("highest point", _HIGHEST),)),
    FactPassage("lowest-point", (("lowest point", _LOWEST),)),
    FactPassage("mean-elevation", (("mean elevation", _MEAN),)),
    FactPassage("area", (("total area", _AREA), ("area compared", ("Geography", "Area - comparative")))),
    FactPassage("coastline", (("length of the coastline", _COASTLINE),)),
    FactPassage("border-countries", (("border countries", _BORDERS),)),
    FactPassage("national-holiday", (("national holiday", _HOLIDAY_FIELD),)),
    FactPassage("independence", (("date of independence", _INDEPENDENCE_FIELD),)),
    FactPassage("currency", (("currency", _CURRENCY_FIELD),)),
    FactPassage(
        "national-symbol", (("national symbol", _SYMBOL), ("national colors", _government("National color(s)")))
    ),
    FactPassage("internet-code", (("internet country code", _DOMAIN),)),
    FactPassage(
        "nationality",
        (
            ("nationality, noun for its people", _DEMONYM),
            ("adjective", ("People and Society", "Nationality", "adjective")),
        ),
    ),
    FactPassage("anthem", (("national anthem", _ANTHEM_TITLE), ("lyrics/music", _ANTHEM_MUSIC))),
    FactPassage("aircraft-prefix", (("civil aircraft registration prefix", _PREFIX),)),
    FactPassage(
        "names",
        (
            ("conventional long form of the name", _LONG_NAME),
            ("local short form of the name", _LOCAL_NAME),
            ("former name", _FORMER_NAME),
        ),
    ),
    FactPassage("legislature", (("legislature name", _LEGISLATURE),)),
)

FACT_KINDS = (
    FactKind("capital", "capital", CAPITAL, "What is the capital of {country}?", "capital of {country}", read_capital),
    FactKind(
        "highest-point",
        "highest-point",
        _HIGHEST,
        "What is the highest point of {country}?",
        "highest point of {country}",
        read_point,
    ),
    FactKind(
        "highest-point-height",
        "highest-point",
        _HIGHEST,
        "How high is the highest point of {country}?",
        "highest point of {country}",
        read_height,
    ),
    FactKind(
        "lowest-point",
        "lowest-point",
        _LOWEST,
        "What is the lowest point of {country}?",
        "lowest point of {country}",
        read_point,
    ),
    FactKind(
        "mean-elevation",
        "mean-elevation",
        _MEAN,
        "What is the mean elevation of {country}?",
        "mean elevation of {country}",
        read_quantity,
    ),
    FactKind("area", "area", _AREA, "What is the total area of {country}?", "total area of {country}", read_quantity),
    FactKind(
        "coastline",
        "coastline",
        _COASTLINE,
        "How long is the coastline of {country}?",
        "coastline of {country}",
        read_quantity,
    ),
    FactKind(
        "only-neighbour",
        "border-countries",
        _BORDERS,
        "Which is the only country that has a land border with {country}?",
        "border countries of {country}",
        read_only_neighbour,
    ),
    FactKind(
        "national-holiday",
        "national-holiday",
        _HOLIDAY_FIELD,
        "What is the national holiday of {country}?",
        "national holiday of {country}",
        read_holiday,
    ),
    FactKind(
        "national-holiday-date",
        "national-holiday",
        _HOLIDAY_FIELD,
        "On what date is the national holiday of {country}?",
        "national holiday of {country}",
        read_holiday_date,
    ),
    FactKind(
        "independence-date",
        "independence",
        _INDEPENDENCE_FIELD,
        "On what date did {country} become independent?",
        "date of independence of {country}",
        read_independence_date,
    ),
    FactKind(
        "independence-from",
        "independence",
        _INDEPENDENCE_FIELD,
        "From which country did {country} become independent?",
        "independence of {country}",
        read_independence_power,
    ),
    FactKind(
        "currency",
        "currency",
        _CURRENCY_FIELD,
        "What is the currency of {country}?",
        "currency of {country}",
        read_currency,
    ),
    FactKind(
        "currency-code",
        "currency",
        _CURRENCY_FIELD,
        "What is the three-letter code of the currency of {country}?",
        "currency of {country}",
        read_currency_code,
    ),
    FactKind(
        "national-symbol",
        "national-symbol",
        _SYMBOL,
        "What is the national symbol of {country}?",
        "national symbol of {country}",
        read_name,
    ),
    FactKind(
        "internet-code",
        "internet-code",
        _DOMAIN,
        "What is the internet country code of {country}?",
        "internet country code of {country}",
        read_domain,
    ),
    FactKind(
        "demonym",
        "nationality",
        _DEMONYM,
        "What is the noun for a person from {country}?",
        "nationality noun of {country}",
        read_demonym,
    ),
    FactKind(
        "anthem",
        "anthem",
        _ANTHEM_TITLE,
        "What is the title of the national anthem of {country}?",
        "national anthem of {country}",
        read_anthem,
    ),
    FactKind(
        "anthem-composer",
        "anthem",
        _ANTHEM_MUSIC,
        "Who wrote the music of the national anthem of {country}?",
        "national anthem lyrics and music of {country}",
        read_composer,
    ),
    FactKind(
        "aircraft-prefix",
        "aircraft-prefix",
        _PREFIX,
        "What is the civil aircraft registration prefix of {country}?",
        "civil aircraft registration prefix of {country}",
        read_prefix,
    ),
    FactKind(
        "former-name",
        "names",
        _FORMER_NAME,
        "What is the former name of {country}?",
        "former name of {country}",
        read_name,
    ),
    FactKind(
        "local-name",
        "names",
        _LOCAL_NAME,
        "What is the local short form of the name of {country}?",
        "local short form of the name of {country}",
        read_name,
    ),
    FactKind(
        "long-name",
        "names",
        _LONG_NAME,
        "What is the conventional long form of the name of {country}?",
        "conventional long form of the name of {country}",
        read_name,
    ),
    FactKind(
        "legislature",
        "legislature",
        _LEGISLATURE,
        "What is the name of the legislature of {country}?",
        "legislature of {country}",
        read_legislature,
    ),
)


def field_text(country: Country, path: Path) -> str:
    """The field's value, ``""`` if missing."""
    text = country.text(*path)
    if path == _CURRENCY_FIELD:
        text = re.sub(r"\s*per US dollar\b.*$", "", text)
    return "" if text.lower() in {"none", "na", "n/a"} else text
