"""On-disk layout of a compact index: one folder, read-only once complete.

::

    <folder>/manifest.json      description, provenance, and checksums of the other files
    <folder>/codes.faiss        centres of the inverted lists, in faiss's format
    <folder>/lists.bin          per list, its 1-bit codes (RaBitQ) and their rows; memory-mapped
    <folder>/lists.sizes        codes per list: int64, little-endian
    <folder>/vectors.bin        full vectors by row, float16 or int8; used to re-rank candidates
    <folder>/scales.bin         for int8 vectors: one float32 per row
    <folder>/passages.jsonl     passages, one ``["id", "title", "text"]`` per line
    <folder>/passages.offsets   byte offset of each line, and of the end: uint64, little-endian
    <folder>/building/          present only during a build (:mod:`.assembly`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from searchr1_async.boundary.paths import write_atomically
from searchr1_async.boundary.settings import Count, Range, check_settings
from searchr1_async.errors import StoreError
from searchr1_async.search.stores.vector_store import FileRecord, Metric

COMPACT_KIND = "searchr1_async compact index"
COMPACT_FORMAT = 2
MANIFEST_NAME = "manifest.json"
CODES_NAME = "codes.faiss"
LISTS_NAME = "lists.bin"
SIZES_NAME = "lists.sizes"
VECTORS_NAME = "vectors.bin"
SCALES_NAME = "scales.bin"
PASSAGES_NAME = "passages.jsonl"
OFFSETS_NAME = "passages.offsets"
BUILDING_NAME = "building"

VectorType = Literal["float16", "int8"]


def file_names(vectors: VectorType) -> list[str]:
    """All files of an index besides the manifest."""
    names = [CODES_NAME, LISTS_NAME, SIZES_NAME, VECTORS_NAME, PASSAGES_NAME, OFFSETS_NAME]
    return [*names, SCALES_NAME] if vectors == "int8" else names


@dataclass(frozen=True, slots=True)
class CompactSettings:
    """Build settings of a compact index.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    vectors: VectorType = "float16"
    """Storage of the full vectors: ``"float16"`` (2 bytes per number, 32 GB for 21 million of 768) or ``"int8"`` (half)."""
    lists: Count | None = None
    """Inverted lists; None uses :func:`~searchr1_async.search.compact.inverted_lists.lists_for`."""
    recall: Annotated[float, Range(over=0, at_most=1)] = 0.95
    """Target share of the exact ``recall_at`` nearest passages. Calibration may exceed it while queries stay cheap."""
    recall_at: Annotated[int, Range(at_least=1, at_most=100)] = 3
    """Usual number of results per search."""
    threads: Count | None = None
    """faiss threads during the build; None uses one per core."""
    seed: int = 1
    """Seed of samples and clusters."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Measurement of one choice of probes and candidates on the sample queries."""

    probes: int
    """Mean inverted lists searched per query."""
    most_probes: int
    margin: float | None
    """See :class:`Calibration`."""
    candidates: int
    recall_at_3: float
    recall_at_10: float
    recall: float
    """At ``recall_at``."""
    queries_per_second: float
    """Batched, with a warm page cache, on the build machine."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The chosen probes and candidates, and the measurements behind the choice."""

    queries: int
    """Sample queries."""
    origin: str
    """``"queries"`` (given by the user) or ``"passages"`` (of the index, each excluded from its own results; easier than real queries)."""
    probes: int
    """Mean inverted lists searched per query."""
    most_probes: int
    """Maximum lists searched per query."""
    margin: float | None
    """A list is searched if its :func:`gap <searchr1_async.search.compact.inverted_lists.gaps>` is at most this; None: no limit."""
    candidates: int
    """Passages nearest by their codes, re-ranked by their full vectors."""
    recall: float
    """Measured with this choice on the sample."""
    asked: float
    recall_at: int
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True)
class CompactManifest:
    """Describes a compact index."""

    created: str
    """UTC, ISO 8601."""
    passages: int
    dimension: int
    metric: Metric
    vectors: VectorType
    lists: int
    seed: int
    source: str
    source_fingerprint: str
    embedder: str | None
    """As accepted by :func:`~searchr1_async.search.gemini.make_embedder`; None: the caller has to name it."""
    embedder_fingerprint: str | None
    files: Mapping[str, FileRecord]
    calibration: Calibration
    versions: Mapping[str, str] = field(default_factory=dict)
    """faiss and numpy versions."""

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` atomically, which completes the index.

        Raises:
            OSError: the folder cannot be written.
        """
        values = {"kind": COMPACT_KIND, "format": COMPACT_FORMAT, **asdict(self)}
        write_atomically(folder / MANIFEST_NAME, json.dumps(values, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> CompactManifest:
        """Loads the manifest of a complete index.

        Raises:
            StoreError: it is missing, corrupt, from another program or of another format version.
        """
        path = folder / MANIFEST_NAME
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            if values.pop("kind", None) != COMPACT_KIND:
                raise StoreError(
                    f"{path} is not the manifest of a compact index: name a folder that holds one", is_fatal=True
                )
            if (written := values.pop("format")) != COMPACT_FORMAT:
                raise StoreError(
                    f"{folder} is a compact index of format {written}, but this version of the package reads format "
                    f"{COMPACT_FORMAT}: rebuild it, or install the version that built it",
                    is_fatal=True,
                )
            values = {name: values[name] for name in (each.name for each in fields(cls)) if name in values}
            files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
            chosen = values.pop("calibration")
            curve = tuple(CurvePoint(**point) for point in chosen.pop("curve"))
            found = cls(**values, files=files, calibration=Calibration(**chosen, curve=curve))
            found._refuse_nonsense()
            return found
        except FileNotFoundError as error:
            begun = (folder / BUILDING_NAME).is_dir()
            raise StoreError(
                f"{folder} holds an unfinished compact index: run the build command again"
                if begun
                else f"{folder} holds no compact index (no {MANIFEST_NAME})",
                is_fatal=True,
            ) from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}", is_fatal=True) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{path} is corrupt ({type(error).__name__}: {error})", is_fatal=True) from error

    def _refuse_nonsense(self) -> None:
        chosen = self.calibration
        numbers = (self.passages, self.dimension, self.lists, chosen.probes, chosen.most_probes, chosen.candidates)
        sizes = [record.bytes for record in self.files.values()]
        if not all(isinstance(number, int) and number >= 1 for number in (*numbers, *sizes)):
            raise ValueError("a count is not an integer, or is below 1")
        if chosen.margin is not None and not chosen.margin >= 0:
            raise ValueError(f"the margin is {chosen.margin!r}")
        if not all(isinstance(record.blocks, str) for record in self.files.values()):
            raise ValueError("checksums are not strings")
        if self.vectors not in ("float16", "int8") or self.metric not in ("cosine", "l2", "ip"):
            raise ValueError(f"vectors are {self.vectors!r}, the metric is {self.metric!r}")
        if missing := sorted(set(file_names(self.vectors)) - self.files.keys()):
            raise ValueError(f"it does not list {', '.join(missing)}")

    @property
    def fingerprint(self) -> str:
        """Equal for equal content, wherever it is stored."""
        return "-".join(["compact", *(f"{record.blocks[:16]}{record.blocks[-16:]}" for record in self.files.values())])
