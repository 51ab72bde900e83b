"""What the search benchmark asks: passages, and episodes that search them, from real data or made alike with a seed.

The episodes of a group ask about one question, so their queries are alike: some are word for word the same, some vary. In
a published run over half of the texts were embedded before; here it is about the same (:meth:`Load.repeated`).
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

TURNS = {1: 0.25, 2: 0.4, 3: 0.25, 4: 0.1}
"""How many episodes search how often."""
SHARED = 0.76
"""Fraction of searches whose query is one of the group's; the others are reworded."""
PAUSE_MEDIAN, PAUSE_SPREAD = 2.0, 0.5
"""Seconds that a model samples before it searches, and the standard deviation of their logarithm."""


@dataclass(frozen=True)
class Step:
    """One turn of an episode: what it samples for, in seconds, and what it searches for then."""

    pause: float
    query: str


@dataclass(frozen=True)
class Load:
    """Episodes, in the order in which they start, with the right answer of each query."""

    episodes: tuple[tuple[Step, ...], ...]
    at_once: int
    """Episodes in flight."""
    right: Mapping[str, tuple[str, ...]]
    """The ids of a query's nearest passages, found by one plain request; filled in once the passages are served."""

    @property
    def queries(self) -> list[str]:
        """One a search, in order."""
        return [step.query for episode in self.episodes for step in episode]

    @property
    def repeated(self) -> float:
        """Fraction of searches whose query was asked before."""
        return 1 - len(set(self.queries)) / len(self.queries)

    def save(self, path: Path) -> None:
        """As JSON, for the processes that play it."""
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> Load:
        """What :meth:`save` wrote."""
        values = json.loads(path.read_text())
        episodes = tuple(tuple(Step(**step) for step in episode) for episode in values["episodes"])
        return Load(episodes, values["at_once"], {query: tuple(ids) for query, ids in values["right"].items()})


@dataclass(frozen=True)
class Subject:
    """What a group asks about."""

    question: str
    queries: tuple[str, ...]
    """What models searched for, or would."""


def make_load(
    subjects: Sequence[Subject], *, groups: int, group_size: int, at_once: int, pause_scale: float, seed: int
) -> Load:
    """The episodes of as many groups.

    Args:
        subjects: one a group, taken in a seeded order.
        groups: questions.
        group_size: episodes a question.
        at_once: episodes in flight.
        pause_scale: 1 means pauses of about 2 s.
        seed: of everything drawn.
    """
    generator = random.Random(f"load/{seed}")
    chosen = generator.sample(subjects, groups)
    episodes = [
        tuple(
            Step(pause_scale * generator.lognormvariate(0, PAUSE_SPREAD) * PAUSE_MEDIAN, _query(subject, generator))
            for _ in range(generator.choices(list(TURNS), list(TURNS.values()))[0])
        )
        for subject in chosen
        for _ in range(group_size)
    ]
    return Load(tuple(episodes), at_once, {})


def _query(subject: Subject, generator: random.Random) -> str:
    pool = list(dict.fromkeys([*subject.queries, subject.question]))
    query = generator.choices(pool, [1 / (rank + 1) for rank in range(len(pool))])[0]
    if generator.random() < SHARED:
        return query
    words = query.split()
    if len(words) > 2:
        words.pop(generator.randrange(len(words)))
    words.insert(generator.randrange(len(words) + 1), generator.choice(generator.choice(pool).split()))
    return " ".join(words)


# --- real data ------------------------------------------------------------------------------------------------------------

_SEARCHED = re.compile(r"<search>(.*?)</search>", re.DOTALL)
_TITLE = re.compile(r'Doc \d\(Title: "?([^")]+)"?\)')


def real_subjects(folder: Path) -> list[Subject]:
    """From published transcripts: the question, what was searched for, and the titles found, which the next turn asks for."""
    queries: dict[str, dict[str, None]] = {}
    titles: dict[str, dict[str, None]] = {}
    with gzip.open(folder / "search_r1_traces.jsonl.gz", "rt", encoding="utf-8") as lines:
        for trace in map(json.loads, lines):
            searched = [" ".join(query.split()) for query in _SEARCHED.findall(trace["response"])]
            question = " ".join(trace["question"].split())
            queries.setdefault(question, {}).update(dict.fromkeys(query for query in searched if len(query) > 4))
            titles.setdefault(question, {}).update(dict.fromkeys(_TITLE.findall(trace["response"])))
    return [
        Subject(question, (*found, *itertools.islice(titles[question], 3)))
        for question, found in queries.items()
        if found
    ]


def real_passages(folder: Path, count: int) -> pl.DataFrame:
    """``id``, ``title`` and ``text`` of the corpus; where it is smaller, further ones of a half each of two passages."""
    corpus = pl.read_parquet(folder / "corpus.parquet").select("id", "title", "text").head(count)
    missing = count - corpus.height
    if not missing:
        return corpus
    first = corpus.sample(missing, seed=1, with_replacement=missing > corpus.height)
    second = corpus.sample(missing, seed=2, with_replacement=missing > corpus.height)
    halves = pl.DataFrame(
        {
            "id": [f"joined-{number}" for number in range(missing)],
            "title": first["title"],
            "text": [
                f"{one[: len(one) // 2]} {other[len(other) // 2 :]}"
                for one, other in zip(first["text"], second["text"], strict=True)
            ],
        }
    )
    return pl.concat([corpus, halves])


# --- made data ------------------------------------------------------------------------------------------------------------


def made_data(subjects: int, passages: int, seed: int) -> tuple[list[Subject], pl.DataFrame]:
    """Subjects of a few rare words each, and passages of about 100 words in which some of these occur."""
    generator = random.Random(f"data/{seed}")
    words = list(itertools.islice(_words(generator), 30_000))
    common = words[:2_000]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(common))))
    rows, out = [], []
    for number in range(max(subjects, passages // 20)):
        topic = generator.sample(words[2_000:], 6)
        if number < subjects:
            queries = tuple(
                " ".join(generator.sample(topic, 3) + generator.choices(common, cum_weights=weights, k=2))
                for _ in range(4)
            )
            question = " ".join(["who", "was", "the", *topic[:4], *generator.choices(common, cum_weights=weights, k=4)])
            out.append(Subject(question, queries))
        for part in range(-(-passages // max(subjects, passages // 20))):
            text = generator.choices(common, cum_weights=weights, k=90) + generator.sample(topic, 4) * 2
            generator.shuffle(text)
            rows.append({"id": f"{number}/{part}", "title": " ".join(topic[:2]), "text": " ".join(text)})
    return out, pl.DataFrame(rows[:passages])


def _words(generator: random.Random) -> Iterator[str]:
    """Different pronounceable words, the shorter ones first."""
    seen: set[str] = set()
    for number in itertools.count():
        syllables = 2 + number // 8_000
        word = "".join(generator.choice("bdfgklmnprstvz") + generator.choice("aeiou") for _ in range(syllables))
        if word not in seen:
            seen.add(word)
            yield word
