"""The folder of an index: what it was made of, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from searchr1_async.boundary.paths import cache_folder
from searchr1_async.data.corpus import Corpus
from searchr1_async.errors import StoreError
from searchr1_async.files import write_atomically
from searchr1_async.search.embedders.base import Embedder

INDEX_FORMAT = 1


@dataclass(frozen=True, slots=True)
class IndexIdentity:
    """What an index was made of. Only an index with the same identity is used or continued."""

    corpus: str
    embedder: str
    source: str
    embedder_name: str
    passages: int
    format: int = INDEX_FORMAT

    def same_content(self, other: IndexIdentity) -> bool:
        """Names may differ: equal fingerprints are equal content."""
        return (self.format, self.corpus, self.embedder) == (other.format, other.corpus, other.embedder)


@dataclass(frozen=True, slots=True)
class IndexFolder:
    """The two files that tell the state of an index: ``building.json`` while it grows, ``index.json`` when it is whole."""

    path: Path

    @property
    def whole(self) -> IndexIdentity | None:
        return _read(self.path / "index.json")

    @property
    def begun(self) -> IndexIdentity | None:
        return _read(self.path / "building.json")

    @property
    def journal(self) -> Path:
        """Where vectors lie that are not in the store yet."""
        return self.path / "journal"

    def begin(self, identity: IndexIdentity) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "building.json", identity)

    def finish(self, identity: IndexIdentity) -> None:
        _write(self.path / "index.json", identity)
        (self.path / "building.json").unlink(missing_ok=True)

    def forget(self) -> None:
        """Neither whole nor begun: whatever it lacks is built."""
        (self.path / "index.json").unlink(missing_ok=True)
        (self.path / "building.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes what the store has here of an index that is begun again; vectors in the journal stay.

        Raises:
            OSError: it cannot be deleted.
        """
        (self.path / "index.json").unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path not in (self.journal, self.path / "building.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def refuse_others(self, identity: IndexIdentity) -> None:
        """Raises StoreError where the folder holds something else than this index, whole or begun."""
        found = self.whole or self.begun
        if found is not None and not found.same_content(identity):
            raise StoreError(
                f"{self.path} holds the index of {found.source} by {found.embedder_name}, not of {identity.source} by "
                f"{identity.embedder_name} (or the corpus has changed since): give another path, or delete that folder"
            )
        if found is None and self.path.is_dir() and any(self.path.iterdir()):
            raise StoreError(
                f"{self.path} holds files that are no index of this package: give an empty or a new folder"
            )


def building_call(path: Path) -> str | None:
    """The Python call that builds the index of a folder again, where it is one of this package's; None for any other folder."""
    folder = IndexFolder(path)
    if (found := folder.whole or folder.begun) is None:
        return None
    is_named = found.source == "atlas" or Path(found.source).is_file()
    corpus = repr(found.source) if is_named else "corpus"
    return f"await sr.build_index({corpus}, {str(path)!r}, embedder={found.embedder_name!r})"


def default_index_folder(corpus: Corpus, embedder: Embedder) -> Path:
    """In the user's cache, named by the content of both: another corpus or embedder gets a folder of its own."""
    key = hashlib.sha256(f"{INDEX_FORMAT}\0{corpus.fingerprint}\0{embedder.fingerprint}".encode()).hexdigest()
    return cache_folder() / "indexes" / key[:24]


def _read(file: Path) -> IndexIdentity | None:
    try:
        return IndexIdentity(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, identity: IndexIdentity) -> None:
    write_atomically(file, json.dumps(asdict(identity), indent=2).encode())
