"""Display names and explanations of metrics and outcomes."""

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
    "exact_match": "the answer equals a golden answer after SQuAD normalisation",
    "f1": "token overlap with the best-matching golden answer",
    "cover_match": "the answer contains a golden answer as whole words",
    "format": "the answer could be parsed",
    "judged": "a judge model accepts the answer",
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
    "right_seen": "right, and a retrieved passage contains a golden answer",
    "right_unseen": "right, but no retrieved passage contains a golden answer",
    "reading_failed": "wrong, although a retrieved passage contains a golden answer",
    "search_failed": "wrong; it searched, but no retrieved passage contains a golden answer",
    "no_search": "wrong, without a valid search; for systems without search, every wrong answer",
    "no_answer": "no parseable answer",
    "failed": "a service failed: excluded from all scores",
}


def metric_words(metric: str) -> str:
    """A metric's display name."""
    return METRIC_WORDS.get(metric, metric.replace("_", " "))
