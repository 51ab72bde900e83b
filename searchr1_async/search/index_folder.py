"""The folder of an index: its identity, and whether it is complete."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from searchr1_async.boundary.paths import cache_folder, write_atomically
from searchr1_async.data.corpus import Corpus
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Embedder

INDEX_FORMAT = 1


@dataclass(frozen=True, slots=True)
class IndexIdentity:
    """What an index was built from. Only an index with the same content is used or continued."""

    corpus: str
    embedder: str
    source: str
    embedder_name: str
    passages: int
    format: int = INDEX_FORMAT

    def same_content(self, other: IndexIdentity) -> bool:
        """Compares fingerprints; names may differ."""
        return (self.format, self.corpus, self.embedder) == (other.format, other.corpus, other.embedder)


@dataclass(frozen=True, slots=True)
class IndexFolder:
    """State files of an index: ``building.json`` during a build, ``index.json`` once complete."""

    path: Path

    @property
    def whole(self) -> IndexIdentity | None:
        return _read(self.path / "index.json")

    @property
    def begun(self) -> IndexIdentity | None:
        return _read(self.path / "building.json")

    @property
    def journal(self) -> Path:
        """Vectors that are not in the store yet."""
        return self.path / "journal"

    def begin(self, identity: IndexIdentity) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "building.json", identity)

    def finish(self, identity: IndexIdentity) -> None:
        _write(self.path / "index.json", identity)
        (self.path / "building.json").unlink(missing_ok=True)

    def forget(self) -> None:
        """Marks the index as neither complete nor begun, so that missing passages are built."""
        (self.path / "index.json").unlink(missing_ok=True)
        (self.path / "building.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes the store's files before a rebuild; journaled vectors stay. Raises OSError."""
        (self.path / "index.json").unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path not in (self.journal, self.path / "building.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def refuse_others(self, identity: IndexIdentity) -> None:
        """Raises StoreError if the folder holds anything but this index."""
        found = self.whole or self.begun
        if found is not None and not found.same_content(identity):
            raise StoreError(
                f"{self.path} holds the index of {found.source} by {found.embedder_name}, not of {identity.source} by "
                f"{identity.embedder_name} (or the corpus has changed since): use another path, or delete this folder"
            )
        if found is None and self.path.is_dir() and any(self.path.iterdir()):
            raise StoreError(
                f"{self.path} holds files that are not an index of this package: use an empty or new folder"
            )


def building_call(path: Path) -> str | None:
    """The Python call that rebuilds the index in a folder; None if it is not this package's."""
    folder = IndexFolder(path)
    if (found := folder.whole or folder.begun) is None:
        return None
    is_named = found.source == "atlas" or Path(found.source).is_file()
    corpus = repr(found.source) if is_named else "corpus"
    return f"await sr.build_index({corpus}, {str(path)!r}, embedder={found.embedder_name!r})"


def default_index_folder(corpus: Corpus, embedder: Embedder) -> Path:
    """Folder in the user's cache, named by the content of corpus and embedder."""
    key = hashlib.sha256(f"{INDEX_FORMAT}\0{corpus.fingerprint}\0{embedder.fingerprint}".encode()).hexdigest()
    return cache_folder() / "indexes" / key[:24]


def _read(file: Path) -> IndexIdentity | None:
    try:
        return IndexIdentity(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, identity: IndexIdentity) -> None:
    write_atomically(file, json.dumps(asdict(identity), indent=2).encode())
