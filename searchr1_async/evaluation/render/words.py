"""Figures and outcomes in words: one place for cells, pages, Markdown and LaTeX."""

from __future__ import annotations

METRIC_WORDS = {
    "exact_match": "exact match",
    "f1": "F1",
    "cover_match": "cover match",
    "format": "format",
    "judged": "judged right",
    "answer_in_passage": "answer seen",
    "gold_recall": "gold passages seen",
}

METRIC_MEANINGS = {
    "exact_match": "the answer is exactly a golden one after SQuAD's normalisation",
    "f1": "overlap of the answer's words with the best golden answer",
    "cover_match": "the answer holds a golden one as whole words",
    "format": "an answer could be read",
    "judged": "a judge model calls the answer right",
}

OUTCOME_WORDS: dict[str, str] = {
    "right_seen": "right, answer seen",
    "right_unseen": "right, answer not seen",
    "reading_failed": "reading failed",
    "search_failed": "search failed",
    "no_search": "wrong, no search",
    "no_answer": "no answer",
    "failed": "service failed",
}

OUTCOME_MEANINGS: dict[str, str] = {
    "right_seen": "right, and a golden answer stood in a passage that it was shown",
    "right_unseen": "right, though no passage that it was shown holds a golden answer",
    "reading_failed": "wrong, though a golden answer stood in a passage that it was shown",
    "search_failed": "wrong; it searched, and no passage that it was shown holds a golden answer",
    "no_search": "wrong, without one valid search; of a system that has no search, every wrong answer",
    "no_answer": "no answer could be read, whatever it was shown",
    "failed": "a service failed: left out of every score",
}


def metric_words(metric: str) -> str:
    """A figure's name for people."""
    return METRIC_WORDS.get(metric, metric.replace("_", " "))
