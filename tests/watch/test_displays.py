"""Episodes and groups as text, and as a page in a notebook's cell."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.watch import register_representations
from searchr1_async.watch.episodes_page import episode_html, episode_text, group_html, group_text
from searchr1_async.watch.markup import STOP_WORDS
from tests.watch.builders import HOSTILE, answering_turn, episode, group, malformed_turn, question, searching_turn
from tests.watch.pages import Page, data_of

UNSEEN = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def test_question_without_golden_answer_has_no_verdict() -> None:
    asked = replace(episode(), question=Question("asked", "What is the capital?"), reward=0.0, reward_parts={})
    text = episode_text(asked)
    assert "What is the capital?" in text
    assert "answer: Paris" in text
    assert "not scored" in text
    assert not any(foreign in text for foreign in ("✓", "✗", "golden", "reward", "– answer"))


@pytest.mark.parametrize("reason", list(StopReason))
def test_stop_reason_is_described(reason: StopReason) -> None:
    assert STOP_WORDS[reason] in episode_text(episode(stop_reason=reason))


@st.composite
def hostile_episodes(draw: st.DrawFn) -> Episode:
    text = st.one_of(st.text(st.characters(), max_size=30), st.just(HOSTILE), st.just('"><script>x</script>'))
    ask = Question(draw(text), draw(text) + "?", (draw(text) + "a", draw(text)), draw(text))
    call = SearchCall((draw(text),), ((Passage(draw(text), draw(text), draw(text)),),))
    said = draw(text)
    turns = (
        Turn((1,), (-1.0,), said, draw(text), call=call),
        Turn((1,), (-1.0,), draw(text), "", call=SearchCall((), problem=draw(text))),
    )
    return Episode(ask, (1,), turns, StopReason.ANSWER, draw(text), 1.0, {draw(text): 1.0}, draw(text), 1.0)


@settings(deadline=None, max_examples=40)
@given(hostile_episodes())
def test_text_is_never_markup_and_always_visible(played: Episode) -> None:
    members = Group(played.question, (played, played))
    for html in (episode_html(played), group_html(members)):
        page = Page(html)
        assert [tag for tag, _ in page.tags if tag != "span"] == ["iframe", "details", "summary", "pre"]
        assert page.tags[0][1]["sandbox"] == "allow-scripts"
        assert all(set(attrs) == {"class"} for tag, attrs in page.tags if tag == "span")
        assert not re.search(UNSEEN, page.text)
    for turn in played.turns:
        assert all(char in Page(episode_html(played)).text for char in turn.text if char.isalnum())
    for text in (episode_text(played), group_text(members)):
        assert not re.search(UNSEEN, text)


def test_huge_text_is_clipped_with_a_note() -> None:
    long = "x" * 1_000_000
    asked = Question("q", long, (long,), "s")
    text = episode_text(episode(asked, turns=[searching_turn(long), answering_turn(long)]))
    assert "980,000 more characters" in text
    assert len(text) < 100_000


def test_group_shows_its_members() -> None:
    members = group(corrects=(1.0, 0.0), failed=1)
    rows = data_of(Page(group_html(members)).tags[0][1]["srcdoc"] or "")["index"]["rows"]
    assert [(row["advantage"], row["flags"]) for row in rows] == [
        (0.5, ["right"]),
        (-0.5, ["wrong"]),
        (None, ["nosearch", "failed", "dropped"]),
    ]
    assert group_text(members).startswith("group of 3 episodes: What is the capital")
    assert "group of 0 episodes" in group_html(Group(question(), ()))


def test_plain_text_is_a_transcript() -> None:
    found = (Passage("1", "<b>Etna</b>", "Etna burns." + HOSTILE, 0.5),)
    played = replace(
        episode(turns=[searching_turn(), malformed_turn(), answering_turn()]),
        given=SearchCall(("Which?",), (found,), None, 0.25),
    )
    text, place = episode_text(played), 0
    for expected in (
        "question: What is the capital of q0?",
        "golden answer: Paris or City of Light",
        "given with the question",
        "search: Which? (1 passage, 0.25 s)",
        "<b>Etna</b> (0.500): Etna burns.",
        "turn 1 · 3 tokens",
        "search: capital (1 passage, 0.25 s)",
        "France (0.750): Paris is large.",
        "malformed call: not JSON",
        "✓ answer: Paris",
        "reward 1 (correct 1, format 1, f1 1) · stopped (answer): it gave its answer",
    ):
        assert expected in text[place:], expected
        place = text.index(expected, place)
    unasked = replace(played, given=SearchCall((), problem="too long"))
    assert "none: too long" in episode_text(unasked)
    assert "given" not in episode_text(episode())


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    shells = pytest.importorskip("IPython.core.interactiveshell")
    made = shells.InteractiveShell()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: made)
    yield made
    made.history_manager.end_session()


def test_ipython_display(shell: Any) -> None:
    assert register_representations()
    assert register_representations()
    shown, _ = shell.display_formatter.format(episode())
    assert shown["text/html"] == episode_html(episode())
    assert shown["text/plain"] == episode_text(episode())
    shown, _ = shell.display_formatter.format(group())
    assert "group of 2 episodes" in shown["text/html"]
    shown, _ = shell.display_formatter.format([episode(), episode()])
    assert shown["text/plain"].count("<Episode atlas/q0 ✓ 'Paris'") == 2
    assert "turn 1" not in shown["text/plain"]


def test_without_ipython_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "IPython"]:
        monkeypatch.delitem(sys.modules, name)
    assert register_representations() is False
    assert "IPython" not in sys.modules
