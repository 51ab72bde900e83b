"""What may be searched for: one pure function, used before a call is made and again before it is sent."""

from __future__ import annotations

import unicodedata

MAX_QUERY_CHARACTERS = 2_000
_ASCII_CONTROLS = {code: " " for code in (*range(0x20), 0x7F)}


def clean_query(text: str) -> str | None:
    """The query as it is sent, or None where the call must be refused as malformed.

    Control characters and every run of whitespace become one space; lone surrogates and other code points that are no
    text (unassigned, private, non-characters) are left out. Refused are a query with no letter, digit or symbol left,
    and one of more than 2,000 characters.
    """
    if len(text) > 4 * MAX_QUERY_CHARACTERS:
        return None
    # Most queries are ASCII: for them a table takes a fifth of the time that going character by character does.
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
    # Format characters (Cf) are kept: joiners and marks of direction belong to the spelling of many scripts.
    return "" if category in {"Cs", "Cn", "Co"} else character
