"""Reads answers from the text of Factbook fields.

Every reader takes a field's clean text and returns the golden answers, the first a substring of the text; or None if the field has no
single short answer: several values, a remark, "none", or a long text.
"""

from __future__ import annotations

import re

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
