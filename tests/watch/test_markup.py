"""Untrusted text as HTML."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.watch.markup import STYLE, isolated, visible
from tests.watch.pages import Page


@given(st.text(st.characters(), max_size=60))
def test_text_stays_in_its_element(text: str) -> None:
    page = Page(f"<div>{isolated(text)}</div>")
    assert [tag for tag, _ in page.tags if tag != "span"] == ["div", "bdi"]
    html = visible(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    assert all(char in page.text for char in text if char.isalnum() and visible(char) == char)


def test_writing_systems_are_unchanged() -> None:
    for text in ("السلام", "می\u200cخواهم", "👩\u200d👧 ❤️", "日本語", "naïve – “quoted”\n\ttab"):
        assert re.sub(r"&quot;", '"', visible(text)) == text


def test_style_loads_nothing() -> None:
    assert "url(" not in STYLE
    assert "@import" not in STYLE
