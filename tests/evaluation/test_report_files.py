"""Files of a report, including hostile labels, questions and answers."""

from __future__ import annotations

import dataclasses
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import polars as pl
import pytest

from searchr1_async.boundary.paths import write_parquet
from searchr1_async.episodes.types import StopReason
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.episode_store import QUESTIONS_NAME, EpisodeStore, questions_frame
from searchr1_async.evaluation.report import Report
from searchr1_async.evaluation.report_tables import linked_episodes, sections_of
from searchr1_async.evaluation.table_forms import latex_text, markdown_text
from searchr1_async.records.scores import SCORE_SCHEMA
from searchr1_async.runs.evaluation import Evaluation
from tests.evaluation.reports import kept, manifest, played, rows_of_episodes
from tests.watch.builders import HOSTILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = (
    f"{HOSTILE} \\input{{/etc/passwd}} $x_1^2$ 50% #1 & ~ | `a` *b* [c](javascript:alert(1)) https://evil.example @you"
)


class Page(HTMLParser):
    """Parses a page strictly and collects anything executable."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.wrong: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            is_chart = tag == "img" and (value or "").startswith("data:image/svg+xml;base64,")
            if name.startswith("on") or name == "style" or (name == "src" and not is_chart):
                self.wrong.append(f"{tag} {name}={value}")
            if name == "href":
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_report() -> Report:
    bare = Report([played(f"before {NASTY}", 0.2, of=12, said=NASTY), played(f"after {NASTY}", 0.8, of=12, said=NASTY)])
    return kept(Report(list(bare.values()), manifest(bare, notes=(NASTY,))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert hostile_report().save(folder) == folder / "report.html"
    return folder


def test_every_file_is_there_and_none_beside(saved: Path) -> None:
    names = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
    assert names == [
        "episodes.html",
        *(f"figures/{name}.{kind}" for name in ("exact_match", "outcomes") for kind in ("png", "svg")),
        "manifest.json",
        "questions.parquet",
        "report.html",
        "report.md",
        "report.tex",
        "scores.parquet",
    ]
    assert pl.read_parquet(saved / "scores.parquet").schema == SCORE_SCHEMA
    assert (saved / "figures" / "exact_match.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_holds_no_markup_but_its_own(saved: Path) -> None:
    text = (saved / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.wrong == []
    assert not {"script", "iframe", "form", "object"} & set(page.tags)
    assert page.tags.count("img") == 2
    assert "default-src 'none'" in text
    assert "unsafe" not in text.partition("</head>")[0].partition("<style>")[0]
    assert all(link.startswith("episodes.html#") for link in page.links)
    assert "alert(1)" in page.text  # shown as text
    for char in "\x00\x1b\u202e":
        assert char not in text


def test_every_flip_leads_to_its_two_episodes(saved: Path) -> None:
    report = hostile_report()
    before, after = report
    page = Page((saved / "report.html").read_text(encoding="utf-8"))
    named = [{name: values[0] for name, values in parse_qs(urlsplit(link).fragment).items()} for link in page.links]
    pairs = [given for given in named if "beside" in given]
    flips = report.flips(before, after)
    assert flips.height > 5
    assert len(pairs) == 2 * flips.height
    assert {given["in"] for given in named} == {"nq", "hotpotqa"}


def test_of_many_flips_both_directions_are_shown() -> None:
    report = Report([played("a", 0.5, of=300, suites=("nq",)), played("b", 0.5, of=300, suites=("nq",))])
    flips = report.flips("a", "b")
    assert flips.height > 120
    text = report.markdown()
    assert f"{flips.height} questions changed, 100 shown" in text
    assert [text.count(f"| {direction} |") for direction in ("improved", "worsened")] == [50, 50]


def test_the_page_does_not_link_to_episodes_that_were_not_kept(tmp_path: Path) -> None:
    whole = hostile_report()
    bare = Report([type(own)(own.label, own.scores) for own in whole.values()], whole.manifest)
    (tmp_path / "episodes.html").write_text("of an earlier report")
    page = Page(bare.save(tmp_path).read_text(encoding="utf-8"))
    assert page.links == []
    assert not (tmp_path / "episodes.html").exists()


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="file"):
        Report([played("a", 0.5, of=2)]).save(tmp_path / "file")


def test_markdown_is_text_whatever_is_in_it() -> None:
    shown = markdown_text(NASTY)
    assert "<" not in shown
    assert "\n" not in shown
    assert "https://" not in shown
    assert not re.search(r"(?<!\\)[`*_\[\]|$#]", shown.replace("&#", ""))
    tables = re.findall(r"(?:^\|.*\n)+", hostile_report().markdown(), re.MULTILINE)
    assert len(tables) > 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_latex_is_text_whatever_is_in_it() -> None:
    shown = latex_text(NASTY)
    plain = re.sub(r"\\(text\w+\{\}|ldots\{\}|[{}$&#_%])|\{\[\}|\{\]\}", "", shown)
    assert not set("\\{}$&#_%~^[]") & set(plain)
    text = hostile_report().latex()
    assert text.count(r"\begin") == text.count(r"\end") == 12
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 6
    for table in text.split(r"\begin{tabular}")[1:]:
        columns = table.partition("}")[0].lstrip("{")
        rows = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
    assert r"\label{tab:exact-match}" in text


def test_a_parser_of_latex_reads_the_whole_report() -> None:
    latexwalker = pytest.importorskip("pylatexenc.latexwalker", reason="pylatexenc is not installed")
    text = hostile_report().latex()
    nodes, *_ = latexwalker.LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
    tables = [node for node in nodes if getattr(node, "environmentname", None) == "table"]
    assert len(tables) == 6


def test_the_whole_markdown_has_every_part() -> None:
    text = hostile_report().markdown()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Exact match", "Differences", "All scores", "Outcomes", "Costs", "Beside published results", "Reproduction",
    ]  # fmt: skip
    assert "not ranked" in text


def test_a_million_characters_do_not_break_a_view() -> None:
    long = "word " * 200_000
    report = Report(
        [played("a", 0.5, of=3, said=long, suites=("nq",)), played("b", 0.5, of=3, said=long, suites=("nq",))]
    )
    assert len(report._repr_html_()) < 20_000
    assert len(report.markdown()) < 60_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (500, "dark")])
def test_a_link_opens_its_episode_in_a_browser(saved: Path, tmp_path: Path, width: int, scheme: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    wrong: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab: Any = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda asked: None if asked.url.startswith("file:") else wrong.append(asked.url))
        tab.goto((saved / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("window.__hacked") is None
        tab.screenshot(path=tmp_path / "report.png", full_page=True)
        tab.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        link = tab.locator("table.texts a[href*=beside]").first
        question = link.locator("xpath=ancestor::tr/th").inner_text()
        suite = link.locator("xpath=ancestor::tr/td[1]").inner_text()
        link.click()
        tab.wait_for_selector(".pair article:nth-child(2)")
        headings = tab.locator(".pair h2").all_inner_texts()
        assert headings[0] == headings[1]
        assert headings[0][:40] == question[:40]
        assert f"{suite}" in tab.inner_text(".pair article:nth-child(1)")
        answers = {tab.inner_text(f".pair article:nth-child({place}) .verdict") for place in (1, 2)}
        assert len(answers) == 2
        tab.screenshot(path=tmp_path / "episode.png")
        tab.goto("about:blank")
        tab.goto((saved / "episodes.html").as_uri() + "#system=nobody&in=nq&question=q0&sample=0")
        tab.wait_for_selector("body[data-ready]")
        assert "does not hold the episode" in tab.inner_text("main.detail")
        tab.locator(".row").first.click()
        tab.wait_for_selector("article")
        browser.close()
    assert wrong == []


def test_of_a_folder_only_the_episodes_that_are_linked_to_are_read(tmp_path: Path) -> None:
    """Episodes on disk, including a failed sample that was retried."""
    before, after = played("before", 0.2, of=20, suites=("nq",)), played("after", 0.8, of=20, suites=("nq",))
    store = EpisodeStore(tmp_path)
    failed = dataclasses.replace(before.episodes[0], stop_reason=StopReason.FAILED, answer=None)
    store.write(rows_of_episodes("before", [failed]))
    for own in (before, after):
        store.write(rows_of_episodes(own.label, own.episodes))
    write_parquet(tmp_path / QUESTIONS_NAME, questions_frame([episode.question for episode in before.episodes]))
    report = Report([Evaluation(own.label, own.scores) for own in (before, after)], store=EpisodeStore(tmp_path))
    keys = linked_episodes(sections_of(report))
    assert len(keys) < 40
    rows = store.rows(keys)
    assert {(row.label, e.data_source, e.id, row.member) for row in rows for e in (row.episode.question,)} == keys
    assert len(rows) == len(keys)
    assert not any(row.episode.failed for row in rows)
    links = Page(report.save().read_text(encoding="utf-8")).links
    assert len(links) >= 2 * report.flips("before", "after").height
