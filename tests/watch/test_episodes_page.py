from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.episodes.table import EpisodeRow
from searchr1_async.episodes.types import Episode, GroupOutcome, Passage, Question, SearchCall, StopReason
from searchr1_async.errors import RunFolderError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.watch.episode_parts import CHUNK, episode_data
from searchr1_async.watch.episodes_page import CellView, page_of, view_run
from tests.watch.builders import HOSTILE, episode, group, malformed_turn, question, searching_turn
from tests.watch.pages import BytesTokenizer, Page, data_of, spoken


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    records = RunRecords(folder)
    for step in (1, 2, 10):
        outcomes = [
            GroupOutcome(place, group(question(f"q{place}"), corrects=(1.0, 0.0)), "too_slow" if place == 1 else None)
            for place in range(4)
        ]
        records.write_step(step, outcomes, {"x": 1.0})
    for label, step in (("untrained", 0), ("after RL", 10)):
        order = range(8) if step else reversed(range(8))
        records.write_evaluation(label, [episode(question(f"q{place}")) for place in order], step)
    return folder


def shown(path: Path) -> tuple[list[str], list[str]]:
    """The source and question id of each episode on a page."""
    rows = data_of(path.read_text(encoding="utf-8"))["index"]["rows"]
    return [row["source"] for row in rows], [row["id"] for row in rows]


def test_page_of_a_run(run_folder: Path) -> None:
    path = view_run(run_folder)
    assert path == run_folder / "view.html"
    sources, _ = shown(path)
    assert list(dict.fromkeys(sources)) == [
        "step 1",
        "step 2",
        "step 10",
        "evaluation “untrained”",
        "evaluation “after RL”",
    ]
    assert len(sources) == 3 * 8 + 2 * 8
    index = data_of(path.read_text(encoding="utf-8"))["index"]
    assert index["notes"] == ["40 episodes of 40."]
    assert [row["advantage"] for row in index["rows"]][:2] == [0.5, -0.5]
    assert index["rows"][-1]["advantage"] is None
    dropped = [n for n, row in enumerate(index["rows"]) if "dropped" in row["flags"]]
    assert dropped == [2, 3, 10, 11, 18, 19]
    assert not list(run_folder.rglob("*.partial"))


def test_steps_and_labels_select(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "page.html"
    assert set(shown(view_run(run_folder, out, steps=[2]))[0]) == {"step 2"}
    assert set(shown(view_run(run_folder, out, labels=["after RL"]))[0]) == {"evaluation “after RL”"}
    assert set(shown(view_run(run_folder, out, steps=[1], labels=["untrained"]))[0]) == {
        "step 1",
        "evaluation “untrained”",
    }


@given(limit=st.integers(1, 60))
@settings(deadline=None, max_examples=10)
def test_limit_keeps_all_episodes_of_some_questions(limit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "limited"
    if not folder.exists():
        for step, groups in ((1, 1), (2, 9), (3, 3)):
            outcomes = [GroupOutcome(n, group(question(f"q{n}"))) for n in range(groups)]
            RunRecords(folder).write_step(step, outcomes, {})
    sources, asked = shown(view_run(folder, limit=limit))
    assert 0 < len(asked) <= max(limit, 6)
    assert len(asked) == 26 or len(asked) > limit - 6
    assert sources == sorted(sources)
    whole = {f"q{n}": 6 if n == 0 else 4 if n < 3 else 2 for n in range(9)}
    assert all(asked.count(name) == whole[name] for name in asked)
    notes = data_of((folder / "view.html").read_text(encoding="utf-8"))["index"]["notes"]
    assert notes[0] == f"{len(asked)} episodes of 26."


@pytest.mark.parametrize("changes", [{"steps": [7]}, {"labels": ["after lunch"]}])
def test_missing_steps_and_labels_are_rejected(run_folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(RunFolderError, match="holds no episodes of these steps and evaluations"):
        view_run(run_folder, **changes)


def test_folder_without_a_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        view_run(tmp_path / "nowhere")
    (tmp_path / "episodes").mkdir()
    with pytest.raises(RunFolderError, match="no episodes yet"):
        view_run(tmp_path)
    assert not (tmp_path / "nowhere").exists()


def test_damaged_file_is_rejected_and_the_earlier_page_is_kept(run_folder: Path) -> None:
    path = view_run(run_folder)
    before = path.read_bytes()
    (run_folder / "episodes" / "step-000002.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(RunFolderError, match="cannot be read"):
        view_run(run_folder)
    assert path.read_bytes() == before
    assert not list(run_folder.rglob("*.partial"))


def test_unwritable_page_raises_run_folder_error(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="could not be written"):
        view_run(run_folder, tmp_path / "file" / "page.html")


def test_policy_allows_only_own_script_and_style() -> None:
    text = page_of([EpisodeRow(episode())])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert script is not None
    assert style is not None
    for name, match in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in unescape(policy[1])
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|DOMParser", script[1])


def test_flags_of_every_outcome() -> None:
    rows = [
        EpisodeRow(episode()),
        EpisodeRow(episode(correct=0.0, turns=[spoken("x")])),
        EpisodeRow(episode(correct=0.0, stop_reason=StopReason.MAX_TURNS)),
        EpisodeRow(episode(stop_reason=StopReason.FAILED, turns=())),
        EpisodeRow(episode(correct=0.0, turns=[malformed_turn()])),
        EpisodeRow(episode(), 1, trained=False, drop_reason="too_slow"),
        EpisodeRow(episode(), 1, "untrained", trained=False),
    ]
    assert [set(row["flags"]) for row in data_of(page_of(rows))["index"]["rows"]] == [
        {"right"},
        {"wrong", "nosearch"},
        {"wrong", "toolong"},
        {"nosearch", "failed"},
        {"wrong", "nosearch", "malformed"},
        {"right", "dropped"},
        {"right"},
    ]


def test_given_passages_are_on_the_page_and_count_as_search() -> None:
    found = (Passage("1", "Etna", "</script>It burns.", 0.5),)
    played = replace(episode(turns=[spoken("x")]), given=SearchCall(("Which?",), (found,), None, 0.25))
    data = data_of(page_of([EpisodeRow(played), EpisodeRow(episode(turns=[spoken("x")]))]))
    first, second = data["chunk-0"]
    assert first["given"]["searches"] == [
        {"query": "Which?", "facts": "1 passage, 0.25 s", "passages": [["Etna", "0.500", "</script>It burns."]]}
    ]
    assert second["given"] is None
    assert [row["flags"] for row in data["index"]["rows"]] == [["right"], ["right", "nosearch"]]


def test_what_was_learned_is_described() -> None:
    trained = episode_data(EpisodeRow(episode(), 1, advantage=0.5, trained=True))
    assert trained["learning"] == (
        "The model sampled 5 tokens and read 9 tokens (grey). Trained on what it sampled, with advantage +0.5; what it read is masked."
    )
    assert (trained["prompt"][0], trained["learned"]) == ("prompt: 5 tokens, not trained on", True)
    dropped = episode_data(EpisodeRow(episode(), 1, trained=False, drop_reason="constant_reward"))
    assert "Not trained on: constant reward." in dropped["learning"]
    assert (
        "Not trained on: evaluation." in episode_data(EpisodeRow(episode(), 1, "after RL", trained=False))["learning"]
    )


def test_thoughts_calls_and_tokens_are_told_apart() -> None:
    said = "<think>I wonder</think><search>q</search>"
    played = EpisodeRow(episode(turns=[spoken(said, -2.0, appended_tokens=tuple(b"found"))]))
    (turn,) = episode_data(played, BytesTokenizer())["turns"]
    assert [kind for kind, _ in turn["stretches"]] == ["thought", "call"]
    pieces = [piece for _, inside in turn["stretches"] for piece in inside]
    assert pieces == [(char, -2000) for char in said]
    assert turn["appended"] == ("appended to the turn: 5 tokens, not trained on", "found")
    (turn,) = episode_data(played)["turns"]
    assert (turn["isColoured"], turn["stretches"][0]) == (False, ("thought", [("<think>I wonder</think>", None)]))


def units(*texts: str) -> list[bytes]:
    """As in JavaScript, where a surrogate pair equals its character."""
    return [text.encode("utf-16-le", "surrogatepass") for text in texts]


TEXT = st.one_of(st.text(st.characters(), max_size=30), st.just(HOSTILE), st.just("</script><script>x</script><!--"))


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXT, min_size=8, max_size=8))
def test_page_data_round_trips_and_is_never_markup(texts: list[str]) -> None:
    asked = Question(texts[0], texts[1] + "?", (texts[2] + "a",), texts[3])
    said = texts[4].encode("utf-8", "replace").decode() + "é"
    played = Episode(
        asked,
        tuple(b"prompt"),
        (searching_turn(texts[5]), spoken(said)),
        StopReason.ANSWER,
        texts[6],
        1.0,
        {texts[7]: 1.0},
    )
    page = page_of([EpisodeRow(played)], title=texts[1], tokenizer=BytesTokenizer())
    read = Page(page)
    assert [tag for tag, _ in read.tags] == (
        "html head meta meta meta title style body p noscript p script script script".split()  # noqa: SIM905
    )
    data = data_of(page)
    (found,) = data["chunk-0"]
    ((_, _, passage),) = found["turns"][0]["call"]["searches"][0]["passages"]
    assert units(found["question"], *found["golden"], found["answer"], passage) == units(
        asked.question, *asked.golden_answers, texts[6], texts[5]
    )
    turn = found["turns"][1]
    assert units("".join(piece for _, inside in turn["stretches"] for piece, _ in inside)) == units(said)
    (row,) = data["index"]["rows"]
    assert units(row["id"], row["suite"]) == units(texts[0], texts[3])
    frame = Page(CellView(page)._repr_html_())
    assert [tag for tag, _ in frame.tags] == ["iframe"]
    assert (frame.tags[0][1]["srcdoc"] or "").replace("\r", "") == page.replace("\r", "")
    assert frame.tags[0][1]["sandbox"] == "allow-scripts"


def test_huge_text_is_coloured_only_where_visible() -> None:
    data = data_of(page_of([EpisodeRow(episode(turns=[spoken("x" * 1_000_000)]))], tokenizer=BytesTokenizer()))
    (turn,) = data["chunk-0"][0]["turns"]
    assert len(turn["stretches"][0][1]) == 20_000
    assert len(turn["rest"]) == 980_000


def test_episodes_are_packed_in_chunks() -> None:
    data = data_of(page_of([EpisodeRow(episode())] * (CHUNK + 1)))
    assert set(data) == {"chunk-0", "chunk-1", "index"}
    assert (len(data["chunk-0"]), len(data["chunk-1"]), len(data["index"]["rows"])) == (CHUNK, 1, CHUNK + 1)
