"""The page in a real browser with 10,000 episodes, some hostile."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from searchr1_async.episodes.table import EpisodeRow
from searchr1_async.episodes.types import Episode, Question, StopReason
from searchr1_async.watch.episodes_page import CellView, page_of
from tests.watch.builders import HOSTILE, searching_turn
from tests.watch.pages import BytesTokenizer, spoken

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

ATTACKS = (
    "<script>window.__hacked=1</script>",
    "<img src=x onerror='window.__hacked=1'>",
    "</script><script>window.__hacked=1;alert(1)</script><!--",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    HOSTILE,
)
EPISODES = 10_000


def rows() -> list[EpisodeRow]:
    rng = random.Random(5)
    out: list[EpisodeRow] = []
    for number in range(EPISODES - len(ATTACKS) - 1):
        question = number % 1250
        right = rng.random() < 0.4
        asked = Question(f"q{question}", f"Who wrote book {question}?", ("Austen",), ("nq", "popqa")[question % 2])
        said = "<think>I look it up</think><answer>Austen</answer>" if right else "<answer>Joyce</answer>"
        turns = (
            (searching_turn(f"Book {question} is by Austen."), spoken(said, -rng.random()))
            if right
            else (spoken(said),)
        )
        out.append(
            EpisodeRow(
                Episode(asked, tuple(b"Answer."), turns, StopReason.ANSWER, "Austen" if right else "Joyce", float(right),
                        {"correct": float(right)}, None, rng.random() * 30),
                1 + number // 1250, advantage=rng.uniform(-1, 1), trained=True,
            )
        )  # fmt: skip
    for attack in ATTACKS:
        asked = Question(attack, f"hostile {attack}", (attack,), "hostile")
        turns = (searching_turn(attack), spoken(attack.encode("utf-8", "replace").decode()))
        out.append(
            EpisodeRow(Episode(asked, (1,), turns, StopReason.ANSWER, attack, 0.0, {attack: 1.0}, attack), None, attack)
        )
    asked = Question("long", "hostile and long", ("a",), "hostile")
    out.append(EpisodeRow(Episode(asked, (1,), (spoken("word " * 200_000),), StopReason.MAX_TURN_TOKENS), 9))
    return out


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viewer") / "view.html"
    path.write_text(page_of(rows(), title=HOSTILE, tokenizer=BytesTokenizer()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


class Reader:
    """A tab that records errors and requests."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.wrong: list[str] = []
        self.tab = browser.new_page(**{"viewport": {"width": 1300, "height": 850}, **options})
        self.tab.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.tab.on("pageerror", lambda error: self.wrong.append(f"error {error}"))
        self.tab.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.tab.on("request", lambda asked: None if asked.url.startswith("file:") else self.wrong.append(asked.url))

    def open(self, path: Path, hash_: str = "") -> Any:
        self.tab.goto("about:blank")
        self.tab.goto(path.as_uri() + hash_)
        self.tab.wait_for_selector("body[data-ready]")
        self.tab.wait_for_selector("article")
        return self.tab

    def close(self) -> None:
        assert self.tab.evaluate("window.__hacked") is None
        assert self.wrong == []
        self.tab.close()


def total(tab: Any) -> int:
    return int(tab.inner_text(".total").split()[0].replace(",", ""))


def verdicts(tab: Any) -> set[str]:
    return {each.get_attribute("class").split()[-1] for each in tab.query_selector_all(".row .sign")}


def test_ten_thousand_episodes_are_filtered_sorted_and_compared(browser: Any, page_file: Path, tmp_path: Path) -> None:
    reader = Reader(browser)
    tab = reader.open(page_file)
    assert total(tab) == EPISODES
    assert tab.locator(".row").count() == 300
    tab.click("text=Show more")
    assert tab.locator(".row").count() == 600
    tab.click("button.flag:has-text('right')")
    right = total(tab)
    assert 0 < right < EPISODES
    assert verdicts(tab) == {"right"}
    tab.click("button.flag:has-text('wrong')")
    assert verdicts(tab) == {"wrong"}
    tab.click("button.flag:has-text('no search')")
    narrowed = total(tab)
    assert 0 < narrowed <= EPISODES - right
    tab.click("button.flag:has-text('wrong')")
    tab.click("button.flag:has-text('no search')")
    tab.keyboard.press("/")
    tab.keyboard.type("book 77? austen")
    assert 0 < total(tab) < 100
    assert all("77?" in text and "Austen" in text for text in tab.locator(".row").all_inner_texts())
    tab.fill(".find", "no such words")
    assert tab.is_visible("text=No matching episodes.")
    tab.click("text=Show all")
    assert total(tab) == EPISODES
    tab.select_option("select.by", "advantage")
    shown = [float(text.split("adv. ")[1]) for text in tab.locator(".row .figures").all_inner_texts()]
    assert [abs(value) for value in shown] == sorted((abs(value) for value in shown), reverse=True)
    tab.focus(".list")
    first = tab.locator(".row").nth(0)
    first.click()
    tab.keyboard.press("ArrowDown")
    assert tab.locator(".row").nth(1).get_attribute("aria-selected") == "true"
    tab.select_option("select.others", index=1)
    tab.wait_for_selector(".pair article:nth-child(2)")
    questions = tab.locator(".pair h2").all_inner_texts()
    assert questions[0] == questions[1]
    tab.screenshot(path=tmp_path / "compared.png")
    hash_ = tab.evaluate("location.hash")
    again = reader.open(page_file, hash_)
    again.wait_for_selector(".pair article:nth-child(2)")
    assert again.locator(".pair h2").all_inner_texts() == questions
    reader.close()


def test_filtering_and_sorting_are_fast(browser: Any, page_file: Path) -> None:
    reader = Reader(browser)
    tab = reader.open(page_file)
    times = tab.evaluate(
        """() => { const out = {}; const timed = (name, act) => { const best = [];
          for (let i = 0; i < 3; i++) { const began = performance.now(); act(i); document.body.offsetHeight; best.push(performance.now() - began); }
          out[name] = Math.min(...best); };
        const find = document.querySelector('.find'), by = document.querySelector('select.by');
        timed('search', (i) => { find.value = 'book 1' + i; find.dispatchEvent(new Event('input')); });
        find.value = ''; find.dispatchEvent(new Event('input'));
        timed('filter', () => document.querySelectorAll('.flag')[0].click());
        timed('sort', (i) => { by.value = ['tokens', 'seconds', 'reward'][i]; by.dispatchEvent(new Event('change')); });
        return out; }"""
    )
    # Takes 10 to 40 ms; drawing all rows would take seconds.
    assert all(milliseconds < 500 for milliseconds in times.values()), times
    reader.close()


def test_hostile_episodes_are_text(browser: Any, page_file: Path, tmp_path: Path) -> None:
    reader = Reader(browser)
    tab = reader.open(page_file, "#suite=hostile")
    assert total(tab) == len(ATTACKS) + 1
    for number, attack in enumerate(ATTACKS):
        place = EPISODES - len(ATTACKS) - 1 + number
        tab.wait_for_selector(f'.row[data-number="{place}"][aria-selected="true"]')
        tab.wait_for_function("text => document.querySelector('h2')?.textContent.includes(text)", arg=attack[:12])
        for details in tab.query_selector_all("article details"):
            details.query_selector("summary").click()
        if attack is not HOSTILE:
            assert attack in tab.text_content("section.turn >> nth=1 >> pre.said")
            assert tab.text_content("h2") == f"hostile {attack}"
            assert attack in tab.text_content(".passage")
        else:
            assert "U+202E" in tab.text_content("h2")
            assert "\u202e" not in tab.text_content("body")
            assert "\x1b" not in tab.text_content("body")
        assert tab.locator("article script, article img, article svg, article a").count() == 0
        assert tab.locator(".passage mark").count() == 1  # the golden answer
        tab.screenshot(path=tmp_path / f"hostile-{number}.png")
        tab.keyboard.press("Escape")
        tab.focus(".list")
        tab.keyboard.press("ArrowDown")
    tab.wait_for_function("() => document.querySelector('h2')?.textContent === 'hostile and long'")
    assert len(tab.text_content(".turn pre.said")) == 20_000
    tab.click("text=show 980,000 more characters")
    assert len(tab.text_content(".turn")) > 1_000_000
    reader.close()


@pytest.mark.parametrize(("width", "scheme"), [(500, "light"), (1300, "dark")])
def test_page_fits_any_window(browser: Any, page_file: Path, tmp_path: Path, width: int, scheme: str) -> None:
    reader = Reader(browser, viewport={"width": width, "height": 850}, color_scheme=scheme)
    tab = reader.open(page_file)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [tab.locator(name).bounding_box() for name in (".side", ".detail")]
    assert (boxes[0]["x"] == boxes[1]["x"]) == (width == 500)  # stacked only in a narrow window
    tab.screenshot(path=tmp_path / f"{width}-{scheme}.png")
    reader.close()


def test_page_runs_in_a_cell_iframe(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "cell.html"
    path.write_text(
        "<!doctype html><meta charset=utf-8>" + CellView(page_of(rows()[-20:]))._repr_html_(), encoding="utf-8"
    )
    reader = Reader(browser)
    reader.tab.goto(path.as_uri())
    frame = reader.tab.frame_locator("iframe")
    frame.locator("article").wait_for()
    frame.locator(".row").nth(3).click()
    frame.locator('.row[aria-selected="true"][data-number="3"]').wait_for()
    reader.tab.screenshot(path=tmp_path / "cell.png")
    reader.close()
