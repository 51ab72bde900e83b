"""Cleaning of queries, applied before a call is made and again before it is sent."""

from __future__ import annotations

import unicodedata

MAX_QUERY_CHARACTERS = 2_000
_ASCII_CONTROLS = {code: " " for code in (*range(0x20), 0x7F)}


def clean_query(text: str) -> str | None:
    """The query as it is sent, or None if the call is malformed.

    Control characters and runs of whitespace become one space; lone surrogates and other code points that are not text
    (unassigned, private, non-characters) are dropped. Refuses queries without any letter, digit or symbol, and those of more
    than 2,000 characters.
    """
    if len(text) > 4 * MAX_QUERY_CHARACTERS:
        return None
    # Fast path: most queries are ASCII.
    kept = text.translate(_ASCII_CONTROLS) if text.isascii() else "".join(map(_clean_character, text))
    cleaned = " ".join(kept.split())
    if len(cleaned) > MAX_QUERY_CHARACTERS:
        return None
    if not any(unicodedata.category(character)[0] in "LNS" for character in cleaned):
        return None
    return cleaned


def _clean_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cc" or category[0] == "Z":
        return " "
    # Format characters (Cf) stay: many scripts need joiners and direction marks.
    return "" if category in {"Cs", "Cn", "Co"} else character
