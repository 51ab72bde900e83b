from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.cli.atlas_page import write_report
from searchr1_async.episodes.types import Question, StopReason
from searchr1_async.watch.viewer.markup import STYLE, highlighted, isolated, visible
from tests.watch.builders import HOSTILE, answering_turn, episode, malformed_turn, question, searching_turn

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A strict parser: elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def report(tmp_path: Path, **changes: object) -> str:
    given_: dict = {
        "title": "Run one",
        "summary": [{"stage": "untrained", "exact match": "10 %"}, {"stage": "after RL", "exact match": "50 %"}],
        "curve_png": None,
        "metrics": pl.DataFrame({"step": [1, 2], "env/all/correct": [0.125, None]}),
        "episodes": [("before", episode(correct=0.0)), ("after", episode())],
        "settings": {"group_size": 8, "gemini_api_key": "sk-1234", "max_tokens": 1024},
    }
    path = write_report(tmp_path / "folder" / "report.html", **{**given_, **changes})
    assert not list(tmp_path.rglob("*.partial"))
    return path.read_text(encoding="utf-8")


def test_report_is_complete_and_self_contained(tmp_path: Path) -> None:
    png = tmp_path / "curve.png"
    png.write_bytes(b"\x89PNG picture")
    text = report(tmp_path, curve_png=png, notes=["+40 points"])
    page = Page(text)
    for expected in ("Run one", "after RL", "50 %", "+40 points", "12.5%", "group_size", "1024", "Paris is large."):
        assert expected in page.text
    assert "malformed" not in page.text
    sources = [attrs.get(name) for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert sources == ["data:image/png;base64," + base64.b64encode(b"\x89PNG picture").decode()]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    assert "prefers-color-scheme: dark" in text


def test_before_and_after_are_side_by_side(tmp_path: Path) -> None:
    first, second = question("q1"), question("q2")
    played = [
        ("before", episode(first)),
        ("before", episode(second)),
        ("after", episode(first)),
        ("after", episode(second)),
    ]
    page = Page(report(tmp_path, summary=[], episodes=played))
    assert sum(attrs.get("class") == "question" for _, attrs in page.tags) == 2
    assert re.findall(r"before|after", page.text) == ["before", "after", "before", "after"]


def test_every_outcome_is_described(tmp_path: Path) -> None:
    played = [
        ("malformed", episode(correct=0.0, turns=(malformed_turn(),), stop_reason=StopReason.MALFORMED_CALL)),
        ("failed", episode(turns=(), stop_reason=StopReason.FAILED)),
        ("right", episode()),
    ]
    text = Page(report(tmp_path, episodes=played)).text
    assert "malformed call: not JSON" in text
    assert "SearchError: the store is gone" in text
    assert "✓ answer: Paris" in text
    assert "✗ no answer" in text
    assert "reward 1 (correct 1, format 1, f1 1)" in text


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    assert "sk-1234" not in report(tmp_path)


def test_empty_run_gives_a_page(tmp_path: Path) -> None:
    text = report(
        tmp_path, summary=[], metrics=pl.DataFrame(), episodes=[], settings={}, curve_png=tmp_path / "missing.png"
    )
    assert Page(text).text.strip().endswith("Run one")


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    asked = Question(HOSTILE, HOSTILE, (HOSTILE,), HOSTILE)
    turns = (searching_turn(HOSTILE), answering_turn(HOSTILE))
    played = [(HOSTILE, episode(asked, turns=turns, parts={HOSTILE: 1.0}))]
    text = report(
        tmp_path,
        title=HOSTILE,
        summary=[{HOSTILE: HOSTILE}],
        notes=[HOSTILE],
        episodes=played,
        settings={HOSTILE: HOSTILE},
    )
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not re.search(r"[\x00\x1b\u202e\u202c\ud800-\udfff]", text)
    assert "<script>alert(1)</script>" in page.text
    assert "␀" in page.text
    assert "U+202E" in page.text


def test_many_steps_are_thinned(tmp_path: Path) -> None:
    frame = pl.DataFrame({"step": range(1, 5001), "env/all/correct": [0.5] * 5000})
    page = Page(report(tmp_path, metrics=frame, episodes=[]))
    assert "Steps (5000)" in page.text
    assert sum(tag == "tr" for tag, _ in page.tags) < 250


@given(st.text(st.characters(), max_size=60))
def test_text_stays_in_its_element(text: str) -> None:
    page = Page(f"<div>{isolated(text)}</div>")
    assert [tag for tag, _ in page.tags if tag != "span"] == ["div", "bdi"]
    html = visible(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    letters = [char for char in text if char.isalnum()]
    assert all(char in page.text for char in letters)


@given(st.text(st.characters(), max_size=40), st.lists(st.text(st.characters(), max_size=8), max_size=3))
def test_highlighting_preserves_text(text: str, words: list[str]) -> None:
    assert re.sub(r"</?mark>", "", highlighted(text, words)).replace("<mark>", "") == visible(text)


def test_golden_answer_is_highlighted_as_whole_words() -> None:
    assert highlighted("paris <b> Parisian", ["Paris"]) == "<mark>paris</mark> &lt;b&gt; Parisian"


def test_writing_systems_are_unchanged() -> None:
    for text in ("السلام", "می‌خواهم", "👩‍👧 ❤️", "日本語", "naïve – “quoted”\n\ttab"):
        assert re.sub(r"&quot;", '"', visible(text)) == text
