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
from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, StopReason
from searchr1_async.errors import RunFolderError
from searchr1_async.records.run_records import GroupOutcome, RunRecords
from searchr1_async.watch.viewer import in_cell, page_of, view_run
from searchr1_async.watch.viewer.episodes_page import run_episodes
from searchr1_async.watch.viewer.parts import CHUNK, FLAGS
from tests.watch.builders import HOSTILE, episode, group, malformed_turn, question, searching_turn
from tests.watch.viewer.pages import BytesTokenizer, Page, data_of, spoken


def flags_of(value: int) -> set[str]:
    return {name for place, name in enumerate(FLAGS) if value & (1 << place)}


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
    index = data_of(path.read_text(encoding="utf-8"))["index"]
    sources = [index["sources"][place]["name"] for place in index["columns"]["source"]]
    return sources, [index["questions"][place][0] for place in index["columns"]["question"]]


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
    assert "40 episodes of 3 steps of training and 2 evaluations." in index["notes"]
    advantages = index["columns"]["advantage"]
    assert advantages[:2] == [0.5, -0.5]
    assert advantages[-1] is None
    dropped = [n for n, flags in enumerate(index["columns"]["flags"]) if "dropped" in flags_of(flags)]
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


def test_limit_prefers_common_questions(run_folder: Path, tmp_path: Path) -> None:
    sources, asked = shown(view_run(run_folder, tmp_path / "p.html", limit=15))
    by_source = {name: [q for s, q in zip(sources, asked, strict=True) if s == name] for name in sources}
    assert {name: len(questions) for name, questions in by_source.items()} == dict.fromkeys(by_source, 3)
    assert set(by_source["evaluation “untrained”"]) == set(by_source["evaluation “after RL”"])
    note = data_of((tmp_path / "p.html").read_text(encoding="utf-8"))["index"]["notes"][1]
    assert "Showing 15 of 40" in note


@given(limit=st.integers(1, 60))
@settings(deadline=None, max_examples=15)
def test_limit_is_met_exactly(limit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "limited"
    if not folder.exists():
        for step, groups in ((1, 1), (2, 9), (3, 3)):
            outcomes = [GroupOutcome(n, group(question(f"q{n}"))) for n in range(groups)]
            RunRecords(folder).write_step(step, outcomes, {})
    found = run_episodes(folder, limit=limit)
    assert found.shown == min(limit, 26) == len(list(found.rows()))


@pytest.mark.parametrize("changes", [{"steps": [7]}, {"labels": ["after lunch"]}])
def test_missing_steps_and_labels_are_rejected(run_folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(RunFolderError, match="it has"):
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
    text = page_of([episode()])
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
        episode(),
        episode(correct=0.0, turns=[spoken("x")]),
        episode(correct=0.0, stop_reason=StopReason.MAX_TURNS),
        episode(stop_reason=StopReason.FAILED, turns=()),
        episode(correct=0.0, turns=[malformed_turn()]),
        EpisodeRow(episode(), 1, trained=False, drop_reason="too_slow"),
        EpisodeRow(episode(), 1, "untrained", trained=False),
    ]
    index = data_of(page_of(rows))["index"]
    plain, dropped, measured = index["columns"]["flags"][:5], *index["columns"]["flags"][5:]
    assert [flags_of(flags) for flags in plain] == [
        {"right"},
        {"wrong", "nosearch"},
        {"wrong", "toolong"},
        {"nosearch", "failed"},
        {"wrong", "nosearch", "malformed"},
    ]
    assert flags_of(dropped) == {"right", "dropped"}
    assert flags_of(measured) == {"right"}


def test_given_passages_are_on_the_page_and_count_as_search() -> None:
    found = (Passage("1", "Etna", "</script>It burns.", 0.5),)
    played = replace(episode(turns=[spoken("x")]), given=SearchCall(("Which?",), (found,), None, 0.25))
    data = data_of(page_of([played, episode(turns=[spoken("x")])]))
    (first, second), strings = data["chunk-0"]["episodes"], data["chunk-0"]["strings"]
    assert [strings[place] for place in first["given"]["queries"]] == ["Which?"]
    assert [strings[place] for place in first["given"]["results"][0][0][:2]] == ["Etna", "</script>It burns."]
    assert second["given"] is None
    assert [flags_of(flags) for flags in data["index"]["columns"]["flags"]] == [{"right"}, {"right", "nosearch"}]


def test_page_of_groups_and_evaluations_in_memory() -> None:
    index = data_of(page_of([group(), episode()], title="Mine"))["index"]
    assert index["title"] == "Mine"
    assert sorted(index["columns"]["advantage"], key=str) == [-0.5, 0.5, None]
    index = data_of(page_of([group(), episode()], label="after RL", step=7))["index"]
    assert [source["name"] for source in index["sources"]] == ["evaluation “after RL”"]
    assert data_of(page_of([]))["index"]["columns"]["flags"] == []


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
    page = page_of([played], title=texts[1], tokenizer=BytesTokenizer())
    read = Page(page)
    assert [tag for tag, _ in read.tags] == (
        "html head meta meta meta title style body p noscript p script script script".split()  # noqa: SIM905
    )
    data = data_of(page)
    strings, found = data["chunk-0"]["strings"], data["chunk-0"]["episodes"][0]
    passage = found["turns"][0]["call"]["results"][0][0][1]
    places = (found["question"], *found["golden"], found["answer"], passage)
    assert units(*(strings[place] for place in places)) == units(
        asked.question, *asked.golden_answers, texts[6], texts[5]
    )
    turn = found["turns"][1]
    assert strings[turn["text"]] == said
    length = len(units(said)[0]) // 2
    assert sum(each for _, each in turn["kinds"]) == length
    assert sum(turn["tokens"][0]) == length
    assert units(data["index"]["questions"][0][0], *data["index"]["suites"]) == units(texts[0], texts[3])
    frame = Page(in_cell(page))
    assert [tag for tag, _ in frame.tags] == ["iframe"]
    assert (frame.tags[0][1]["srcdoc"] or "").replace("\r", "") == page.replace("\r", "")
    assert frame.tags[0][1]["sandbox"] == "allow-scripts"


def test_huge_text_is_coloured_only_where_visible() -> None:
    data = data_of(page_of([episode(turns=[spoken("x" * 1_000_000)])], tokenizer=BytesTokenizer()))
    turn = data["chunk-0"]["episodes"][0]["turns"][0]
    assert len(data["chunk-0"]["strings"][turn["text"]]) == 1_000_000
    assert len(turn["tokens"][0]) == 20_000


def test_passages_are_deduplicated_per_chunk() -> None:
    text = "the same passage " * 50
    data = data_of(page_of([episode(turns=[searching_turn(text)]) for _ in range(CHUNK + 1)]))
    assert set(data) == {"chunk-0", "chunk-1", "index"}
    assert data["chunk-0"]["strings"].count(text) == 1
    assert len(data["chunk-0"]["episodes"]) == CHUNK
