"""Question suites and corpora: built in, from files, and from the Hugging Face hub."""

from searchr1_async.data.corpus import Corpus, load_corpus
from searchr1_async.data.questions import load_questions

__all__ = ["Corpus", "load_corpus", "load_questions"]
