"""Exact match and F1 against an independent implementation of SQuAD's rules, torchmetrics', on real answers made hostile.

    python -m benchmarks scoring --data FOLDER

FOLDER holds question files (`question`, `golden_answers`). Each golden answer is changed in every way in which a model, a
keyboard or a data set changes answers, and scored by both against all golden answers of its question. Needs torchmetrics
(`pip install torchmetrics`), which is no dependency of the package.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from searchr1_async.episodes.rewards import cover_match, exact_match, f1, normalize_answer
from searchr1_async.evaluation import load_suites

SINGLE_PRECISION = 1e-6
"""torchmetrics counts in 32 bits."""

_WIDE = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
_CURLY = str.maketrans({"'": "’", '"': "”", "-": "–"})
_ONES = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
_MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Pair:
    """An answer and the golden answers that it is held against."""

    kind: str
    answer: str
    golden: tuple[str, ...]


def _swap_number(text: str) -> str:
    words = text.split()
    return " ".join(
        _ONES[int(w)] if w.isdecimal() and int(w) < len(_ONES) else f"{int(w):,}" if w.isdecimal() else w for w in words
    )


def _swap_date(text: str) -> str:
    """ "4 July" for "July 4"; the month first where there is a month."""
    words = text.replace(",", "").split()
    found = [place for place, word in enumerate(words) if word in _MONTHS]
    if not found or len(words) < 2:
        return f"{text} 1, 1999"
    place = found[0]
    other = place + 1 if place + 1 < len(words) else place - 1
    words[place], words[other] = words[other], words[place]
    return " ".join(words)


def _listed(text: str) -> str:
    words = text.split()
    return ", ".join(reversed(words[:-1])) + f" and {words[-1]}" if len(words) > 1 else f"{text}, {text} and {text}"


CHANGES: dict[str, Callable[[str], str]] = {
    "unchanged": lambda text: text,
    "upper case": str.upper,
    "title case": str.title,
    "swapped case": str.swapcase,
    "articles in front": lambda text: f"The a {text}, an",
    "article within": lambda text: text.replace(" ", " the ", 1),
    "article glued on": lambda text: f"the-{text} a.n. {text}a",
    "punctuation around": lambda text: f'"{text}!"...',
    "punctuation between": lambda text: "-".join(text.split()),
    "spaces": lambda text: f" \t{text.replace(' ', '  ')}\n",
    "no-break spaces": lambda text: text.replace(" ", "\u00a0") + "\u00a0",
    "zero-width and other spaces": lambda text: text.replace(" ", "\u2003") + "\u200b\u3000",
    "curly quotes and dashes": lambda text: f"“{text.translate(_CURLY)}”",
    "a sentence around": lambda text: f"I think that it was {text}, in the end.",
    "first word alone": lambda text: (text.split() or [""])[0],
    "last word left out": lambda text: " ".join(text.split()[:-1]),
    "a word twice": lambda text: f"{text} {(text.split() or [''])[0]}",
    "reordered list": _listed,
    "numbers": _swap_number,
    "number and separator": lambda text: f"{text} 1,000 1000 one thousand 1.000 10%",
    "date": _swap_date,
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "accents left out": lambda text: "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)),
    "full-width": lambda text: text.translate(_WIDE),
    "ß, ſ and ligatures": lambda text: text.replace("ss", "ß").replace("s", "ſ").replace("fi", "ﬁ"),
    "Turkish i": lambda text: text.replace("i", "ı").replace("I", "İ"),
    "right to left": lambda text: f"\u202eالجواب {text} תשובה\u202c",
    "emoji": lambda text: f"{text} 🗼👨‍👩‍👧",
    "other script": lambda text: f"Ответ {text} 答え",
    "control characters": lambda text: f"\x00{text}\x1f\x1b[31m",
    "line separators": lambda text: text.replace(" ", "\u2028"),
    "underscores": lambda text: f"_{text.replace(' ', '_')}_ the_a",
    "very long": lambda text: f"{text} " * 200,
    "empty": lambda text: "",
    "only articles": lambda text: "the A an",
    "only punctuation": lambda text: "?!…,.",
    "only spaces": lambda text: " \u00a0\t",
}  # fmt: skip

EDGE_GOLDEN = ("", "The", "a an", "!?", ".", "\u200b", "“", "A", "the a", "İ", "0", "１", "The The", "A.", "An-", "…")
"""Golden answers of no or hardly any text: as data sets do hold them ("A", "The The", "!!!")."""


def pairs(golden_answers: Iterator[tuple[str, ...]], wrong: random.Random) -> Iterator[Pair]:
    """Every change of an answer of each question, one of another question's, and every edge against every edge."""
    asked = list(golden_answers)
    for golden in asked:
        text = wrong.choice(golden)
        for kind, change in CHANGES.items():
            yield Pair(kind, change(text), golden)
        yield Pair("another question's", wrong.choice(wrong.choice(asked)), golden)
    for golden in EDGE_GOLDEN:
        yield from (Pair("edges", answer, (golden,)) for answer in EDGE_GOLDEN)
        yield from (Pair("edges", change(golden), (golden,)) for change in CHANGES.values())


class Independent:
    """torchmetrics' SQuAD scores of one pair."""

    def __init__(self) -> None:
        # A function of the same name hides the module.
        self._squad = importlib.import_module("torchmetrics.functional.text.squad")

    def normalize(self, text: str) -> str:
        return self._squad._normalize_text(text)

    def scores(self, pair: Pair) -> tuple[float, float]:
        """Exact match and F1 over all golden answers."""
        best = (
            max(float(score(pair.answer, golden)) for golden in pair.golden)
            for score in (self._squad._compute_exact_match_score, self._squad._compute_f1_score)
        )
        return next(best), next(best)


def reason(pair: Pair) -> str | None:
    """Why the two differ on purpose; None is an unintended difference."""
    if not normalize_answer(pair.answer) and any(not normalize_answer(golden) for golden in pair.golden):
        return "the answer and a golden answer normalise to nothing: SQuAD calls that right, here nothing is no answer"
    return None


def compare(cases: Iterator[Pair], independent: Independent) -> list[dict[str, object]]:
    """Both implementations' scores of every pair, with the reason where they differ."""
    rows: list[dict[str, object]] = []
    for pair in cases:
        match, squad_f1 = independent.scores(pair)
        ours = exact_match(pair.answer, pair.golden), f1(pair.answer, pair.golden)
        agrees = ours[0] == match and abs(ours[1] - squad_f1) < SINGLE_PRECISION
        agrees &= all(normalize_answer(text) == independent.normalize(text) for text in (pair.answer, *pair.golden))
        rows.append(
            {
                "kind": pair.kind,
                "answer": pair.answer,
                "golden_answers": list(pair.golden),
                "exact_match": ours[0],
                "f1": ours[1],
                "cover_match": cover_match(pair.answer, pair.golden),
                "squad_exact_match": match,
                "squad_f1": squad_f1,
                "agrees": agrees,
                "reason": None if agrees else reason(pair),
            }
        )
    return rows


def report(table: pl.DataFrame) -> list[str]:
    """The result as Markdown."""
    by_kind = table.group_by("kind", maintain_order=True).agg(
        pl.len().alias("pairs"), pl.col("agrees").sum(), pl.col("exact_match", "f1", "cover_match").mean()
    )
    lines = ["| kind | pairs | agree | exact match | F1 | cover match |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {k} | {n:,} | {a:,} | {e:.3f} | {f:.3f} | {c:.3f} |" for k, n, a, e, f, c in by_kind.iter_rows()]
    differ = table.filter(~pl.col("agrees"))
    of_golden = differ.with_columns(pl.col("reason").fill_null("NOT MEANT")).group_by(
        "golden_answers", "exact_match", "squad_exact_match", "reason", maintain_order=True
    )
    listed = [
        f"| {_shown(*golden)} | {ours:.0f} | {theirs:.0f} | {why} | {_shown(*dict.fromkeys(answers))} |"
        for golden, ours, theirs, why, answers in of_golden.agg("answer").iter_rows()
    ]
    return [
        f"{table.height:,} pairs; {differ.height:,} differ, {differ['reason'].null_count()} of them without a reason.",
        "Real golden answers with all their aliases, each changed in every way below, and golden answers of hardly any text "
        '("edges"). Exact match, F1 and the normalised texts themselves are compared with torchmetrics\' implementation of '
        "SQuAD's evaluation. Means are of ours: what a change costs an answer that was right.",
        "\n".join(lines),
        "## Every difference",
        "\n".join(
            [
                "| golden answers | ours: exact match | SQuAD's | reason | answers |",
                "| --- | --- | --- | --- | --- |",
                *listed,
            ]
        ),
    ]


def _shown(*texts: str) -> str:
    return " ".join(f"`{(text if len(text) < 40 else text[:30] + '…')!r}`" for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=120, help="of each suite")
    options = parser.parse_args()
    from benchmarks.shared.report import write_result

    suites = load_suites(options.data, limit=options.questions, seed=0)
    golden = (question.golden_answers for suite in suites for question in suite.questions)
    began = time.perf_counter()
    table = pl.DataFrame(compare(pairs(golden, random.Random(0)), Independent()), infer_schema_length=None)
    write_result(
        "scoring",
        "Scores against an independent implementation of SQuAD's",
        report(table),
        table.drop("golden_answers", "answer"),
    )
    print(f"{time.perf_counter() - began:.0f} s")
    if table.filter(~pl.col("agrees") & pl.col("reason").is_null()).height:
        sys.exit("some differences have no reason")
