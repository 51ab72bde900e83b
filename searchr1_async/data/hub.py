"""Downloads question files from the Hugging Face hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
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
"""FlashRAG's standard suites, each with the split that is usually reported."""

HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(rf"(?P<name>{HUB_NAME}|{'|'.join(SUITES)})(?:@(?P<revision>[\w.-]+)(?:/(?P<filename>[^#]+))?)?")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A reference to a data set on the hub."""

    name: str
    """A key of :data:`SUITES`, or ``"org/name"``."""
    revision: str | None = None
    """A commit, branch or tag; None is the latest."""
    filename: str | None = None
    """A file; None is the split's file."""


@dataclass(frozen=True, slots=True)
class HubQuestions:
    """A downloaded question file."""

    path: Path
    repository: str
    commit: str
    """The commit of the requested revision."""
    filename: str

    @property
    def source(self) -> str:
        """A reference for :func:`read_reference` that is pinned to this commit."""
        return f"{self.repository}@{self.commit}/{self.filename}"


def read_reference(text: str) -> HubReference | None:
    """``"nq"`` or ``"org/name"``, optionally with ``@revision`` and then ``/file``; None for any other text."""
    found = _REFERENCE.fullmatch(text)
    if not found or ".." in (found["filename"] or "").split("/"):  # a manifest may be untrusted
        return None
    return HubReference(found["name"], found["revision"], found["filename"])


def split_of(reference: HubReference, split: str | None) -> str:
    """The split to read: the file's own, the requested one, the suite's usual one, or ``"train"``."""
    if reference.filename:
        return reference.filename.rsplit("/", 1)[-1].split(".")[0]
    return split or SUITES.get(reference.name, "train")


def fetch_questions_file(reference: HubReference, split: str | None) -> HubQuestions:
    """Downloads the file of one split, or finds it in the hub's cache.

    Args:
        reference: one of :data:`SUITES`, or any data set with ``<split>.parquet`` or ``<split>.jsonl``.
        split: None means the suite's usual split, or ``"train"`` for other data sets.

    Raises:
        QuestionsError: the data set, revision or split does not exist, or the hub cannot be reached.
    """
    repository = FLASHRAG if reference.name in SUITES else reference.name
    split = split_of(reference, split)
    stem = f"{reference.name}/{split}" if reference.name in SUITES else split
    suffixes = ("jsonl",) if reference.name in SUITES else ("parquet", "jsonl")
    tried = tuple(f"{folder}{stem}.{suffix}" for folder in ("", "data/") for suffix in suffixes)
    for filename in (reference.filename,) if reference.filename else tried:
        if path := _fetch(repository, filename, reference.revision):
            # …/snapshots/<commit>/<filename>
            return HubQuestions(path, repository, path.parents[filename.count("/")].name, filename)
    raise QuestionsError(
        f"the Hugging Face data set {repository} has no file {reference.filename or ' or '.join(tried)}: "
        "name another split, or download the file you mean and give its path"
    )


def _fetch(repository: str, filename: str, revision: str | None) -> Path | None:
    """The file in the hub's cache; None if the data set has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        return Path(
            hf_hub_download(repository, filename, repo_type="dataset", revision=revision, endpoint=endpoint),
        )
    except LocalEntryNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face hub cannot be reached for {repository} ({filename}), and the file is not in the hub's "
            "cache: go online, pass the path of a file you downloaded, or use the built-in 'atlas'"
        ) from error
    except EntryNotFoundError:
        return None
    except RevisionNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face data set {repository} has no revision {revision!r}: use an existing commit, branch or tag"
        ) from error
    except RepositoryNotFoundError as error:
        raise QuestionsError(
            f"the Hugging Face data set {repository!r} does not exist or is not accessible: check its name, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub's client lets errors of its transport through
        raise QuestionsError(
            f"{filename} of the Hugging Face data set {repository} cannot be downloaded "
            f"({type(error).__name__}): download it yourself and pass its path, or use the built-in 'atlas'"
        ) from error
