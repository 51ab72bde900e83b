"""How a compact index lies on disk: one folder, read-only once it is whole.

::

    <folder>/manifest.json      what it is, what it was made of, and the checksums of the other files
    <folder>/codes.faiss        centres of inverted lists, a file of faiss's own
    <folder>/lists.bin          for each list its codes of 1 bit a number (RaBitQ) and their rows; mapped into memory
    <folder>/lists.sizes        codes in each list: int64, little-endian
    <folder>/vectors.bin        the vectors, row after row, float16 or 8-bit: the best candidates are ranked again by them
    <folder>/scales.bin         of 8-bit vectors: a float32 for each
    <folder>/passages.jsonl     the passages, one ``["id", "title", "text"]`` a line
    <folder>/passages.offsets   where each line begins, and where the last one ends: uint64, little-endian
    <folder>/building/          only while it is made (:mod:`.build`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from searchr1_async.boundary.settings import Count, Range, check_settings
from searchr1_async.errors import StoreError
from searchr1_async.files import write_atomically
from searchr1_async.search.stores.base import Metric
from searchr1_async.search.stores.checksums import FileRecord

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
    """Of all files of an index beside its manifest."""
    names = [CODES_NAME, LISTS_NAME, SIZES_NAME, VECTORS_NAME, PASSAGES_NAME, OFFSETS_NAME]
    return [*names, SCALES_NAME] if vectors == "int8" else names


@dataclass(frozen=True, slots=True)
class CompactSettings:
    """How a compact index is made.

    Raises:
        ConfigurationError: a setting out of its range.
    """

    vectors: VectorType = "float16"
    """What the full vectors are kept as: ``"float16"`` (2 bytes a number, 32 GB for 21 million of 768) or ``"int8"`` (half)."""
    lists: Count | None = None
    """Inverted lists; None: see :func:`~searchr1_async.search.stores.compact.lists.lists_for`. More are finer, and each costs a query."""
    recall: Annotated[float, Range(over=0, at_most=1)] = 0.95
    """Of the exact ``recall_at`` nearest, the share that a search shall find at least: probes and candidates are chosen for it, and for
    more where that leaves hundreds of queries a second."""
    recall_at: Annotated[int, Range(at_least=1, at_most=100)] = 3
    """As many as a search usually asks for."""
    threads: Count | None = None
    """Of faiss while it builds; None: one for each core."""
    seed: int = 1
    """Of samples and clusters."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What one choice of probes and candidates came to on the sample of queries."""

    probes: int
    """Inverted lists that a query looks through, on average."""
    most_probes: int
    margin: float | None
    """As in :class:`Calibration`."""
    candidates: int
    recall_at_3: float
    recall_at_10: float
    recall: float
    """Of the ``recall_at`` asked for."""
    queries_per_second: float
    """In batches, on the machine that built it, with what is read in the page cache."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How probes and candidates were chosen."""

    queries: int
    """Of the sample."""
    origin: str
    """``"queries"`` that the user gave, or ``"passages"`` of the index, each sought without itself: easier than real queries."""
    probes: int
    """Inverted lists that a query looks through, on average."""
    most_probes: int
    """That a query looks through at most."""
    margin: float | None
    """How much farther than the nearest centre a list's may be to be looked through, as
    :func:`~searchr1_async.search.stores.compact.probing.gaps` counts it; None: any."""
    candidates: int
    """Passages, the nearest by their codes, that are ranked again by their vectors."""
    recall: float
    """Reached with these on the sample."""
    asked: float
    recall_at: int
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True)
class CompactManifest:
    """What a compact index is."""

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
    """As :func:`~searchr1_async.search.embedders.choice.make_embedder` takes it; None: whoever opens it has to say."""
    embedder_fingerprint: str | None
    files: Mapping[str, FileRecord]
    calibration: Calibration
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of faiss and numpy."""

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json``, whole or not at all; with it the index is whole.

        Raises:
            OSError: the folder cannot be written.
        """
        values = {"kind": COMPACT_KIND, "format": COMPACT_FORMAT, **asdict(self)}
        write_atomically(folder / MANIFEST_NAME, json.dumps(values, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> CompactManifest:
        """The manifest of an index that is whole.

        Raises:
            StoreError: there is none, or it is another program's, another version's, or broken.
        """
        path = folder / MANIFEST_NAME
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            if values.pop("kind", None) != COMPACT_KIND:
                raise StoreError(
                    f"{path} is not that of a compact index: name the folder that holds one", is_fatal=True
                )
            if (written := values.pop("format")) != COMPACT_FORMAT:
                raise StoreError(
                    f"{folder} is a compact index of format {written}, and this version of the package reads "
                    f"{COMPACT_FORMAT}: make it again, or take the version that made it",
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
                f"{folder} holds a compact index that is not finished: run the command that began it again"
                if begun
                else f"{folder} holds no compact index (no {MANIFEST_NAME})",
                is_fatal=True,
            ) from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}", is_fatal=True) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{path} is broken ({type(error).__name__}: {error})", is_fatal=True) from error

    def _refuse_nonsense(self) -> None:
        chosen = self.calibration
        numbers = (self.passages, self.dimension, self.lists, chosen.probes, chosen.most_probes, chosen.candidates)
        sizes = [record.bytes for record in self.files.values()]
        if not all(isinstance(number, int) and number >= 1 for number in (*numbers, *sizes)):
            raise ValueError("a number in it is none, or below 1")
        if chosen.margin is not None and not chosen.margin >= 0:
            raise ValueError(f"the margin is {chosen.margin!r}")
        if not all(isinstance(record.blocks, str) for record in self.files.values()):
            raise ValueError("checksums in it are none")
        if self.vectors not in ("float16", "int8") or self.metric not in ("cosine", "l2", "ip"):
            raise ValueError(f"vectors are {self.vectors!r}, the metric is {self.metric!r}")
        if missing := sorted(set(file_names(self.vectors)) - self.files.keys()):
            raise ValueError(f"it does not tell of {', '.join(missing)}")

    @property
    def fingerprint(self) -> str:
        """Equal for equal content, wherever it lies."""
        return "-".join(["compact", *(f"{record.blocks[:16]}{record.blocks[-16:]}" for record in self.files.values())])
