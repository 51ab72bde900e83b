"""Question files on the Hugging Face hub: which file of a data set holds a split, and clear words when it is not there."""

from __future__ import annotations

from pathlib import Path

from searchr1_async.errors import QuestionsError

FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
SUITES = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
"""FlashRAG's suites that the field reports, each with the split that it is reported on."""

HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def fetch_questions_file(name: str, split: str | None) -> Path:
    """Downloads (or finds in the hub's own cache) the file of one split.

    Args:
        name: a key of :data:`SUITES`, or ``"org/name"`` of any data set with ``<split>.parquet`` or ``<split>.jsonl``.
        split: None means the suite's usual split, ``"train"`` for any other data set.

    Raises:
        QuestionsError: no such data set or split, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository = FLASHRAG if name in SUITES else name
    split = split or SUITES.get(name, "train")
    stem = f"{name}/{split}" if name in SUITES else split
    suffixes = ("jsonl",) if name in SUITES else ("parquet", "jsonl")
    for candidate in (*(f"{stem}.{suffix}" for suffix in suffixes), *(f"data/{stem}.{s}" for s in suffixes)):
        try:
            return Path(hf_hub_download(repository, candidate, repo_type="dataset"))
        except LocalEntryNotFoundError as error:
            raise QuestionsError(
                f"the Hugging Face hub cannot be reached for {repository} ({candidate}), and it is not in the hub's "
                "cache: connect, or download the file yourself and give its path, or take the built-in 'atlas'"
            ) from error
        except EntryNotFoundError:
            continue
        except RepositoryNotFoundError as error:
            raise QuestionsError(
                f"the Hugging Face hub has no data set {repository!r} that you may read: check its name, "
                "or log in with `hf auth login` if it is private"
            ) from error
        except Exception as error:  # the hub's client raises whatever its transport does
            raise QuestionsError(
                f"{candidate} of the Hugging Face data set {repository} cannot be downloaded "
                f"({type(error).__name__}): download it yourself and give its path, or take the built-in 'atlas'"
            ) from error
    raise QuestionsError(
        f"the Hugging Face data set {repository} has no file {stem}.parquet or {stem}.jsonl: "
        "name another split, or download the file you mean and give its path"
    )
