"""Making a compact index: gone on with after any failure, to the same files; sources that break their word."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from searchr1_async.errors import StoreError
from searchr1_async.events import Event, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.search.compact import assembly as build
from searchr1_async.search.compact.assembly import CompactBuilder
from searchr1_async.search.compact.files import CompactManifest, CompactSettings, VectorFile
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.passage_embedding import BuildOptions
from tests.search.compact.arrays import Arrays, clustered, contents

pytestmark = pytest.mark.anyio

ROWS, LISTS = 1_300, 12
SETTINGS = CompactSettings(lists=LISTS)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)


def small_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(build, "_SYNC_SECONDS", 0)
    patch.setattr(build, "_CODE_ROWS", 100)
    patch.setattr(build, "SAMPLE_QUERIES", 60)
    patch.setattr(VectorFile.slabs, "__defaults__", (0, 300))


def ignore(event: Event) -> None:
    pass


async def make(
    folder: Path,
    source: Arrays,
    queries: Vectors | None = None,
    *,
    settings: CompactSettings = SETTINGS,
    emit: Callable[[Event], None] = ignore,
) -> CompactManifest:
    await anyio.Path(folder).mkdir(exist_ok=True)
    return await CompactBuilder(folder, source, await source.open(), settings, BuildOptions(emit=emit)).build(queries)


def source(rows: int = ROWS) -> Arrays:
    return Arrays(clustered(rows, 32), block=70)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a build that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "index"
    with pytest.MonkeyPatch.context() as patch:
        small_steps(patch)
        anyio.run(partial(make, folder, source()))
    return contents(folder)


def assert_equal(folder: Path, undisturbed: dict[str, bytes]) -> None:
    ours = contents(folder)
    assert ours.keys() == undisturbed.keys()
    assert [name for name in ours if name != "manifest.json" and ours[name] != undisturbed[name]] == []
    assert without_time(ours["manifest.json"]) == without_time(undisturbed["manifest.json"])


def without_time(content: bytes) -> dict[str, Any]:
    manifest = json.loads(content)
    del manifest["created"]
    for point in manifest["calibration"]["curve"]:
        del point["queries_per_second"]
    return manifest


async def test_phases_are_told_in_their_order(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    events: list[Event] = []
    arrays = source()
    manifest = await make(tmp_path / "index", arrays, emit=events.append)
    phases = ["rows", "codes", "lists", "exact", "calibrate", "checksums"]
    begun = {event.phase: event.total for event in events if isinstance(event, PhaseStarted)}
    assert sorted(begun) == sorted(phases)
    assert len([event for event in events if isinstance(event, PhaseEnded)]) == len(phases)
    for phase, total in begun.items():
        done = [event.done for event in events if isinstance(event, PhaseAdvanced) and event.phase == phase]
        assert done == sorted(done)
        assert done[-1] == total
    assert_equal(tmp_path / "index", undisturbed)
    assert (manifest.passages, manifest.dimension, manifest.lists) == (ROWS, 32, LISTS)
    assert (manifest.calibration.queries, manifest.calibration.origin) == (60, "passages")
    assert CompactManifest.load(tmp_path / "index") == manifest


@pytest.mark.parametrize("row", [0, 69, 70, 209, 500, ROWS - 1])
async def test_a_source_that_breaks_is_asked_for_the_rest(
    tmp_path: Path, undisturbed: dict[str, bytes], row: int
) -> None:
    arrays = source()
    arrays.fails_at = row
    with pytest.raises(StoreError, match=f"broke at row {row}"):
        await make(tmp_path / "index", arrays)
    with pytest.raises(StoreError, match="unfinished compact index"):
        CompactStore(tmp_path / "index")
    arrays.fails_at = None
    await make(tmp_path / "index", arrays)
    assert arrays.begun_at == [0, row // 70 * 70], "every block that came is kept"
    assert_equal(tmp_path / "index", undisturbed)


MOMENTS = [
    *[("rows", done) for done in (0, 70, 210, 1260, ROWS)],
    ("lists", LISTS),
    *[("codes", done) for done in (0, 100, 300, 400, 900, 1_200, ROWS)],
    *[("exact", done) for done in (300, ROWS)],
    ("calibrate", LISTS),
    *[("checksums", done) for done in (1, 3, 5)],
]


@pytest.mark.parametrize("how", ["a failure", "a cancellation"])
async def test_whatever_ends_it_it_goes_on_to_the_same_files(
    tmp_path: Path, undisturbed: dict[str, bytes], how: str
) -> None:
    """It is ended at each moment in turn, in one folder; each session gets a little further."""
    arrays, folder = source(), tmp_path / "index"

    class Ended(Exception):
        pass

    for moment in MOMENTS:
        with anyio.CancelScope() as scope:

            def end(event: Event, moment: tuple[str, int] = moment, scope: anyio.CancelScope = scope) -> None:
                if isinstance(event, PhaseAdvanced) and (event.phase, event.done) == moment:
                    if how == "a failure":
                        raise Ended
                    scope.cancel()

            with pytest.raises(Ended) if how == "a failure" else nullcontext():
                await make(folder, arrays, emit=end)
        if (folder / "manifest.json").exists():
            assert moment[0] in ("calibrate", "checksums"), "it ended later than it was told to"
            assert how == "a cancellation"
            break
    else:
        await make(folder, arrays)
    # Every row that was told of is kept; a cancellation at row 0 is met when the first ones are asked for.
    assert arrays.begun_at == [0] * (how == "a cancellation") + [0, 70, 210, 1260]
    assert_equal(folder, undisturbed)


@pytest.mark.parametrize(
    "name",
    [
        "RowWriter",
        "AppendedFiles",
        "Encoder",
        "write_atomically",
        "exact_nearest",
        "calibrate",
        "record_of",
        "learn_centres",
    ],
)
async def test_a_step_that_fails_is_done_again(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A disk that is full at the first, the second, the third file of a kind."""
    original, folder, arrays = getattr(build, name), tmp_path / "index", source()
    for good in (0, 2):
        calls = iter(range(good))

        def fail(*args: Any, calls: Any = calls, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        monkeypatch.setattr(build, name, fail)
        if not (folder / "manifest.json").exists():
            with pytest.raises(OSError, match="No space left") if good == 0 else suppress(OSError):
                await make(folder, arrays)
    monkeypatch.setattr(build, name, original)
    if not (folder / "manifest.json").exists():
        await make(folder, arrays)
    assert_equal(folder, undisturbed)


async def test_what_killed_processes_left_half_written_is_taken_away(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    folder, arrays = tmp_path / "index", source()
    arrays.fails_at = 500
    with pytest.raises(StoreError):
        await make(folder, arrays)
    left = (".codes.faiss.77", ".lists.bin.77", ".manifest.json.77", "building/.centres.npz.77")
    for name in left:
        (folder / name).write_bytes(b"half")
    with pytest.raises(StoreError):
        await make(folder, arrays)
    assert not [name for name in left if (folder / name).exists()]
    arrays.fails_at = None
    await make(folder, arrays)
    assert_equal(folder, undisturbed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": CompactSettings(lists=5)}, r"\(lists differ\)"),
        ({"name": "others"}, r"\(source differ\)"),
        ({"metric": "ip"}, r"\(metric differ\)"),
        ({"vectors": clustered(ROWS, 16)}, r"\(dimension differ\)"),
        ({"vectors": clustered(900, 32)}, r"\(source, rows differ\)"),
    ],
)
async def test_what_was_begun_otherwise_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder, arrays = tmp_path / "index", source()
    arrays.fails_at = 300
    with pytest.raises(StoreError, match="broke"):
        await make(folder, arrays)
    before = contents(folder)
    settings = change.pop("settings", SETTINGS)
    for name, value in change.items():
        setattr(arrays, name, value)
    with pytest.raises(StoreError, match=f"holds an unfinished index.*{words}: choose another folder"):
        await make(folder, arrays, settings=settings)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["identity.json", "progress.json"])
async def test_a_damaged_note_of_a_build_is_refused_in_words(tmp_path: Path, name: str) -> None:
    folder, arrays = tmp_path / "index", source()
    arrays.fails_at = 300
    with pytest.raises(StoreError, match="broke"):
        await make(folder, arrays)
    (folder / "building" / name).write_bytes(b"{")
    with pytest.raises(StoreError, match=r"building is corrupt .*: delete .* and start again"):
        await make(folder, arrays)


async def test_damaged_centres_are_learnt_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    (tmp_path / "index" / "building").mkdir(parents=True)
    (tmp_path / "index" / "building" / "centres.npz").write_bytes(b"PK\x03\x04 cut short")
    await make(tmp_path / "index", source())
    assert_equal(tmp_path / "index", undisturbed)


@pytest.mark.parametrize(
    ("claimed", "words"),
    [
        (ROWS - 1, r"40 passages with vectors \(40, 32\) at row 1,260, instead of 1,299 rows"),
        (ROWS + 1, "1,300 rows instead of 1,301"),
    ],
)
async def test_more_or_fewer_rows_than_it_said(tmp_path: Path, claimed: int, words: str) -> None:
    arrays = source()
    arrays.claimed = claimed
    with pytest.raises(StoreError, match=f"arrays returned {words}"):
        await make(tmp_path / "index", arrays)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
async def test_numbers_that_are_none_are_refused_with_their_row(tmp_path: Path, number: float) -> None:
    arrays = source()
    arrays.vectors[777, 3] = number
    with pytest.raises(StoreError, match="arrays: the vector of row 777 has non-finite"):
        await make(tmp_path / "index", arrays)


async def test_vectors_of_another_shape_and_too_large_ones(tmp_path: Path) -> None:
    arrays = source()

    async def wrong(start: int) -> Any:
        async for passages, vectors in Arrays(arrays.vectors, block=70).blocks(start):
            yield passages, vectors[:, :31]

    arrays.blocks = wrong  # type: ignore[method-assign]
    with pytest.raises(StoreError, match=r"70 passages with vectors \(70, 31\) at row 0, .* of dimension 32"):
        await make(tmp_path / "index", arrays)
    large = Arrays(clustered(ROWS, 32) * np.float32(1e6), "ip")
    with pytest.raises(StoreError, match=r"the vector of row 0 has .* above 65,504"):
        await make(tmp_path / "large", large)


async def test_another_recall_and_other_queries_are_calibrated_anew(tmp_path: Path) -> None:
    folder, arrays = tmp_path / "index", source()

    class Ended(Exception):
        pass

    def end(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase == "calibrate":
            raise Ended

    with pytest.raises(Ended):
        await make(folder, arrays, emit=end)
    queries = clustered(ROWS, 32)[::13] + np.float32(0.01)
    manifest = await make(folder, arrays, queries, settings=CompactSettings(recall=0.5, lists=LISTS))
    chosen = manifest.calibration
    assert (chosen.queries, chosen.origin, chosen.asked, chosen.recall_at) == (100, "queries", 0.5, 3)
    assert chosen.recall >= 0.5
    assert arrays.begun_at == [0]
    other = await make(tmp_path / "other", source(), queries, settings=CompactSettings(recall=0.5, lists=LISTS))
    assert (other.calibration.probes, other.calibration.candidates) == (chosen.probes, chosen.candidates)
