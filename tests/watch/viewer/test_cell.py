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
from searchr1_async.watch.representations import register_representations
from searchr1_async.watch.viewer import episode_html, episode_text, group_html, group_text
from searchr1_async.watch.viewer.markup import DROP_WORDS, STOP_WORDS
from tests.watch.builders import HOSTILE, answering_turn, episode, group, malformed_turn, question, searching_turn
from tests.watch.viewer.pages import TAGS, BytesTokenizer, Page, spoken

UNSEEN = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def test_episode_is_complete() -> None:
    page = Page(episode_html(episode(), advantage=0.5, trained=True))
    for expected in (
        "What is the capital of q0?",
        "Paris or City of Light",
        "✓ answer: Paris",
        "reward 1 (correct 1, format 1, f1 1)",
        "it gave its answer",
        "Trained on the 5 tokens sampled by the model, with advantage +0.5",
        "prompt: 5 tokens, not trained on",
        "search: capital (1 passage, 0.25 s)",
        "France",
    ):
        assert expected in page.text
    assert ("mark", "Paris") in page.words


def test_question_without_golden_answer_has_no_verdict_and_open_passages() -> None:
    asked = replace(episode(), question=Question("asked", "What is the capital?"), reward=0.0, reward_parts={})
    page, text = Page(episode_html(asked)), episode_text(asked)
    for shown in (page.text, text):
        assert "What is the capital?" in shown
        assert "answer: Paris" in shown
        assert "not scored" in shown
        assert not any(foreign in shown for foreign in ("✓", "✗", "golden", "reward", "– answer"))
    opened = [attrs for _, attrs in page.tags if attrs.get("class") == "search"]
    assert opened
    assert all("open" in attrs for attrs in opened)
    scored = [attrs for _, attrs in Page(episode_html(episode())).tags if attrs.get("class") == "search"]
    assert not any("open" in attrs for attrs in scored)


@pytest.mark.parametrize("reason", list(StopReason))
def test_stop_reason_is_described(reason: StopReason) -> None:
    assert STOP_WORDS[reason] in Page(episode_html(episode(stop_reason=reason))).text


def test_drop_reason_is_described() -> None:
    text = Page(episode_html(episode(), trained=False, drop_reason="constant_reward")).text
    assert f"Not trained on: {DROP_WORDS['constant_reward']}" in text
    assert "Learned" not in text


def test_thoughts_calls_and_tokens_are_styled() -> None:
    said = "<think>I wonder</think><search>q</search>"
    played = episode(turns=[spoken(said, -2.0, appended_tokens=tuple(b"found"))])
    page = Page(episode_html(played, tokenizer=BytesTokenizer()))
    kinds = [attrs["class"] for _, attrs in page.tags if (attrs.get("class") or "").startswith("stretch")]
    assert kinds == ["stretch thought", "stretch call"]
    shades = [attrs for _, attrs in page.tags if attrs.get("class") == "t3" and "title" in attrs]
    assert len(shades) == len(said)
    assert shades[0]["title"] == "log-probability -2.000"
    assert "found" in page.text  # appended to the turn
    plain = Page(episode_html(played))
    assert "unlikely" not in plain.text
    assert "I wonder" in plain.text


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


@settings(deadline=None, max_examples=60)
@given(hostile_episodes())
def test_text_is_never_markup_and_always_visible(played: Episode) -> None:
    for html in (episode_html(played), group_html(Group(played.question, (played, played)))):
        page = Page(html)
        assert {tag for tag, _ in page.tags} <= TAGS
        allowed = {"class", "dir", "title", "open"}
        assert all(set(attrs) <= allowed for _, attrs in page.tags)
        assert not re.search(UNSEEN, html)
        for turn in played.turns:
            assert all(char in page.text for char in turn.text if char.isalnum())
    for text in (episode_text(played), group_text(Group(played.question, (played,)))):
        assert not re.search(UNSEEN, text)


def test_huge_text_is_clipped_with_a_note() -> None:
    long = "x" * 1_000_000
    asked = Question("q", long, (long,), "s")
    played = episode(asked, turns=[searching_turn(long), answering_turn(long), spoken(long)])
    html = episode_html(played, tokenizer=BytesTokenizer())
    assert "980,000 more characters" in Page(html).text
    assert len(html) < 3_000_000
    assert len(episode_text(played)) < 100_000


def test_group_shows_members_with_advantages() -> None:
    text = Page(group_html(group(corrects=(1.0, 0.0), failed=1))).text
    assert "group of 3 episodes" in text
    assert "+0.5" in text
    assert "-0.5" in text
    assert DROP_WORDS["failed"] in text
    assert "nothing to learn from" not in text.replace(DROP_WORDS["constant_reward"], "")
    assert "nothing to learn from" in Page(group_html(group(corrects=(0.0, 0.0)))).text
    assert "group of 0 episodes" in Page(group_html(Group(question(), ()))).text


def test_plain_text_is_a_transcript() -> None:
    text = episode_text(episode(turns=[searching_turn(), malformed_turn(), answering_turn()]))
    for expected in (
        "question: What",
        "turn 1 (3 tokens):",
        "search: capital",
        "malformed call: not JSON",
        "✓ answer: Paris",
    ):
        assert expected in text


def test_given_passages_are_shown_before_the_turns() -> None:
    found = (Passage("1", "<b>Etna</b>", "Etna burns in Paris." + HOSTILE, 0.5),)
    played = replace(episode(turns=[answering_turn()]), given=SearchCall(("Which?",), (found,), None, 0.25))
    page = Page(episode_html(played))
    assert page.text.index("given with the question") < page.text.index("search: Which?") < page.text.index("turn 1")
    assert "<b>Etna</b>" in page.text
    assert ("mark", "Paris") in page.words
    assert not re.search(UNSEEN, episode_html(played))
    text = episode_text(played)
    assert text.index("given with the question:") < text.index("search: Which?") < text.index("turn 1")
    assert not re.search(UNSEEN, text.replace("\n", ""))
    unasked = replace(played, given=SearchCall((), problem="too long"))
    assert "none: too long" in Page(episode_html(unasked)).text
    assert "none: too long" in episode_text(unasked)
    assert "given" not in Page(episode_html(episode())).text


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
